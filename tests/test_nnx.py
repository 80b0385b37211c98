"""NNX modules as pure functions that share nothing with the module."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import moved
from _support.layer_zoo import normal
from flax import linen as nn
from flax import nnx

import jlora

CONFIG = jlora.LoRA(rank=2, alpha=4)
X = normal(1, (3, 6), np.float32)


class Trained(nnx.Module):
    """Batch statistics and random counts, which every call in training mode updates."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.drop(self.norm(x)))


class Normalized(nnx.Module):
    """A layer that writes its normalized kernel into the module."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.WeightNorm(nnx.Linear(6, 5, rngs=rngs), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x)


class Stack(nnx.Module):
    """Layers with dropout in one scan, whose random streams have an axis of layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs: nnx.Rngs) -> nnx.Sequential:
            return nnx.Sequential(nnx.Linear(6, 6, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))

        self.layers = create(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x: jax.Array, layer: nnx.Sequential) -> jax.Array:
            return layer(x)

        return forward(x, self.layers)


class Counted(nnx.Module):
    """A layer that counts its calls."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(6, 5, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        return self.layer(x)


class WithRngs(nnx.Module):
    """A method that takes its random numbers as an argument."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer, self.drop = nnx.Linear(6, 40, rngs=rngs), nnx.Dropout(0.5)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        return self.drop(self.layer(x), rngs=rngs)


MODULES = [Trained, Normalized, Stack, Counted]


def values(tree: Any) -> list[np.ndarray]:
    """Copies of all values of a module or of its variables."""
    state = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    leaves = jax.tree.leaves(state)
    return [np.array(jax.random.key_data(leaf) if is_key(leaf) else leaf) for leaf in leaves]


# --- what is handed out is the caller's own ------------------------------------------------------


@pytest.mark.filterwarnings("ignore:(The .* is in training mode|A call updated)")
@pytest.mark.parametrize("build", MODULES)
def test_fn_changes_neither_params_nor_module(build: Callable[..., nnx.Module]) -> None:
    module = build(nnx.Rngs(params=0, dropout=1))
    fn, params = jlora.from_nnx(module)
    before = values(params)
    first = fn(params, X)
    chex.assert_trees_all_equal(fn(params, X), first)
    chex.assert_trees_all_equal(values(params), before)
    chex.assert_trees_all_equal(values(module), before)
    # As a constant of a compiled function and of a gradient.
    chex.assert_trees_all_close(jax.jit(lambda x: fn(params, x))(X), first, rtol=1e-5, atol=1e-6)
    assert jax.grad(lambda x: fn(params, x).sum())(X).shape == X.shape
    # The module itself, called once, gives the same.
    chex.assert_trees_all_close(module(X), first, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:(The .* is in training mode|A call updated|update_nnx leaves)")
@pytest.mark.parametrize("build", MODULES)
def test_module_and_params_are_apart(build: Callable[..., nnx.Module]) -> None:
    module = build(nnx.Rngs(params=0, dropout=1))
    fn, params = jlora.from_nnx(module)
    before, first = values(params), fn(params, X)
    module(X)
    jlora.update_nnx(module, jax.tree.map(jnp.zeros_like, jlora.from_nnx(module)[1]))
    chex.assert_trees_all_equal(values(params), before)
    chex.assert_trees_all_equal(fn(params, X), first)


def test_numpy_variables_are_copied() -> None:
    module = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    module.kernel = nnx.Param(np.ones((6, 5), np.float32))
    _, params = jlora.from_nnx(module)
    module.kernel.get_value()[...] = 7
    np.testing.assert_array_equal(jax.tree.leaves(params["kernel"])[0], 1)


def test_weights_are_in_memory_once() -> None:
    module = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    fn, params = jlora.from_nnx(module)
    shared = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(params)]
    assert shared == [array.unsafe_buffer_pointer() for array in jax.tree.leaves(nnx.state(module))]
    # A donated copy leaves the module as it was.
    expected = np.asarray(module(X))
    double = jax.jit(lambda params: jax.tree.map(lambda w: 2 * w, params), donate_argnums=0)
    double(jax.tree.map(jnp.copy, params))
    np.testing.assert_array_equal(module(X), expected)
    np.testing.assert_array_equal(fn(params, X), expected)


def test_merged_update_is_applied_once() -> None:
    module = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    fn, params = jlora.from_nnx(module)
    lora = jlora.lora_transform(fn, CONFIG)
    adapter = moved(lora.init(jax.random.key(1), params, X))
    before = lora.apply(params, adapter, X)
    jlora.update_nnx(module, lora.merge(params, adapter))
    chex.assert_trees_all_equal(lora.apply(params, adapter, X), before)


