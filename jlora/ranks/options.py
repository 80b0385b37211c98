"""How wide and how long a search is."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How wide and how long a search is.

    Attributes:
        ranks: Those that are tried, from the smallest up, as long as more gain something.
        seeds: With how many seeds each rank and each choice of targets is trained; 2 or more.
        steps: Of each trial; those of the recipe when None.
        targets: Names of `jlora.ranks.trials.PATTERNS`; the recipe's own are tried besides.
        rates: Learning rates, as multiples of the recipe's.
        alphas: alpha / rank; that of the recipe is tried besides.
        hold: What stays the recipe's while ranks differ: "alpha", or "scale", the factor that the
            product of factors is multiplied by.
        sampler: "grid", all pairs of rates and alphas, or "optuna", which draws between their ends.
        settings: How many Optuna draws.
        rungs: How often a trial of learning rate and alpha is looked at, the last time at its end;
            each time after twice as many steps.
        minutes: After which no trial begins; the search can be resumed. No end when None.

    References:
        That alpha is held: Schulman et al., LoRA Without Regret, Thinking Machines Lab, 2025, find
        that with the scale alpha / rank and one alpha the best learning rate hardly depends on the
        rank, so that ranks can be compared at the same one.
    """

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    seeds: int = 3
    steps: int | None = None
    targets: tuple[str, ...] = ("attention", "mlp", "all")
    rates: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    alphas: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    hold: str = "alpha"
    sampler: str = "grid"
    settings: int = 16
    rungs: int = 3
    minutes: float | None = None

    def __post_init__(self) -> None:
        if not self.ranks or list(self.ranks) != sorted(set(self.ranks)) or self.ranks[0] < 1:
            raise ValueError(
                f"ranks={self.ranks} are no growing list of ranks. Give some, such as 1,2,4,8."
            )
        if self.seeds < 2:
            raise ValueError(
                f"seeds={self.seeds} tell nothing of the noise that gains are compared with. Give "
                f"2 or more."
            )
        for name, least in (("steps", 1), ("settings", 1), ("rungs", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is no count. Give {least} or more.")
        for name in ("rates", "alphas"):
            values = getattr(self, name)
            if not values or not all(0 < value < math.inf for value in values):
                raise ValueError(
                    f"{name}={values} are no positive numbers. Give some, such as 0.5,1,2."
                )
        for name, known in (("hold", ("alpha", "scale")), ("sampler", ("grid", "optuna"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is none of {', '.join(known)}. Choose one."
                )
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes={self.minutes} is no time. Give a positive number.")
