"""`combine_adapters` against NumPy, on the adapters' updates."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import FAMILIES, case, moved
from _support.deltas import LAYOUTS, bias, change, lora

import jlora
from jlora import merging
from jlora._delta import depends_on_base
from jlora.adapters.full import BitFitLeaf, FullDeltaLeaf
from jlora.adapters.lora import LoRALeaf
from jlora.interpreter.terms import WeightAxes

# Sums of at most 12 products of numbers below 20, in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WEIGHTS = np.array([0.5, -2.0, 1.25])
DENSITY = 0.4


def three(layout: str) -> list[dict[str, Any]]:
    """Adapters of different ranks and scales; the scale of rsLoRA is `alpha / sqrt(rank)`."""
    return [
        {"w": lora(layout, 1)},
        {"w": lora(layout, 2, rank=1, alpha=4.0)},
        {"w": lora(layout, 3, rank=3, alpha=2.0, use_rslora=True)},
    ]


def changes(adapters: list[dict[str, Any]]) -> np.ndarray:
    """(batch, adapters, fan_in, fan_out)."""
    return np.stack([change(adapter["w"]) for adapter in adapters], 1)


# --- the papers' equations -----------------------------------------------------------------------


def trimmed(delta: np.ndarray, density: float) -> np.ndarray:
    """TIES, section 4, with the threshold of one matrix."""
    count = int(density * delta.size)
    threshold = np.sort(np.abs(delta).ravel())[-count]
    return np.where(np.abs(delta) >= threshold, delta, 0)


def elected(weighted: np.ndarray) -> np.ndarray:
    """TIES, section 4: `gamma = sgn(sum)`, and the mean over those with that sign."""
    result = np.zeros(weighted.shape[1:])
    for place in np.ndindex(*result.shape):
        values = weighted[(slice(None), *place)]
        sign = 1 if values.sum() >= 0 else -1
        agreeing = values[np.sign(values) == sign]
        result[place] = agreeing.mean() if agreeing.size else 0
    return result


def keep_chances(delta: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """DELLA, section 3: per output, even steps in the rank of the magnitude among its inputs."""
    chances = np.zeros(delta.shape)
    for output in range(delta.shape[1]):
        order = np.argsort(np.abs(delta[:, output]))
        chances[order, output] = np.linspace(density - epsilon, density + epsilon, len(order))
    return chances


def reference(method: merging.MergeMethod, deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One matrix by a method without random draws."""
    if isinstance(method, merging.Magnitude):
        deltas = np.stack([trimmed(delta, method.density) for delta in deltas])
    weighted = weights[:, None, None] * deltas
    return elected(weighted) if isinstance(method, merging.TIES) else weighted.sum(0)


FIXED = [merging.Linear(), merging.Magnitude(DENSITY), merging.TIES(DENSITY)]
named = pytest.mark.parametrize("layout", LAYOUTS)
methods = pytest.mark.parametrize("method", FIXED, ids=lambda method: type(method).__name__)


@named
@methods
def test_law_combine_agrees_with_equations(layout: str, method: merging.MergeMethod) -> None:
    adapters = three(layout)
    combined = merging.combine_adapters(adapters, WEIGHTS, method=method)
    want = np.stack([reference(method, deltas, WEIGHTS) for deltas in changes(adapters)])
    np.testing.assert_allclose(change(combined.adapter["w"]), want, **CLOSE)
    assert combined.energy["w"] == 1


@named
def test_combine_linear_adds_ranks(layout: str) -> None:
    leaf = merging.combine_adapters(three(layout)).adapter["w"]
    assert (type(leaf), leaf.rank, leaf.scale) == (LoRALeaf, 6, 1)
    leaf = merging.combine_adapters(three(layout), method=merging.TIES(DENSITY)).adapter["w"]
    assert type(leaf) is FullDeltaLeaf