# --- randomness and mode -------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Trained, Stack, WithRngs])
@pytest.mark.filterwarnings("ignore:The BatchNorm")
def test_rngs_are_the_random_numbers(build: Callable[..., nnx.Module]) -> None:
    fn, params = jlora.from_nnx(build(nnx.Rngs(params=0, dropout=1)))
    lora = jlora.lora_transform(fn, CONFIG)
    adapter = lora.init(jax.random.key(1), params, X, rngs=jax.random.key(2))
    run = jax.jit(lambda rngs: lora.apply(params, adapter, X, rngs=rngs))
    keys = [jax.random.key(0), {"dropout": jax.random.key(0)}, {"dropout": jax.random.key(1)}]
    outputs = [np.array(run(key)) for key in keys]
    again = [np.array(run(key)) for key in keys]
    chex.assert_trees_all_equal(outputs, again)
    assert not np.array_equal(outputs[1], outputs[2])


def test_rngs_draw_what_flax_draws() -> None:
    module = Trained(nnx.Rngs(params=0, dropout=1))
    module.norm.use_running_average = True
    fn, params = jlora.from_nnx(module)
    outputs = fn(params, X, rngs={"dropout": jax.random.key(5)})
    nnx.reseed(module, dropout=jax.random.key(5))
    chex.assert_trees_all_equal(outputs, module(X))


def test_train_selects_the_mode_of_the_call() -> None:
    module = Trained(nnx.Rngs(params=0, dropout=1))
    fn, params = jlora.from_nnx(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluated = fn(params, X, train=False)
    module.eval()
    chex.assert_trees_all_equal(evaluated, module(X))
    fn, params = jlora.from_nnx(module)
    with pytest.warns(UserWarning, match="BatchNorm 'norm' is in training mode"):
        trained = fn(params, X, train=True, rngs=jax.random.key(0))
    assert not np.array_equal(trained, evaluated)
    chex.assert_trees_all_equal(fn(params, X), evaluated)


class Noisy(nnx.Module):
    """A dropout whose mode is an argument of each method, under one of Flax's names."""

    def __init__(self) -> None:
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=1))

    def train_(self, x: jax.Array, train: bool = True) -> jax.Array:
        return self.drop(x, deterministic=not train)

    def training_(self, x: jax.Array, *, training: bool = True) -> jax.Array:
        return self.drop(x, deterministic=not training)

    def deterministic_(self, x: jax.Array, deterministic: bool = False) -> jax.Array:
        return self.drop(x, deterministic=deterministic)

    def evaluation_(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        return self.drop(x, deterministic=deterministic)


@pytest.mark.parametrize("method", ["train_", "training_", "deterministic_", "evaluation_"])
def test_train_reaches_the_argument_of_a_method(method: str) -> None:
    fn, params = jlora.from_nnx(Noisy(), method=method)
    np.testing.assert_array_equal(fn(params, X, train=False), X)
    dropped = fn(params, X, train=True, rngs=jax.random.key(0))
    assert 0 < (np.asarray(dropped) == 0).mean() < 1


@pytest.mark.filterwarnings("ignore:The BatchNorm")
def test_frozen_randomness_warns_by_name() -> None:
    fn, params = jlora.from_nnx(Trained(nnx.Rngs(params=0, dropout=1)))
    with pytest.warns(UserWarning, match=r"Dropout 'drop' is in training mode.*rngs=key"):
        fn(params, X)


class Randomized(nnx.Module):
    """Random numbers of the user's own, and a dropout whose call sets the mode."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.rngs, self.drop = rngs, nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def noise(self, x: jax.Array) -> jax.Array:
        return x + self.rngs.noise.normal(x.shape)

    def dropped(self, x: jax.Array) -> jax.Array:
        return self.drop(x, deterministic=False)

    @nnx.jit
    def compiled(self, x: jax.Array) -> jax.Array:
        return self.drop(x) + self.rngs.noise.normal(x.shape)

    def scanned(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=2)
        def run(x: jax.Array, module: Randomized) -> jax.Array:
            return module.drop(x)

        return run(x, self)


def warnings_of(fn: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fn(*args, **options)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("method", "owner"),
    [
        ("noise", "Randomized"),
        ("dropped", "Dropout 'drop'"),
        ("compiled", "Randomized"),
        ("scanned", None),
    ],
)
def test_drawn_numbers_warn_by_owner(method: str, owner: str | None, compiled: bool) -> None:
    module = Randomized(nnx.Rngs(noise=0, dropout=1))
    fn, params = jlora.from_nnx(module, method=method)
    run = jax.jit(fn, static_argnames="train") if compiled else fn
    found = warnings_of(run, params, X)
    assert [text.partition(" draws the same numbers")[0] for text in found] == (
        [f"The {owner}"] if owner else []
    )
    assert warnings_of(run, params, X, rngs=jax.random.key(0)) == []
    # A stream that the keys leave out draws the same numbers.
    other = "noise" if "dropped" in method else "dropout"
    found = warnings_of(run, params, X, rngs={other: jax.random.key(0)}, train=False)
    assert len(found) == len([owner] if owner else [])
    assert all("every step." in text for text in found)  # No more of evaluation mode.


class Averaged(nnx.Module):
    """Statistics of the user's own, and a normalization whose call sets the mode."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.mean = nnx.BatchStat(jnp.zeros(6))
        self.cache = nnx.Cache((jnp.zeros(2), jnp.zeros(3)))

    def own(self, x: jax.Array) -> jax.Array:
        self.mean[...] = (self.mean[...] + x.mean(0)) / 2
        return x - self.mean[...]

    def batch(self, x: jax.Array) -> jax.Array:
        return self.norm(x, use_running_average=False)

    @nnx.jit
    def compiled(self, x: jax.Array) -> jax.Array:
        return self.norm(x) - self.mean[...]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("method", "start"),
    [
        ("own", "A call updated the BatchStat 'mean' (1 such variables), and the update is lost"),
        ("batch", "The BatchNorm 'norm' is in training mode: it normalizes by the batch"),
        ("compiled", None),
    ],
)
def test_lost_statistics_warn(method: str, start: str | None, compiled: bool) -> None:
    fn, params = jlora.from_nnx(Averaged(nnx.Rngs(0)), method=method)
    found = warnings_of(jax.jit(fn) if compiled else fn, params, X)
    assert [text[: len(start or "")] for text in found] == ([start] if start else [])


