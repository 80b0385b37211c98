"""Ranks for a budget: their costs, their distribution, and recipes with them."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.layer_zoo import normal
from _support.training_fixtures import Make

import jlora
from jlora.importance import (
    ActivationVariance,
    Importance,
    StableRank,
    WeightScore,
    allocate_ranks,
    measure_importance,
    to_recipe,
    trainable_params,
)
from jlora.interpreter.terms import WeightAxes
from jlora.models import model_from_config
from jlora.training import recipe
from jlora.training.setup import rules_from_recipe

LORA = jlora.LoRA(rank=4, alpha=8)
# (shape, axes): a matrix, heads of outputs, heads of inputs, a stack on its last axis, and one that
# is narrow.
LAYOUTS = {
    "a": ((12, 9), WeightAxes((), (0,), (1,))),
    "b": ((7, 2, 5), WeightAxes((), (0,), (1, 2))),
    "c": ((2, 5, 8), WeightAxes((), (0, 1), (2,))),
    "d": ((11, 6, 3), WeightAxes((2,), (0,), (1,))),
    "e": ((13, 3), WeightAxes((), (0,), (1,))),
}
# Trained for each further rank, by hand: (inputs + outputs) for each of the batch.
PRICES = {"a": 21, "b": 17, "c": 18, "d": 51, "e": 16}
LARGEST = {"a": 9, "b": 7, "c": 8, "d": 6, "e": 3}


def scored(scores: dict[str, Any], spectra: dict[str, Any] | None = None) -> Importance:
    weights = {}
    for path, score in scores.items():
        shape, axes = LAYOUTS[path[0]]
        batch = tuple(shape[axis] for axis in axes.batch)
        spectrum = None if spectra is None else np.asarray(spectra[path])
        weights[path] = WeightScore(shape, axes, np.broadcast_to(score, batch), spectrum)
    return Importance("by_hand", weights)


def drawn(seed: int) -> Importance:
    scores = np.exp(2 * np.random.default_rng(seed).normal(size=5))
    return scored(dict(zip(LAYOUTS, scores, strict=True)))


def spectral(seed: int) -> Importance:
    rng = np.random.default_rng(seed)
    spectra = {}
    for path, (shape, axes) in LAYOUTS.items():
        batch = [shape[axis] for axis in axes.batch]
        spectra[path] = -np.sort(-np.exp(2 * rng.normal(size=(*batch, 10))), axis=-1)
    return scored(dict.fromkeys(LAYOUTS, 1.0), spectra)


def of(rules: Any) -> dict[str, int]:
    """The rank of each path."""
    found = {}
    for pattern, config in rules.items():
        path = re.sub(r"\\(.)", r"\1", pattern[1:-1])
        found[path] = 0 if config is None else config.rank
    return found


def spent(found: dict[str, int]) -> int:
    return sum(PRICES[path[0]] * rank for path, rank in found.items())


@pytest.mark.parametrize("importance", [drawn, spectral])
@pytest.mark.parametrize(
    ("least", "most", "multiple_of"), [(1, None, 1), (0, 4, 1), (0, 6, 2), (2, 3, 1)]
)
@pytest.mark.parametrize("seed", range(3))
def test_allocate_ranks_spends_the_budget(
    importance: Any, least: int, most: int | None, multiple_of: int, seed: int
) -> None:
    for budget in (310, 451, 777, 10_000):
        rules = allocate_ranks(
            importance(seed),
            budget,
            config=LORA,
            min_rank=least,
            max_rank=most,
            multiple_of=multiple_of,
        )
        found = of(rules)
        limits = {path: min(most or 99, own) // multiple_of for path, own in LARGEST.items()}
        assert spent(found) <= budget
        assert trainable_params(rules, importance(seed)) == spent(found)
        assert all(rank % multiple_of == 0 and rank >= least for rank in found.values())
        assert all(found[path] <= limits[path] * multiple_of for path in found)
        left = budget - spent(found)
        for path, rank in found.items():
            assert rank == limits[path] * multiple_of or left < PRICES[path] * multiple_of


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [190, 333, 600])
def test_allocate_ranks_is_monotonic_in_score(seed: int, budget: int) -> None:
    scores = np.random.default_rng(seed).integers(1, 5, 8).astype(float)  # Some are equal.
    found = of(
        allocate_ranks(scored({f"a{n}": s for n, s in enumerate(scores)}), budget, config=LORA)
    )
    for one, other in zip(*np.triu_indices(8, 1), strict=True):
        difference = scores[one] - scores[other]
        assert difference == 0 or difference * (found[f"a{one}"] - found[f"a{other}"]) >= 0


@pytest.mark.parametrize("importance", [drawn, spectral])
@pytest.mark.parametrize("factor", [1e-9, 3.7, 1e12])
def test_allocate_ranks_is_scale_invariant(importance: Any, factor: float) -> None:
    one = importance(5)
    weights = {
        path: w._replace(
            scores=w.scores * factor, spectrum=None if w.spectrum is None else w.spectrum * factor
        )
        for path, w in one.weights.items()
    }
    other = dataclasses.replace(one, weights=weights)
    assert allocate_ranks(one, 555, config=LORA) == allocate_ranks(other, 555, config=LORA)


def test_allocate_ranks_stack_counts_as_layers() -> None:
    axes, shape = WeightAxes((0,), (1,), (2,)), (3, 12, 9)
    stack = WeightScore(shape, axes, np.full(3, 2.0))
    other = WeightScore((12, 9), WeightAxes((), (0,), (1,)), np.array(6.0))
    together = Importance("by_hand", {"stack": stack, "other": other})
    apart = {f"layer{n}": other._replace(scores=np.array(2.0)) for n in range(3)}
    budget = 21 * 12  # Half of the twelve ranks are the stack's: two for each of its layers.
    first = of(allocate_ranks(together, budget, config=LORA))
    second = of(
        allocate_ranks(Importance("by_hand", {**apart, "other": other}), budget, config=LORA)
    )
    assert first["stack"] == second["layer0"] == second["layer1"] == second["layer2"] == 2
    assert first["other"] == second["other"] == 6


def test_allocate_ranks_shares_follow_scores() -> None:
    axes = WeightAxes((), (0,), (1,))
    shapes = {"a": (400, 500), "b": (300, 800), "c": (700, 310)}
    scores = {"a": 1.0, "b": 2.0, "c": 4.0}
    weights = {p: WeightScore(s, axes, np.array(scores[p])) for p, s in shapes.items()}
    found = of(allocate_ranks(Importance("by_hand", weights), 350_000, config=LORA))
    for path, score in scores.items():
        numbers = found[path] * sum(shapes[path])
        # Rounded to integer ranks, of about a thousand parameters each.
        assert numbers == pytest.approx(350_000 * score / 7, abs=1100)


def test_allocate_ranks_full_weight_frees_budget() -> None:
    found = of(allocate_ranks(scored({"e": 1e6, "a": 1.0, "b": 1.0}), 300, config=LORA))
    assert found["e"] == 3
    # 300 - 3 * 16 = 252 parameters: 126 for each.
    assert found["a"] == 6
    assert found["b"] == 7


def test_allocate_ranks_takes_largest_spectrum() -> None:
    rng = np.random.default_rng(0)
    spectra = {f"a{n}": -np.sort(-rng.exponential(1 + n, 9)) for n in range(4)}
    everything = np.concatenate(list(spectra.values()))
    threshold = np.sort(everything)[-17]
    want = {path: int((values >= threshold).sum()) for path, values in spectra.items()}
    found = allocate_ranks(
        scored(dict.fromkeys(spectra, 1.0), spectra), 17 * 21 + 20, config=LORA, min_rank=0
    )
    assert of(found) == want


def test_allocate_ranks_spectrum_per_parameter() -> None:
    importance = spectral(3)
    density = {}
    for path, one in importance.weights.items():
        for rank, worth in enumerate(one.spectrum.reshape(-1, 10).sum(0)[: LARGEST[path]]):
            density[path, rank] = worth / PRICES[path]
    best = sorted(density, key=lambda step: -density[step])[:12]
    want = {path: sum(step[0] == path for step in best) for path in LAYOUTS}
    assert of(allocate_ranks(importance, spent(want), config=LORA, min_rank=0)) == want


def test_allocate_ranks_zero_score_gets_min_rank() -> None:
    importance = scored({"a": 1.0, "b": 0.0})
    assert of(allocate_ranks(importance, 10_000, config=LORA)) == {"a": 9, "b": 1}
    rules = allocate_ranks(importance, 10_000, config=LORA, min_rank=0)
    assert next(iter(rules.items())) == ("^b$", None)
    assert of(rules) == {"b": 0, "a": 9}


@pytest.mark.parametrize("stabilized", [False, True])
def test_allocate_ranks_keeps_config_scale(stabilized: bool) -> None:
    config = dataclasses.replace(LORA, use_rslora=stabilized)
    for one in allocate_ranks(drawn(1), 500, config=config).values():
        assert one is not None
        divisor = math.sqrt if stabilized else float
        assert one.alpha / divisor(one.rank) == pytest.approx(8 / divisor(4))
        assert one.use_rslora == stabilized


FAMILIES = [
    LORA,
    jlora.LoRAFA(rank=2, alpha=3),
    jlora.DoRA(rank=2, alpha=3),
    jlora.SoRA(rank=2, alpha=3),
    jlora.DyLoRA(rank=2, alpha=3),
    jlora.AdaLoRA(rank=2, alpha=3),
]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.thin(3)
def test_trainable_params_equal_adapter_size(config: Any, least: int) -> None:
    params = {
        "blocks.0/w": jnp.ones((6, 5)),
        "blocks.0/w2": jnp.ones((2, 5, 7)),
        "q": jnp.ones((5, 2, 4)),
    }

    def fn(p: Any, x: jax.Array) -> jax.Array:
        h = jnp.stack([x @ p["blocks.0/w"], 2 * x @ p["blocks.0/w"]])
        return jnp.einsum("etd,edf->etf", h, p["blocks.0/w2"]).sum() + jnp.einsum(
            "td,dhk->thk", h[0], p["q"]
        )

    params = {
        "blocks.0": {"w": params["blocks.0/w"], "w2": params["blocks.0/w2"]},
        "q": params["q"],
    }
    flat = lambda p: {
        "blocks.0/w": p["blocks.0"]["w"],
        "blocks.0/w2": p["blocks.0"]["w2"],
        "q": p["q"],
    }
    run = lambda p, x: fn(flat(p), x)
    x = jnp.ones((3, 6))
    importance = measure_importance(run, params, [x], method=StableRank())
    rules = allocate_ranks(importance, 150, config=config, min_rank=least)
    init = jax.jit(jlora.lora_transform(run, rules).init)
    adapter = init(jax.random.key(0), params, x)
    trained, _ = jlora.partition(adapter)
    numbers = sum(array.size for array in jax.tree.leaves(trained))
    assert numbers == trainable_params(rules, importance)
    # A rank of the costliest weight is 2 x (5 + 7 + 1) parameters.
    assert 150 - 26 < numbers <= 150
    assert {path: leaf.rank for path, leaf in adapter.items()} == {
        path: rank for path, rank in of(rules).items() if rank
    }


def test_allocate_ranks_budget_too_small_raises() -> None:
    smallest = 2 * (21 + 17 + 18 + 51 + 16)
    with pytest.raises(
        ValueError, match=rf"budget=245 must be at least {smallest}, the parameters"
    ):
        allocate_ranks(drawn(0), smallest - 1, config=LORA, min_rank=2)
    assert set(of(allocate_ranks(drawn(0), smallest, config=LORA, min_rank=2)).values()) == {2}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"budget": 0}, "budget=0 must be a positive integer"),
        ({"budget": 1.5}, "must be a positive integer"),
        ({"min_rank": -1}, "min_rank=-1 must be a positive integer"),
        ({"min_rank": 3, "max_rank": 2}, "min_rank=3 must be at most max_rank=2"),
        ({"min_rank": 4}, "on 'e', which takes 3 at most"),
        ({"multiple_of": 4}, "on 'e', which takes 3 at most"),
        ({"multiple_of": 0}, "must be a positive integer"),
        ({"config": jlora.IA3()}, "has no rank"),
        ({"importance": {"a": 1.0}}, "Call jlora.importance.measure_importance"),
        ({"importance": scored({"a": 0.0, "b": 0.0})}, "scores every weight zero"),
    ],
)
def test_allocate_ranks_bad_inputs_raise(changes: dict[str, Any], match: str) -> None:
    options = {"importance": drawn(0), "budget": 500, "config": LORA, **changes}
    with pytest.raises((ValueError, TypeError), match=match):
        allocate_ranks(options.pop("importance"), options.pop("budget"), **options)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_importance_bad_scores_raise(bad: float) -> None:
    with pytest.raises(ValueError, match="The scores of 'd' hold NaN, infinite or negative"):
        scored({"a": 1.0, "d": [1.0, bad, 2.0]})
    with pytest.raises(ValueError, match="The spectrum of 'a' must be in descending order"):
        scored({"a": 1.0}, {"a": [1.0, 2.0]})


# --- in recipes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(LORA, dropout=0.1, use_rslora=True, dtype=jnp.bfloat16),
        jlora.DoRA(rank=4, alpha=2, through_norm=True),
        jlora.AdaLoRA(rank=4, alpha=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_to_recipe_roundtrips_rules(config: Any, recipe_of: Make, base: Any) -> None:
    paths = ["params/layers/attention/q/kernel", "params/layers/mlp/up/kernel", "params/head"]
    by_hand = scored({"a": 2.0, "b": 0.0, "c": 3.0}).weights.values()
    weights = dict(zip(paths, by_hand, strict=True))
    rules = allocate_ranks(Importance("by_hand", weights), 150, config=config, min_rank=0)
    assert None in rules.values()
    raw = {**recipe_of(), **to_recipe(rules)}
    if isinstance(config, jlora.AdaLoRA):
        raw["optimizer"] = {"budget": {"target_rank": 1}}
    again = rules_from_recipe(recipe.validate(raw), model_from_config(base))
    assert list(again.items()) == list(rules.items())


def test_to_recipe_keeps_named_init_only(recipe_of: Make, base: Any) -> None:
    raw = recipe_of(adapter={"init": "orthogonal", "rank": 2, "alpha": 4})
    config = recipe.validate(raw).adapter.to_config()
    rules = allocate_ranks(scored({"a": 1.0}), 21 * 4, config=config)
    again = recipe.validate({**raw, **to_recipe(rules)})
    assert rules_from_recipe(again, model_from_config(base)) == rules
    custom = dataclasses.replace(LORA, init=jlora.initializers.gaussian(0.3))
    with pytest.raises(ValueError, match="has an initializer that recipes have no name for"):
        to_recipe({"w": custom})
    eva = dataclasses.replace(LORA, init=jlora.initializers.eva({}))
    with pytest.raises(ValueError, match="cannot be expressed in a recipe"):
        to_recipe({"w": eva})


def test_to_recipe_bad_rules_raise() -> None:
    with pytest.raises(ValueError, match="adapt nothing"):
        to_recipe({"w": None})
    with pytest.raises(ValueError, match="'v': None comes after one with a config"):
        to_recipe({"w": LORA, "v": None})


# --- EVA ------------------------------------------------------------------------------------------


def test_allocate_ranks_eva_shares_moments() -> None:
    fn = lambda p, x: jnp.sin(x @ p["w"]) @ p["v"]
    params = {"w": jnp.linspace(-1, 1, 30).reshape(6, 5), "v": jnp.ones((5, 7))}
    x = normal(0, (40, 6), np.float32) * jnp.array([9, 3, 1, 0.1, 0.1, 0.1])
    moments = jax.jit(lambda x: jlora.input_moments(fn, LORA, params, x))(x)
    importance = measure_importance(fn, params, [x], method=ActivationVariance(moments=moments))
    config = dataclasses.replace(LORA, init=jlora.initializers.eva(moments))
    rules = allocate_ranks(importance, 50, config=config)
    lora = jlora.lora_transform(fn, rules)
    adapter = jax.jit(lora.init)(jax.random.key(1), params, x)
    ranks_of = {path: leaf.rank for path, leaf in adapter.items()}
    assert sum(rank * sum(params[path].shape) for path, rank in ranks_of.items()) <= 50
    # The first direction is that of the largest spread; the start changes nothing.
    np.testing.assert_allclose(np.abs(adapter["w"].a[0, 0]), 1, atol=0.02)  # 40 draws.
    np.testing.assert_array_equal(jax.jit(lora.apply)(params, adapter, x), jax.jit(fn)(params, x))