def test_combine_linear_has_no_cross_terms() -> None:
    """PEFT's "linear" is the product of summed factors."""
    one, two = lora("plain", 1, alpha=2.0), lora("plain", 2, alpha=2.0)
    got = change(merging.combine_adapters([{"w": one}, {"w": two}], [0.5, 0.25]).adapter["w"])
    right = 0.5 * change(one) + 0.25 * change(two)
    a, b = (np.sqrt(0.5) * x + np.sqrt(0.25) * y for x, y in ((one.a, two.a), (one.b, two.b)))
    np.testing.assert_allclose(got, right, **CLOSE)
    assert np.linalg.norm(a @ b - right) > 0.5 * np.linalg.norm(right)


@pytest.mark.parametrize("stabilized", [False, True])
def test_combine_rank_applies_scale_once(stabilized: bool) -> None:
    """PEFT's "svd" multiplies by alpha / rank twice, and by more for sources of rsLoRA."""
    adapters = [{"w": lora("plain", seed, alpha=8.0, use_rslora=stabilized)} for seed in (1, 2)]
    got = merging.combine_adapters(adapters, [1.0, 0.5], rank=4)
    want = np.tensordot([1.0, 0.5], changes(adapters)[0], 1)
    np.testing.assert_allclose(change(got.adapter["w"])[0], want, **CLOSE)


@pytest.mark.parametrize("layout", ["stacked", "experts_in_the_middle"])
@methods
def test_law_combine_stack_equals_single_layers(layout: str, method: merging.MergeMethod) -> None:
    shape, axes = LAYOUTS[layout]
    whole = change(merging.combine_adapters(three(layout), WEIGHTS, method=method).adapter["w"])
    rest = [axis for axis in range(len(shape)) if axis not in axes.batch]
    places = {axis: place for place, axis in enumerate(rest)}
    apart = WeightAxes((), *(tuple(places[a] for a in g) for g in axes[1:]))
    for number in range(shape[axes.batch[0]]):
        layers = [
            {
                "w": dataclasses.replace(
                    leaf,
                    a=leaf.a[number],
                    b=leaf.b[number],
                    shape=tuple(shape[axis] for axis in rest),
                    axes=apart,
                )
            }
            for leaf in (adapter["w"] for adapter in three(layout))
        ]
        layer = change(merging.combine_adapters(layers, WEIGHTS, method=method).adapter["w"])
        np.testing.assert_allclose(layer[0], whole[number], **CLOSE)


def test_ties_zero_sum_is_positive() -> None:
    weighted = np.array([[[1.0, -3.0, 0.0, 0.0]], [[-1.0, 0.0, 0.0, 2.0]]])
    got = merging.TIES(1.0).combine(jnp.asarray(weighted), jnp.ones(2))
    np.testing.assert_array_equal(got, [[1.0, -3.0, 0.0, 2.0]])


def test_ties_keeps_at_least_one_entry() -> None:
    got = change(
        merging.combine_adapters([{"w": lora("plain", 1)}], method=merging.TIES(0.01)).adapter["w"]
    )
    assert np.count_nonzero(got) == 1
    assert np.abs(got).max() == pytest.approx(np.abs(change(lora("plain", 1))).max(), rel=1e-6)


# --- random methods ------------------------------------------------------------------------------

DRAWN = [
    merging.DARE(DENSITY),
    merging.DARE(DENSITY, elect_signs=True),
    merging.DELLA(DENSITY, 0.3),
    merging.DELLA(DENSITY, 0.3, elect_signs=False),
]
drawn = pytest.mark.parametrize("method", DRAWN, ids=repr)


def kept_chances(method: Any, delta: np.ndarray) -> np.ndarray:
    if isinstance(method, merging.DELLA):
        return keep_chances(delta, method.density, method.epsilon)
    return np.full(delta.shape, method.density)


@drawn
def test_law_random_methods_agree_with_equations(method: Any) -> None:
    deltas = changes(three("plain"))[0]
    keys = jax.random.split(jax.random.key(3), 3)
    pruned = []
    for delta, key in zip(deltas, keys, strict=True):
        found = np.asarray(method.prune(jnp.float32(delta), key), np.float64)
        want = np.where(found != 0, delta / kept_chances(method, delta), 0)
        assert 0 < np.count_nonzero(found) < found.size
        np.testing.assert_allclose(found, want, **CLOSE)
        pruned.append(want)
    weighted = WEIGHTS[:, None, None] * np.stack(pruned)
    want = elected(weighted) if method.elect_signs else weighted.sum(0)
    got = method.combine(jnp.float32(deltas), jnp.float32(WEIGHTS), keys)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)  # Divided by 0.1 at the least.