def test_keys_of_a_zero_state_do_not_warn() -> None:
    module = nnx.RNN(nnx.SimpleCell(6, 2, rngs=nnx.Rngs(0)))
    fn, params = jlora.from_nnx(module)
    assert warnings_of(fn, params, X[None]) == []


def test_lost_cache_and_counts_warn_by_name() -> None:
    attention = nnx.MultiHeadAttention(num_heads=2, in_features=6, decode=True, rngs=nnx.Rngs(0))
    attention.init_cache((2, 5, 6))
    fn, params = jlora.from_nnx(attention)
    with pytest.warns(UserWarning, match=r"updated the Cache 'cache.*the update is lost"):
        fn(params, jnp.ones((2, 1, 6)))
    fn, params = jlora.from_nnx(Counted(nnx.Rngs(0)))
    with pytest.warns(UserWarning, match="updated the Variable 'calls'"):
        fn(params, X)


def test_arguments_of_the_method_stay_its_own() -> None:
    class Own(nnx.Module):
        def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs) -> jax.Array:
            return x + train + 0 * rngs.noise.normal(x.shape)

    fn, params = jlora.from_nnx(Own())
    keys = {"noise": jax.random.key(0)}
    np.testing.assert_array_equal(fn(params, X, train=True, rngs=keys), X + 1)


def test_wrong_random_numbers_raise() -> None:
    fn, params = jlora.from_nnx(WithRngs(nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"Rngs.*Pass keys as rngs="):
        fn(params, X, nnx.Rngs(dropout=1))
    fn, params = jlora.from_nnx(Trained(nnx.Rngs(params=0, dropout=1)))
    with pytest.raises(TypeError, match=r"rngs=3 must be a key.*Pass jax.random.key\(seed\)"):
        fn(params, X, rngs=3)
    with pytest.raises(ValueError, match=r"key for 'droput'.*\['dropout'\]"):
        fn(params, X, rngs={"droput": jax.random.key(0)})


# --- transforms of NNX in each other -------------------------------------------------------------


class WrappedLayers(nnx.Module):
    """A scan over layers in another transform, both of which return the layers' variables too."""

    def __init__(self, rngs: nnx.Rngs, wrap: Callable[..., Any]) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(6, 6, rngs=rngs)

        self.layers, self.wrap = create(rngs), wrap

    def __call__(self, x: jax.Array) -> jax.Array:
        block = self.wrap(lambda layer, x: jnp.tanh(layer(x)))

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x: jax.Array, layer: nnx.Linear) -> jax.Array:
            return block(layer, x)

        return forward(x, self.layers)


def in_cond(block: Callable[..., Any]) -> Callable[..., Any]:
    return lambda layer, x: nnx.cond(x.sum() > 0, block, lambda layer, x: x, layer, x)


