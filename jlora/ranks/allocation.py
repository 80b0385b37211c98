"""Ranks for each weight from how much it matters and a budget of trained numbers."""

from __future__ import annotations

import dataclasses
import heapq
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jlora.adapters import checks, inits
from jlora.adapters.adalora import AdaLoRA
from jlora.adapters.lora import LoRA
from jlora.adapters.protocol import AdapterConfig, Weight, trained_size
from jlora.ranks.scores import Importance, Scored

Allocated = dict[str, AdapterConfig | None]
"""From the pattern of exactly one path to its config, or None where the weight stays frozen."""


def allocate(
    importance: Importance,
    budget: int,
    *,
    config: LoRA | AdaLoRA,
    least: int = 1,
    most: int | None = None,
    multiple_of: int = 1,
) -> Allocated:
    """Rules that give each weight its own rank, spending a budget on what matters most.

    The budget is spent rank by rank, each time on the weight where a trained number is worth most.
    Where a method measured a spectrum, that is the worth of a weight's next direction. Where it
    gave one score, a weight's first rank is worth twice the score, its second two thirds, its
    `k`th `1 / (k - 1/2)`: which gives each weight that share of the budget that its score has of
    all scores, rounded to whole ranks (the method of Webster and Sainte-Laguë), and hands what a
    weight cannot use to the others.

    What comes of it is never over the budget, and below it by less than any weight that matters
    and has room would cost for one step more. At equal cost a weight that scores higher has no
    lower rank, and multiplying all scores changes nothing. A stack has one rank, and counts as its
    layers apart would.

    Args:
        importance: What was measured. Its weights are those that get a rule.
        budget: How many numbers are trained at most.
        config: Of every weight, but for the rank and an alpha that keeps its scale.
        least: The rank of the least important weight; 0 lets some stay frozen.
        most: The highest rank; a weight's own rank (or how many directions were measured) when
            None, which no rank exceeds.
        multiple_of: Ranks are multiples of this, which some devices multiply faster; `least` is
            rounded up to one and `most` down.

    Raises:
        TypeError: For a config without a rank to change, or an importance that is none.
        ValueError: When the budget is below what the least ranks cost, or a number is out of
            range.

    References:
        He et al., GoRA, arXiv:2502.12171, equations 6 and 7, for shares in proportion; a rank
        counts as `sqrt(m + n)` numbers there, and as the `m + n` that it is here. Paischer et al.,
        EVA, arXiv:2410.07170, for ranks by explained variance; its code counts ranks and not
        numbers, which is the same where all weights have one size. Balinski and Young, Fair
        Representation, for the rounding.
    """
    if not isinstance(importance, Importance):
        raise TypeError(f"importance={type(importance).__name__} is none. Call ranks.importance.")
    if not isinstance(config, LoRA | AdaLoRA):
        raise TypeError(
            f"config={config!r} has no rank that a budget could be spent on. Use jlora.LoRA, or "
            f"another of LoRA's form."
        )
    _check_numbers(budget, least, most, multiple_of)
    if not any(one.total > 0 for one in importance.weights.values()):
        raise ValueError(
            "importance scores every weight zero, which tells none from another. Measure on "
            "batches that the loss depends on."
        )
    steps = {
        path: _steps_of(path, one, config, least, most, multiple_of)
        for path, one in importance.weights.items()
    }
    smallest = sum(one.cost(one.least) for one in steps.values())
    if budget < smallest:
        raise ValueError(
            f"budget={budget} is below the {smallest} numbers of the least ranks of "
            f"{len(steps)} weights. Give {smallest} or more, a lower least, or fewer weights."
        )
    ranks = _spend(steps, budget - smallest)
    # What stays frozen comes first, as in recipes.
    return {
        pattern_of(path): _with_rank(config, rank) if rank else None
        for path, rank in sorted(ranks.items(), key=lambda item: item[1] > 0)
    }


def pattern_of(path: str) -> str:
    """The pattern of this path alone."""
    return f"^{re.escape(path)}$"


def cost(rules: Mapping[str, AdapterConfig | None], importance: Importance) -> int:
    """How many numbers rules of `allocate` train on the weights of an importance.

    Raises:
        ValueError: When the rules are of other weights.
    """
    total = 0
    for path, one in importance.weights.items():
        pattern = pattern_of(path)
        if pattern not in rules:
            raise ValueError(
                f"The rules have none for {path!r}. Give those that allocate returned."
            )
        config = rules[pattern]
        total += 0 if config is None else trained(path, one, config)
    return total