@drawn
def test_prune_random_probability_and_mean(method: Any) -> None:
    delta, draws = change(lora("plain", 1))[0], 4000
    keys = jax.random.split(jax.random.key(0), draws)
    prune = jax.jit(jax.vmap(lambda key: method.prune(jnp.float32(delta), key)))
    found = np.asarray(prune(keys), np.float64)
    chance = kept_chances(method, delta)
    # Five standard deviations of a mean of so many draws; 60 entries are looked at.
    deviation = np.sqrt(chance * (1 - chance) / draws)
    assert (np.abs((found != 0).mean(0) - chance) < 5 * deviation).all()
    assert (np.abs(found.mean(0) - delta) < 5 * np.abs(delta) / chance * deviation).all()


def test_combine_random_draws_are_independent() -> None:
    leaf = lora("stacked", 1)
    same = dataclasses.replace(
        leaf, a=np.tile(leaf.a[:1], (4, 1, 1)), b=np.tile(leaf.b[:1], (4, 1, 1))
    )
    adapter = {"one": same, "two": same}
    key = jax.random.key(0)

    def masks(key: jax.Array, *weights: float) -> list[np.ndarray]:
        adapters = [adapter] * len(weights)
        made = merging.combine_adapters(
            adapters, weights, method=merging.DARE(0.5), key=key
        ).adapter
        return [matrix != 0 for path in adapter for matrix in change(made[path])]

    alone, second = masks(key, 1.0, 0.0), masks(key, 0.0, 1.0)
    every = [mask.tobytes() for mask in (*alone, *second)]
    assert len(set(every)) == len(every) == 16
    assert [mask.tobytes() for mask in masks(key, 1.0, 0.0)] == every[:8]
    assert [mask.tobytes() for mask in masks(jax.random.key(1), 1.0, 0.0)] != every[:8]
    # An adapter's draws do not depend on whether earlier adapters have the weight.
    pair = [{"one": same}, {"two": same}]
    apart = merging.combine_adapters(pair, method=merging.DARE(0.5), key=key).adapter
    np.testing.assert_array_equal(change(apart["two"]) != 0, np.stack(second[4:]))
    # Neither another weight nor a raw uint32 key changes the draws.
    less = merging.combine_adapters(
        [{"two": same}], method=merging.DARE(0.5), key=jax.random.PRNGKey(0)
    )
    np.testing.assert_array_equal(change(less.adapter["two"]) != 0, np.stack(alone[4:]))


# --- lower ranks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "layout", "rank"),
    [
        *((merging.Linear(), layout, 2) for layout in LAYOUTS),
        *((merging.Linear(), "stacked", rank) for rank in (1, 20)),
        *((merging.TIES(DENSITY), "stacked", rank) for rank in (1, 2, 20)),
        *(pytest.param(merging.TIES(DENSITY), name, 2, marks=pytest.mark.slow) for name in LAYOUTS),
    ],
    ids=repr,
)
def test_law_combine_rank_is_truncated_svd(
    method: merging.MergeMethod, layout: str, rank: int
) -> None:
    adapters = three(layout)
    combined = merging.combine_adapters(adapters, WEIGHTS, method=method, rank=rank)
    want = np.stack([reference(method, deltas, WEIGHTS) for deltas in changes(adapters)])
    u, s, vt = np.linalg.svd(want, full_matrices=False)
    nearest = u[..., :rank] * s[..., None, :rank] @ vt[..., :rank, :]
    leaf = combined.adapter["w"]
    assert leaf.rank == min(rank, s.shape[-1])
    np.testing.assert_allclose(change(leaf), nearest, rtol=1e-4, atol=1e-4)  # Values close by.
    share = (s[..., :rank] ** 2).sum() / (s**2).sum()
    assert float(combined.energy["w"]) == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize("method", [merging.Linear(), merging.TIES(DENSITY)], ids=repr)