@pytest.mark.parametrize("wrap", [nnx.remat, nnx.jit, in_cond], ids=["remat", "jit", "cond"])
def test_nested_transforms_stay_factored(wrap: Callable[..., Any]) -> None:
    fn, params = jlora.from_nnx(WrappedLayers(nnx.Rngs(0), wrap))
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=4, dropout=0.1))
    adapter = moved(lora.init(jax.random.key(1), params, X))
    merged = lora.apply(lora.merge(params, adapter), {}, X)
    chex.assert_trees_all_close(lora.apply(params, adapter, X), merged, rtol=1e-5, atol=1e-5)
    # Dropout and a mixture need the weight in products alone.
    key = jax.random.key(2)
    jax.eval_shape(lambda: lora.apply(params, adapter, X, dropout_key=key))
    (row,) = [row for row in lora.explain(params, X).rows if row.path == "layers/kernel"]
    assert row.dense_reasons == ()
    mixture = jlora.lora_transform(fn, jlora.LoRAMoE(num_experts=2, rank=2, alpha=4))
    jax.eval_shape(lambda: mixture.apply(params, mixture.init(key, params, X), X))


# --- conversion ----------------------------------------------------------------------------------


def test_update_nnx_merged_equals_apply() -> None:
    module = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), jnp.tanh)
    fn, params = jlora.from_nnx(module)
    chex.assert_trees_all_equal(fn(params, X), module(X))
    lora = jlora.lora_transform(fn, CONFIG)
    adapter = moved(lora.init(jax.random.key(1), params, X))
    assert set(adapter) == {"layers/0/kernel"}
    expected = lora.apply(params, adapter, X)
    jlora.update_nnx(module, lora.merge(params, adapter))
    chex.assert_trees_all_close(module(X), expected, rtol=1e-5, atol=1e-5)


def test_from_nnx_abstract_module_has_shapes() -> None:
    build = lambda: nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    fn, shapes = jlora.from_nnx(nnx.eval_shape(build))
    lora = jlora.lora_transform(fn, CONFIG)
    x = jax.ShapeDtypeStruct((3, 6), jnp.float32)
    adapter = lora.init(jax.random.key(0), shapes, x)
    assert adapter["kernel"].a.shape == (6, 2)


def test_nnx_invalid_module_or_params_raises() -> None:
    module = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="model.apply"):
        jlora.from_nnx(nn.Dense(3))
    with pytest.raises(ValueError, match="method='encode'"):
        jlora.from_nnx(module, method="encode")
    with pytest.raises(TypeError, match="got State. Call update_nnx"):
        jlora.update_nnx(jlora.from_nnx(module)[1], module)
    _, other = jlora.from_nnx(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    before = np.asarray(module.kernel[...])
    with pytest.raises(ValueError, match=r"'bias'.*\(4,\).*\(5,\)"):
        jlora.update_nnx(module, other)
    np.testing.assert_array_equal(module.kernel[...], before)
    # Not a module of another type without a word.
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), jlora.from_nnx(module)[1])
    with pytest.raises(
        ValueError, match=r"has bfloat16 of shape \(5,\) .* float32 of shape \(5,\)"
    ):
        jlora.update_nnx(module, half)


def test_update_nnx_keeps_the_statistics() -> None:
    module = Trained(nnx.Rngs(params=0, dropout=1))
    _, params = jlora.from_nnx(module)
    module(X)
    mean, count = np.array(module.norm.mean[...]), int(module.drop.rngs.count[...])
    doubled = jax.tree.map(lambda leaf: leaf, params)
    doubled["out"]["kernel"][...] = 2 * module.out.kernel[...]
    with pytest.warns(UserWarning, match=r"leaves 'norm/mean' \(2 statistics or caches\)"):
        jlora.update_nnx(module, doubled)
    np.testing.assert_array_equal(module.norm.mean[...], mean)
    assert mean.any()
    assert int(module.drop.rngs.count[...]) == count == 1
    chex.assert_trees_all_equal(module.out.kernel[...], 2 * params["out"]["kernel"][...])
    module.norm.mean[...] = params["norm"]["mean"][...]
    module.norm.var[...] = params["norm"]["var"][...]
    assert warnings_of(jlora.update_nnx, module, params) == []


def test_from_nnx_other_method_is_called() -> None:
    class Two(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(6, 5, rngs=nnx.Rngs(0))

        def encode(self, x: jax.Array) -> jax.Array:
            return self.linear(x)

    fn, params = jlora.from_nnx(Two(), method="encode")
    assert fn(params, jnp.ones((2, 6))).shape == (2, 5)
