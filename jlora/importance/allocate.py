"""Ranks for each weight from how much it matters and a budget of trained numbers."""

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

RankRules = dict[str, AdapterConfig | None]

"""From the pattern of exactly one path to its config, or None where the weight stays frozen."""


def allocate_ranks(
    importance: Importance,
    budget: int,
    *,
    config: LoRA | AdaLoRA,
    min_rank: int = 1,
    max_rank: int | None = None,
    multiple_of: int = 1,
) -> RankRules:
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
        min_rank: The rank of the least important weight; 0 lets some stay frozen.
        max_rank: The highest rank; a weight's own rank (or how many directions were measured) when
            None, which no rank exceeds.
        multiple_of: Ranks are multiples of this, which some devices multiply faster; `min_rank` is
            rounded up to one and `max_rank` down.

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
    _check_rank_budget(budget, min_rank, max_rank, multiple_of)
    if not any(one.total > 0 for one in importance.weights.values()):
        raise ValueError(
            "importance scores every weight zero, which tells none from another. Measure on "
            "batches that the loss depends on."
        )
    steps = {
        path: _make_rank_steps(path, one, config, min_rank, max_rank, multiple_of)
        for path, one in importance.weights.items()
    }
    smallest = sum(one.num_params(one.min_rank) for one in steps.values())
    if budget < smallest:
        raise ValueError(
            f"budget={budget} is below the {smallest} numbers of the least ranks of "
            f"{len(steps)} weights. Give {smallest} or more, a lower least, or fewer weights."
        )
    ranks = _spend_rank_budget(steps, budget - smallest)
    # What stays frozen comes first, as in recipes.
    return {
        exact_path_pattern(path): _replace_rank_and_alpha(config, rank) if rank else None
        for path, rank in sorted(ranks.items(), key=lambda item: item[1] > 0)
    }


def exact_path_pattern(path: str) -> str:
    """The pattern of this path alone."""
    return f"^{re.escape(path)}$"


def trainable_params(rules: Mapping[str, AdapterConfig | None], importance: Importance) -> int:
    """How many numbers rules of `allocate_ranks` train on the weights of an importance.

    Raises:
        ValueError: When the rules are of other weights.
    """
    total = 0
    for path, one in importance.weights.items():
        pattern = exact_path_pattern(path)
        if pattern not in rules:
            raise ValueError(
                f"The rules have none for {path!r}. Give those that allocate returned."
            )
        config = rules[pattern]
        total += 0 if config is None else count_weight_trainable_params(path, one, config)
    return total


class _RankSteps(NamedTuple):
    """Between which ranks a weight may have which, and what they cost.

    Attributes:
        weight_score: The weight.
        min_rank: Its lowest rank, a multiple of `step_size`.
        max_rank: Its highest.
        step_size: How many ranks are added at once.
        first_step_params: How many numbers are trained at rank `step_size`.
        params_per_step: How many more with each further step.
    """

    weight_score: WeightScore
    min_rank: int
    max_rank: int
    step_size: int
    first_step_params: int
    params_per_step: int

    def num_params(self, rank: int) -> int:
        """Of the whole rank."""
        return (
            self.first_step_params + (rank // self.step_size - 1) * self.params_per_step
            if rank
            else 0
        )

    def step_params(self, rank: int) -> int:
        """Of the step to this rank."""
        return self.num_params(rank) - self.num_params(rank - self.step_size)

    def step_gain(self, rank: int) -> float:
        """Of the step to this rank."""
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
    own = weight_score.max_rank if max_rank is None else min(max_rank, weight_score.max_rank)
    lowest, highest = -(-min_rank // step_size) * step_size, own // step_size * step_size
    if lowest > highest:
        raise ValueError(
            f"least={min_rank} and multiple_of={step_size} ask for a rank of {lowest} on {path!r}, which "
            f"takes {own} at most. Use smaller ones, or least=0, which leaves it frozen."
        )
    if not highest:
        return _RankSteps(weight_score, 0, 0, step_size, 0, 0)
    from_, to = (step_size, 2 * step_size) if highest > step_size else (step_size, step_size)
    first, second = (
        count_weight_trainable_params(path, weight_score, _replace_rank_and_alpha(config, rank))
        for rank in (from_, to)
    )
    return _RankSteps(weight_score, lowest, highest, step_size, first, second - first)


def _spend_rank_budget(rank_steps: Mapping[str, _RankSteps], remaining: int) -> dict[str, int]:
    """The ranks that a budget, beyond what the least ones cost, buys."""
    ranks = {path: one.min_rank for path, one in rank_steps.items()}
    offers: list[tuple[float, float, str]] = []

    def offer(path: str) -> None:
        one, rank = rank_steps[path], ranks[path] + rank_steps[path].step_size
        if rank > one.max_rank:
            return
        worth = one.step_gain(rank)
        if worth > 0:
            # Of equal offers the one that matters more, so that it is never behind.
            heapq.heappush(offers, (-worth / one.step_params(rank), -one.weight_score.total, path))

    for path in rank_steps:
        offer(path)
    while offers:
        path = heapq.heappop(offers)[-1]
        price = rank_steps[path].step_params(ranks[path] + rank_steps[path].step_size)
        if price > remaining:  # Nor will it later: what is left only falls.
            continue
        ranks[path] += rank_steps[path].step_size
        remaining -= price
        offer(path)
    return ranks


def count_weight_trainable_params(
    path: str, weight_score: WeightScore, config: AdapterConfig
) -> int:
    """How many numbers a config trains on a weight."""
    if isinstance(config, LoRA):
        # How factors start changes no shape, and some starts need numbers that are not here.
        config = dataclasses.replace(config, init=initializers.kaiming_uniform)

    def leaf(value: Any) -> Any:
        weight = AdaptableWeight(path, value, weight_score.axes, "linear", True, ("dot_general",))
        return config.init_leaf(jax.random.key(0), weight)

    return count_trainable_elements(
        jax.eval_shape(leaf, jax.ShapeDtypeStruct(weight_score.shape, "float32"))
    )


def _replace_rank_and_alpha(config: LoRA | AdaLoRA, rank: int) -> LoRA | AdaLoRA:
    """The config at another rank and the same scale."""
    stabilized = isinstance(config, LoRA) and config.use_rslora
    growth = rank / config.rank
    alpha = config.alpha * (math.sqrt(growth) if stabilized else growth)
    return dataclasses.replace(config, rank=rank, alpha=alpha)


def _check_rank_budget(budget: int, min_rank: int, max_rank: int | None, multiple_of: int) -> None:
    _validation.check_positive_int("allocate: budget", budget)
    _validation.check_positive_int("allocate: multiple_of", multiple_of)
    if max_rank is not None:
        _validation.check_positive_int("allocate: most", max_rank)
    if min_rank:
        _validation.check_positive_int("allocate: least", min_rank)
    if max_rank is not None and min_rank > max_rank:
        raise ValueError(
            f"least={min_rank} exceeds most={max_rank}, and no rank is both. Swap them."
        )