@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99])
def test_combine_energy_is_lowest_sufficient_rank(
    method: merging.MergeMethod, energy: float
) -> None:
    adapters = three("stacked")
    combined = merging.combine_adapters(adapters, WEIGHTS, method=method, energy=energy)
    want = np.stack([reference(method, deltas, WEIGHTS) for deltas in changes(adapters)])
    squares = (np.linalg.svd(want, compute_uv=False) ** 2).sum(0)
    shares = np.cumsum(squares) / squares.sum()
    least = 1 + int(np.flatnonzero(shares >= energy)[0])
    assert combined.adapter["w"].rank == least
    assert float(combined.energy["w"]) == pytest.approx(shares[least - 1], abs=1e-5)
    assert float(combined.energy["w"]) >= energy


def test_combine_energy_one_ignores_rounding() -> None:
    one = lora("heads_out", 1)
    combined = merging.combine_adapters([{"w": one}, {"w": one}], energy=1)
    assert combined.adapter["w"].rank == 2
    dense = merging.combine_adapters([{"w": one}], method=merging.TIES(1.0), energy=1.0)
    assert dense.adapter["w"].rank == 2
    nothing = merging.combine_adapters([{"w": dataclasses.replace(one, b=0 * one.b)}], energy=0.5)
    assert (nothing.adapter["w"].rank, nothing.energy["w"]) == (1, 1)


def test_combine_rank_materializes_no_delta() -> None:
    leaves = [lora("plain", seed, rank=4) for seed in (1, 2)]
    large = [
        dataclasses.replace(leaf, a=jnp.ones((300, 4)), b=jnp.ones((4, 200)), shape=(300, 200))
        for leaf in leaves
    ]

    def made(weights: Any, method: merging.MergeMethod) -> Any:
        adapters = [{"w": leaf} for leaf in large]
        return merging.combine_adapters(adapters, weights, method=method, rank=3)

    thin = str(jax.make_jaxpr(lambda w: made(w, merging.Linear()))(jnp.ones(2)))
    assert "300,8" in thin
    assert "300,200" not in thin
    assert "200,300" not in thin
    dense = str(jax.make_jaxpr(lambda w: made(w, merging.TIES(0.5)))(jnp.ones(2)))
    assert "300,200" in dense


# --- families ------------------------------------------------------------------------------------

MERGED = [name for name, family in FAMILIES.items() if family.merges and name != "token_rows"]
QUICK = ("lora", "dora", "hira", "ia3", "full")


quick = pytest.mark.parametrize(
    "family", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MERGED]
)


@quick
def test_law_combine_families_add_deltas(family: str) -> None:
    one = case("experts", "float32", family)
    adapters = [one.adapter, moved(one.fresh, 5)]

    def changed(adapter: Any) -> np.ndarray:
        merged = jlora.merge(one.params, adapter)["w"]
        return np.asarray(merged, np.float64) - np.asarray(one.params["w"], np.float64)

    want = 0.5 * changed(adapters[0]) - 2 * changed(adapters[1])
    for options in ({}, {"rank": 5}):  # That of a (6, 5) matrix.
        made = merging.combine_adapters(adapters, [0.5, -2.0], params=one.params, **options)
        # Differences of sums with weights of one, in float32.
        np.testing.assert_allclose(changed(made.adapter), want, rtol=1e-4, atol=1e-5)
        assert all(type(leaf) in (LoRALeaf, FullDeltaLeaf) for leaf in made.adapter.values())


def test_combine_trainable_tokens_adds_up() -> None:
    lookup = jlora.lora_transform(
        lambda p, x: p["w"][x], {"w": jlora.TrainableTokens(token_indices=(5, 1))}
    )
    params = {"w": jnp.ones((9, 4))}
    fresh = lookup.init(jax.random.key(0), params, jnp.arange(3))
    adapters = [moved(fresh, 1), moved(fresh, 2)]
    made = merging.combine_adapters(adapters, [0.5, 2.0]).adapter
    want = np.zeros((9, 4))
    for weight, adapter in zip((0.5, 2.0), adapters, strict=True):
        want[[5, 1]] += weight * np.asarray(adapter["w"].delta, np.float64)
    np.testing.assert_allclose(change(made["w"])[0], want, **CLOSE)