class _Steps(NamedTuple):
    """Between which ranks a weight may have which, and what they cost.

    Attributes:
        scored: The weight.
        least: Its lowest rank, a multiple of `size`.
        most: Its highest.
        size: How many ranks are added at once.
        first: How many numbers are trained at rank `size`.
        each: How many more with each further step.
    """

    scored: Scored
    least: int
    most: int
    size: int
    first: int
    each: int

    def cost(self, rank: int) -> int:
        """Of the whole rank."""
        return self.first + (rank // self.size - 1) * self.each if rank else 0

    def price(self, rank: int) -> int:
        """Of the step to this rank."""
        return self.cost(rank) - self.cost(rank - self.size)

    def worth(self, rank: int) -> float:
        """Of the step to this rank."""
        spectrum = self.scored.spectrum
        if spectrum is not None:
            return float(spectrum[..., rank - self.size : rank].sum())
        return self.scored.total / (rank / self.size - 0.5)


def _steps_of(
    path: str, one: Scored, config: Any, least: int, most: int | None, size: int
) -> _Steps:
    own = one.largest_rank if most is None else min(most, one.largest_rank)
    lowest, highest = -(-least // size) * size, own // size * size
    if lowest > highest:
        raise ValueError(
            f"least={least} and multiple_of={size} ask for a rank of {lowest} on {path!r}, which "
            f"takes {own} at most. Use smaller ones, or least=0, which leaves it frozen."
        )
    if not highest:
        return _Steps(one, 0, 0, size, 0, 0)
    from_, to = (size, 2 * size) if highest > size else (size, size)
    first, second = (trained(path, one, _with_rank(config, rank)) for rank in (from_, to))
    return _Steps(one, lowest, highest, size, first, second - first)


def _spend(steps: Mapping[str, _Steps], left: int) -> dict[str, int]:
    """The ranks that a budget, beyond what the least ones cost, buys."""
    ranks = {path: one.least for path, one in steps.items()}
    offers: list[tuple[float, float, str]] = []

    def offer(path: str) -> None:
        one, rank = steps[path], ranks[path] + steps[path].size
        if rank > one.most:
            return
        worth = one.worth(rank)
        if worth > 0:
            # Of equal offers the one that matters more, so that it is never behind.
            heapq.heappush(offers, (-worth / one.price(rank), -one.scored.total, path))

    for path in steps:
        offer(path)
    while offers:
        path = heapq.heappop(offers)[-1]
        price = steps[path].price(ranks[path] + steps[path].size)
        if price > left:  # Nor will it later: what is left only falls.
            continue
        ranks[path] += steps[path].size
        left -= price
        offer(path)
    return ranks


def trained(path: str, one: Scored, config: AdapterConfig) -> int:
    """How many numbers a config trains on a weight."""
    if isinstance(config, LoRA):
        # How factors start changes no shape, and some starts need numbers that are not here.
        config = dataclasses.replace(config, init=inits.uniform)

    def leaf(value: Any) -> Any:
        weight = Weight(path, value, one.axes, "linear", True, ("dot_general",))
        return config.leaf(jax.random.key(0), weight)

    return trained_size(jax.eval_shape(leaf, jax.ShapeDtypeStruct(one.shape, "float32")))


def _with_rank(config: LoRA | AdaLoRA, rank: int) -> LoRA | AdaLoRA:
    """The config at another rank and the same scale."""
    stabilized = isinstance(config, LoRA) and config.rank_stabilized
    growth = rank / config.rank
    alpha = config.alpha * (math.sqrt(growth) if stabilized else growth)
    return dataclasses.replace(config, rank=rank, alpha=alpha)


def _check_numbers(budget: int, least: int, most: int | None, multiple_of: int) -> None:
    checks.count("allocate: budget", budget)
    checks.count("allocate: multiple_of", multiple_of)
    if most is not None:
        checks.count("allocate: most", most)
    if least:
        checks.count("allocate: least", least)
    if most is not None and least > most:
        raise ValueError(f"least={least} exceeds most={most}, and no rank is both. Swap them.")
