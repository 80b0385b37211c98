"""Rank allocation: a rank per weight from its importance, within a parameter budget."""

from __future__ import annotations

import dataclasses
import heapq
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jlora import _validation, initializers
from jlora.adapters.adalora import AdaLoRA
from jlora.adapters.base import AdapterConfig, count_trainable_elements
from jlora.adapters.lora import LoRA
from jlora.importance.scores import Importance, WeightScore
from jlora.interpreter.weight import AdaptableWeight

# From a pattern that matches exactly one path to its config, or None where the weight is frozen.
RankRules = dict[str, AdapterConfig | None]


def allocate_ranks(
    importance: Importance,
    budget: int,
    *,
    config: LoRA | AdaLoRA,
    min_rank: int = 1,
    max_rank: int | None = None,
    multiple_of: int = 1,
) -> RankRules:
    """Returns rules that give each weight its own rank within a budget of trainable parameters.

    The budget is spent rank by rank, each time on the weight with the highest gain per parameter.
    Where a method measured a spectrum, the gain is the value of a weight's next direction. Where it
    gave one score, a weight's first rank gains twice the score, its second two thirds, its `k`th
    `1 / (k - 1/2)`. This gives each weight the share of the budget that its score has of all
    scores, rounded to integer ranks (the method of Webster and Sainte-Laguë), and passes the rest
    of saturated weights to the others.

    The result never exceeds the budget. The remainder is less than the cost of one more step on any
    weight with a positive score and a rank below its maximum. At equal cost, a weight that scores
    higher has no lower rank, and multiplying all scores changes nothing. A stack has one rank, and
    counts as its separate layers would.

    Args:
        importance: Measured importance. Each of its weights gets a rule.
        budget: Maximum number of trainable parameters.
        config: Config of every weight, except for the rank and an alpha that keeps its scale.
        min_rank: Rank of the least important weight; 0 allows frozen weights.
        max_rank: Highest rank, at most a weight's own rank (or its number of measured directions).
            None: a weight's own rank.
        multiple_of: Factor of all ranks; some devices multiply such ranks faster. `min_rank` is
            rounded up to a multiple and `max_rank` down.

    Raises:
        TypeError: `config` has no rank, or `importance` is not an `Importance`.
        ValueError: The budget is below the cost of the minimum ranks, or an option is out of range.

    References:
        He et al., GoRA, arXiv:2502.12171, equations 6 and 7, for shares in proportion; a rank
        counts as `sqrt(m + n)` parameters there, and as its actual `m + n` here. Paischer et al.,
        EVA, arXiv:2410.07170, for ranks by explained variance; its code counts ranks instead of
        parameters, which is the same where all weights have one size. Balinski and Young, Fair
        Representation, for the rounding.

    Example:
        >>> import numpy as np, jlora
        >>> from jlora.importance import Importance, WeightScore, allocate_ranks
        >>> from jlora.adapters import WeightAxes
        >>> axes = WeightAxes((), (0,), (1,))
        >>> scores = {"q": np.array(3.0), "v": np.array(1.0)}
        >>> importance = Importance(
        ...     "by_hand", {path: WeightScore((12, 9), axes, s) for path, s in scores.items()}
        ... )
        >>> rules = allocate_ranks(importance, 8 * 21, config=jlora.LoRA(rank=4, alpha=8))
        >>> {pattern: config.rank for pattern, config in rules.items()}
        {'^q$': 6, '^v$': 2}
    """
    if not isinstance(importance, Importance):
        raise TypeError(
            f"importance must be an Importance, got {type(importance).__name__}. Call "
            f"jlora.importance.measure_importance."
        )
    if not isinstance(config, LoRA | AdaLoRA):
        raise TypeError(
            f"config={config!r} has no rank to allocate. Use jlora.LoRA, or another method built "
            f"on it."
        )
    _check_rank_budget(budget, min_rank, max_rank, multiple_of)
    if not any(one.total > 0 for one in importance.weights.values()):
        raise ValueError(
            "importance scores every weight zero, so that no weight can be preferred. Measure on "
            "batches that the loss depends on."
        )
    rank_steps = {
        path: _make_rank_steps(path, one, config, min_rank, max_rank, multiple_of)
        for path, one in importance.weights.items()
    }
    min_budget = sum(one.num_params(one.min_rank) for one in rank_steps.values())
    if budget < min_budget:
        raise ValueError(
            f"budget={budget} must be at least {min_budget}, the parameters of the minimum ranks "
            f"of {len(rank_steps)} weights. Increase it, lower min_rank, or select fewer weights."
        )
    ranks = _spend_rank_budget(rank_steps, budget - min_budget)
    # Frozen weights come first, as in recipes.
    return {
        exact_path_pattern(path): _replace_rank_and_alpha(config, rank) if rank else None
        for path, rank in sorted(ranks.items(), key=lambda item: item[1] > 0)
    }


def trainable_params(rules: Mapping[str, AdapterConfig | None], importance: Importance) -> int:
    """Counts the parameters that rules of `allocate_ranks` train on the measured weights.

    Args:
        rules: Result of `allocate_ranks`.
        importance: Importance with a rule for each of its weights.

    Raises:
        ValueError: A weight has no rule.

    Example:
        >>> import numpy as np, jlora
        >>> from jlora.importance import Importance, WeightScore, trainable_params
        >>> from jlora.adapters import WeightAxes
        >>> weight = WeightScore((12, 9), WeightAxes((), (0,), (1,)), np.array(1.0))
        >>> trainable_params({"^w$": jlora.LoRA(rank=2, alpha=4)}, Importance("m", {"w": weight}))
        42
    """
    total = 0
    for path, one in importance.weights.items():
        pattern = exact_path_pattern(path)
        if pattern not in rules:
            raise ValueError(
                f"rules must have a rule for {path!r}. Pass the result of allocate_ranks."
            )
        config = rules[pattern]
        total += 0 if config is None else count_weight_trainable_params(path, one, config)
    return total