@quick
def test_combine_params_required_by_family(family: str) -> None:
    one = case("experts", "float32", family)
    needs = family in ("dora", "dora_through_norm", "hira", "ia3", "ia3_inputs")
    assert depends_on_base(one.adapter, "w") == needs
    if needs:
        with pytest.raises(
            ValueError, match=r"params=None: the update of 'w' .*\(family '.*\)\. Pass params"
        ):
            merging.combine_adapters([one.adapter])
    else:
        assert merging.combine_adapters([one.adapter]).adapter


def test_combine_adapters_of_different_paths() -> None:
    one = {"w": lora("plain", 1), "only": lora("stacked", 4)}
    two = {"new": lora("heads_in", 5), "w": lora("plain", 2)}
    for method in FIXED:
        made = merging.combine_adapters([one, two], [2.0, -1.0], method=method).adapter
        assert list(made) == ["w", "only", "new"]
        for path, leaf, weight in (("only", one["only"], 2.0), ("new", two["new"], -1.0)):
            want = [reference(method, m[None], np.array([weight])) for m in change(leaf)]
            np.testing.assert_allclose(change(made[path]), want, **CLOSE)


def test_combine_biases_stay_exact() -> None:
    full = FullDeltaLeaf(delta=jnp.arange(5.0), shape=(5,), axes=bias(1).axes)
    adapters = [{"b": bias(1), "mixed": bias(2)}, {"b": bias(3), "mixed": full}]
    for options in ({}, {"rank": 1}, {"energy": 0.5}):
        made = merging.combine_adapters(adapters, [0.5, -2.0], **options)
        assert (type(made.adapter["b"]), type(made.adapter["mixed"])) == (BitFitLeaf, FullDeltaLeaf)
        for path in ("b", "mixed"):
            one, two = (np.asarray(adapter[path].delta, np.float64) for adapter in adapters)
            np.testing.assert_allclose(made.adapter[path].delta, 0.5 * one - 2 * two, **CLOSE)
            assert made.energy[path] == 1
    for method in (merging.TIES(0.4), merging.DELLA(0.5, 0.3), merging.DARE(0.5)):
        found = merging.combine_adapters(adapters, method=method, key=jax.random.key(0)).adapter
        assert found["b"].delta.shape == (5,)
    trimmed_bias = merging.combine_adapters(
        [{"b": bias(1)}], method=merging.Magnitude(0.4)
    ).adapter["b"]
    want = trimmed(np.asarray(bias(1).delta, np.float64), 0.4)
    np.testing.assert_allclose(trimmed_bias.delta, want, **CLOSE)


# --- task arithmetic -----------------------------------------------------------------------------


def test_analogy_and_negation_are_weights() -> None:
    a, b, c = three("heads_in")
    (one, two, three_) = (change(adapter["w"]) for adapter in (a, b, c))
    np.testing.assert_allclose(
        change(merging.combine_adapters([a], [-1]).adapter["w"]), -one, **CLOSE
    )
    got = change(merging.analogy(a, b, c).adapter["w"])
    np.testing.assert_allclose(got, three_ + two - one, **CLOSE)


# --- composing -----------------------------------------------------------------------------------

EVERY = [*FIXED, merging.DARE(DENSITY), merging.DELLA(DENSITY, 0.3)]


@pytest.mark.parametrize(
    ("method", "rank"),
    [
        *((EVERY[number], None) for number in (0, 2, 4)),
        (EVERY[2], 2),
        *(
            pytest.param(EVERY[number], rank, marks=pytest.mark.slow)
            for number, rank in ((1, None), (3, None), (0, 2), (3, 2), (4, 2))
        ),
    ],
    ids=repr,
)
def test_law_combine_under_jit_and_vmap(method: merging.MergeMethod, rank: int | None) -> None:
    adapters, key = three("stacked"), jax.random.key(0)
    traces = []

    def made(adapters: Any, weights: Any) -> Any:
        traces.append(1)
        combined = merging.combine_adapters(adapters, weights, method=method, rank=rank, key=key)
        return combined.adapter["w"], combined.energy["w"]

    several = np.stack([WEIGHTS, WEIGHTS[::-1], np.array([0.0, 1.0, -1.0])]).astype(np.float32)
    want = [
        merging.combine_adapters(adapters, w, method=method, rank=rank, key=key) for w in several
    ]
    jitted = jax.jit(made)
    over_weights = jax.jit(jax.vmap(made, in_axes=(None, 0)))(adapters, several)
    for number, one in enumerate(want):
        leaf, kept = jitted(adapters, several[number])
        row, row_kept = jax.tree.map(lambda x, number=number: x[number], over_weights)
        for found, share in ((leaf, kept), (row, row_kept)):
            np.testing.assert_allclose(
                change(found), change(one.adapter["w"]), rtol=1e-4, atol=1e-4
            )
            assert float(share) == pytest.approx(float(one.energy["w"]), abs=1e-5)
    assert len(traces) == 2, "a second call traces nothing anew"


@methods
def test_law_combine_vmap_over_adapters(method: merging.MergeMethod) -> None:
    pairs = [[{"w": lora("heads_in", seed)}, {"w": lora("heads_in", seed + 9)}] for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *pairs)
    got = jax.jit(jax.vmap(lambda pair: merging.combine_adapters(pair, method=method).adapter))(
        stacked
    )
    for number, pair in enumerate(pairs):
        row = jax.tree.map(lambda x, number=number: x[number], got)
        want = change(merging.combine_adapters(pair, method=method).adapter["w"])
        np.testing.assert_allclose(change(row["w"]), want, **CLOSE)


def test_combine_weights_have_gradients() -> None:
    adapters = three("plain")

    def loss(weights: jax.Array) -> jax.Array:
        leaf = merging.combine_adapters(adapters, weights).adapter["w"]
        return (leaf.a @ leaf.b).sum()

    want = changes(adapters)[0].sum((1, 2))
    np.testing.assert_allclose(jax.grad(loss)(jnp.ones(3)), want, rtol=1e-4)  # Sums of 30.


def test_combine_apply_equals_merged_base() -> None:
    one = case("experts", "float32")
    adapters = [one.adapter, moved(one.fresh, 5)]
    for options in ({}, {"method": merging.TIES(0.5)}, {"rank": 1}):
        made = merging.combine_adapters(adapters, [1.0, -0.5], **options).adapter
        want = one.fn(jlora.merge(one.params, made), *one.inputs)
        got = one.lora.apply(one.params, made, *one.inputs)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# --- errors --------------------------------------------------------------------------------------


def spoilt(field: str, value: float) -> Any:
    leaf = lora("plain", 1)
    array = np.array(getattr(leaf, field))
    array[0, 0] = value
    return {"w": dataclasses.replace(leaf, **{field: array})}


GOOD = {"w": lora("plain", 1)}