def exact_path_pattern(path: str) -> str:
    """Returns a pattern that matches this path only."""
    return f"^{re.escape(path)}$"


class _RankSteps(NamedTuple):
    """Ranks that a weight may have, and their costs.

    Attributes:
        weight_score: Score of the weight.
        min_rank: Lowest rank, a multiple of `step_size`.
        max_rank: Highest rank.
        step_size: Number of ranks added per step.
        first_step_params: Number of trainable parameters at rank `step_size`.
        params_per_step: Number of parameters that each further step adds.
    """

    weight_score: WeightScore
    min_rank: int
    max_rank: int
    step_size: int
    first_step_params: int
    params_per_step: int

    def num_params(self, rank: int) -> int:
        """Returns the number of parameters at a rank."""
        return (
            self.first_step_params + (rank // self.step_size - 1) * self.params_per_step
            if rank
            else 0
        )

    def step_params(self, rank: int) -> int:
        """Returns the number of parameters that the step to this rank adds."""
        return self.num_params(rank) - self.num_params(rank - self.step_size)

    def step_gain(self, rank: int) -> float:
        """Returns the gain of the step to this rank."""
        spectrum = self.weight_score.spectrum
        if spectrum is not None:
            return float(spectrum[..., rank - self.step_size : rank].sum())
        return self.weight_score.total / (rank / self.step_size - 0.5)


def _make_rank_steps(
    path: str,
    weight_score: WeightScore,
    config: Any,
    min_rank: int,
    max_rank: int | None,
    step_size: int,
) -> _RankSteps:
    limit = weight_score.max_rank if max_rank is None else min(max_rank, weight_score.max_rank)
    lowest, highest = -(-min_rank // step_size) * step_size, limit // step_size * step_size
    if lowest > highest:
        raise ValueError(
            f"min_rank={min_rank} and multiple_of={step_size} need a rank of {lowest} on {path!r}, "
            f"which takes {limit} at most. Use smaller ones, or min_rank=0, which leaves it frozen."
        )
    if not highest:
        return _RankSteps(weight_score, 0, 0, step_size, 0, 0)
    second_rank = 2 * step_size if highest > step_size else step_size
    first, second = (
        count_weight_trainable_params(path, weight_score, _replace_rank_and_alpha(config, rank))
        for rank in (step_size, second_rank)
    )
    return _RankSteps(weight_score, lowest, highest, step_size, first, second - first)


def _spend_rank_budget(rank_steps: Mapping[str, _RankSteps], remaining: int) -> dict[str, int]:
    """Returns ranks after spending the budget that remains beyond the minimum ranks."""
    ranks = {path: one.min_rank for path, one in rank_steps.items()}
    queue: list[tuple[float, float, str]] = []

    def push_next_step(path: str) -> None:
        steps = rank_steps[path]
        rank = ranks[path] + steps.step_size
        if rank > steps.max_rank:
            return
        gain = steps.step_gain(rank)
        if gain > 0:
            # Ties go to the weight with the higher score, so that its rank is never lower.
            priority = (-gain / steps.step_params(rank), -steps.weight_score.total, path)
            heapq.heappush(queue, priority)

    for path in rank_steps:
        push_next_step(path)
    while queue:
        path = heapq.heappop(queue)[-1]
        cost = rank_steps[path].step_params(ranks[path] + rank_steps[path].step_size)
        if cost > remaining:  # It stays too expensive, since the remaining budget only falls.
            continue
        ranks[path] += rank_steps[path].step_size
        remaining -= cost
        push_next_step(path)
    return ranks


def count_weight_trainable_params(
    path: str, weight_score: WeightScore, config: AdapterConfig
) -> int:
    """Counts the parameters that a config trains on a weight."""
    if isinstance(config, LoRA):
        # Initializers do not change shapes, and some need values that are not available here.
        config = dataclasses.replace(config, init=initializers.kaiming_uniform)

    def init_leaf(value: Any) -> Any:
        weight = AdaptableWeight(path, value, weight_score.axes, "linear", True, ("dot_general",))
        return config.init_leaf(jax.random.key(0), weight)

    return count_trainable_elements(
        jax.eval_shape(init_leaf, jax.ShapeDtypeStruct(weight_score.shape, "float32"))
    )


def _replace_rank_and_alpha(config: LoRA | AdaLoRA, rank: int) -> LoRA | AdaLoRA:
    """Returns the config at another rank and the same scale."""
    use_rslora = isinstance(config, LoRA) and config.use_rslora
    growth = rank / config.rank
    alpha = config.alpha * (math.sqrt(growth) if use_rslora else growth)
    return dataclasses.replace(config, rank=rank, alpha=alpha)


def _check_rank_budget(budget: int, min_rank: int, max_rank: int | None, multiple_of: int) -> None:
    _validation.check_positive_int("allocate_ranks: budget", budget)
    _validation.check_positive_int("allocate_ranks: multiple_of", multiple_of)
    if max_rank is not None:
        _validation.check_positive_int("allocate_ranks: max_rank", max_rank)
    if min_rank:
        _validation.check_positive_int("allocate_ranks: min_rank", min_rank)
    if max_rank is not None and min_rank > max_rank:
        raise ValueError(f"min_rank={min_rank} must be at most max_rank={max_rank}. Swap them.")