@pytest.mark.parametrize(
    ("adapters", "options", "error", "message"),
    [
        ([], {}, ValueError, "adapters=\\[\\] must have at least one"),
        (GOOD, {}, TypeError, "must be a list of adapters, got dict"),
        ([GOOD, 3], {}, TypeError, "not what init returns"),
        ([GOOD], {"weights": [1, 2]}, ValueError, r"must have shape \(1,\), .*got shape \(2,\)"),
        ([GOOD], {"weights": 1.0}, ValueError, r"got shape \(\)"),
        ([GOOD], {"weights": [np.nan]}, ValueError, "must be finite"),
        ([GOOD], {"weights": [True]}, TypeError, "must be real numbers"),
        ([GOOD], {"weights": [1j]}, TypeError, "must be real numbers"),
        ([GOOD], {"rank": 0}, ValueError, "rank=0"),
        ([GOOD], {"rank": 2.0}, TypeError, "rank=2.0"),
        ([GOOD], {"rank": 2, "energy": 0.5}, ValueError, "rank=2 and energy=0.5"),
        ([GOOD], {"energy": 0}, ValueError, "energy=0 must be a fraction"),
        ([GOOD], {"energy": 1.5}, ValueError, "energy=1.5"),
        ([GOOD], {"energy": float("nan")}, ValueError, "energy=nan"),
        ([GOOD], {"method": "ties"}, TypeError, "method='ties'"),
        ([GOOD], {"method": merging.DARE(0.5)}, ValueError, "requires a key"),
        ([spoilt("a", np.nan)], {}, ValueError, r"adapters\[0\]\['w'\].a has NaN"),
        ([GOOD, spoilt("b", np.inf)], {}, ValueError, r"adapters\[1\]\['w'\].b has NaN"),
        (
            [GOOD, {"w": lora("transposed", 1)}],
            {},
            ValueError,
            "adapters\\[0\\] and adapters\\[1\\]",
        ),
        ([{"w": lora("plain", 1, residual=True)}], {}, ValueError, "jlora.rebase_to_original"),
        (
            [{"w": dataclasses.replace(lora("plain", 1), rank=3)}],
            {},
            ValueError,
            r"'a' of the adapter on 'w' has shape \(6, 2\), expected \(6, 3\)",
        ),
    ],
)
def test_combine_bad_arguments_raise(
    adapters: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        merging.combine_adapters(adapters, **options)


def test_combine_mixture_or_other_base_raises() -> None:
    one = case("matmul", "float32", "mixture")
    with pytest.raises(ValueError, match="mixture of experts on 'w'"):
        merging.combine_adapters([one.adapter])
    dora = case("experts", "float32", "dora")
    with pytest.raises(ValueError, match="params does not"):
        merging.combine_adapters([dora.adapter], params={"v": dora.params["w"]})


def test_combine_energy_under_jit_raises() -> None:
    with pytest.raises(ValueError, match="energy=0.5 sets the rank of 'w'"):
        jax.jit(lambda w: merging.combine_adapters([GOOD], w, energy=0.5).adapter)(jnp.ones(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: merging.TIES(0), "TIES.density=0 must be a fraction"),
        (lambda: merging.Magnitude(1.2), "Magnitude.density=1.2"),
        (lambda: merging.DARE(float("nan")), "DARE.density=nan"),
        (lambda: merging.DARE(True), "DARE.density=True"),
        (lambda: merging.DELLA(0.5, 0.5), "above 0 and at most 1, got 0 to 1"),
        (lambda: merging.DELLA(0.8, 0.3), "got 0.5 to 1.1"),
        (lambda: merging.DELLA(0.5, -0.1), "DELLA.epsilon=-0.1"),
    ],
)
def test_merge_method_bad_options_raise(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_combine_result_table_names_each_weight() -> None:
    made = merging.combine_adapters([{"w": lora("plain", 1), "b": bias(1)}], rank=1)
    lines = str(made).splitlines()
    assert lines[0].split() == ["weight", "rank", "energy"]
    assert lines[1].split()[:2] == ["w", "1"]
    assert lines[2].split() == ["b", "full", "1.0000"]


@pytest.mark.parametrize(
    "method", [merging.TIES(density=1.0), merging.Magnitude(density=1.0), merging.Linear()]
)
def test_combine_nan_under_jit_stays_nan(method: merging.MergeMethod) -> None:
    first, second = three(next(iter(LAYOUTS)))[:2]
    broken = np.array(second["w"].b)
    broken.flat[0] = np.nan
    second = {"w": dataclasses.replace(second["w"], b=broken)}
    made = jax.jit(lambda adapters: merging.combine_adapters(adapters, method=method, rank=2))
    found = made([first, second])
    assert np.isnan(found.energy["w"])
    assert np.isnan(np.asarray(found.adapter["w"].b)).any()
    # Entry by entry, only where it is.
    dense = jax.jit(
        lambda adapters: merging.combine_adapters(adapters, method=merging.TIES(density=1.0))
    )
    delta = np.asarray(dense([first, second]).adapter["w"].delta)
    assert 0 < np.isnan(delta).sum() < delta.size


def test_combine_empty_adapters_raise() -> None:
    with pytest.raises(ValueError, match="All adapters are empty"):
        merging.combine_adapters([{}, {}])
    with pytest.raises(ValueError, match="All adapters are empty"):
        merging.measure_interference({"a": {}, "b": {}})
