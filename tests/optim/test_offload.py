"""An optimizer's state in host memory: the same steps, bit by bit."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _support.cases import case
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jlora

# The package has a function of this name.
offload = importlib.import_module("jlora.optim.offload")

BY_PART = {"kernel": "one", "bias": "other"}


def by_part(one: Any) -> optax.GradientTransformation:
    return optax.multi_transform({"one": one, "other": optax.sgd(1e-2)}, BY_PART)


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: optax.adam(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "sgd": lambda: optax.sgd(1e-2),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_noise(0.1, 0.5, jax.random.key(3)),
        optax.adamw(optax.cosine_decay_schedule(1e-2, 10)),
        optax.ema(0.9),
    ),
    "multi_transform": lambda: by_part(optax.adam(1e-2)),
    "masked": lambda: optax.masked(optax.adam(1e-2), {"kernel": True, "bias": False}),
}
# The wrapper inside others, which have state of their own.
INSIDE = {
    "multi_transform": lambda: by_part(jlora.offload(optax.adam(1e-2))),
    "masked": lambda: optax.masked(
        jlora.offload(optax.adam(1e-2)), {"kernel": True, "bias": False}
    ),
}


def mesh() -> Mesh:
    devices = np.array(jax.devices()[:8]).reshape(2, 4)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def parameters(places: Mesh | None = None) -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    made = {"kernel": rng.normal(size=(8, 5)), "bias": rng.normal(size=5)}
    if places is None:
        return {name: jnp.asarray(array, jnp.float32) for name, array in made.items()}
    specs = {"kernel": PartitionSpec("fsdp"), "bias": PartitionSpec()}
    return {
        name: jax.device_put(np.float32(array), NamedSharding(places, specs[name]))
        for name, array in made.items()
    }


def loss(params: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.tanh(x @ params["kernel"] + params["bias"]) ** 2)


def step(optimizer: Any, params: Any, state: Any, x: jax.Array) -> Any:
    updates, state = optimizer.update(jax.grad(loss)(params, x), state, params)
    return optax.apply_updates(params, updates), state


def stepped(optimizer: Any, params: Any, steps: int = 4) -> tuple[Any, Any, Any]:
    """Returns parameters, state, and the jitted step."""
    params, state = jax.tree.map(jnp.copy, params), optimizer.init(params)
    if "pinned_host" not in kinds(state):  # Counts go to all of the mesh's devices.
        state = offload.to_device(offload.to_host(state))
    places = jax.tree.map(lambda array: array.sharding, (params, state))
    run = jax.jit(functools.partial(step, optimizer), donate_argnums=(0, 1), out_shardings=places)
    x = np.random.default_rng(2).normal(size=(3, 8)).astype(np.float32)
    for number in range(steps):
        params, state = run(params, state, x + number)
    return params, state, run


def kinds(tree: Any) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def same_bits(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert not offload._find_differing_leaves(one, other)


# --- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sharded", [False, True], ids=["alone", "mesh"])
@pytest.mark.thin(3)
def test_offload_is_bit_identical(name: str, sharded: bool) -> None:
    params = parameters(mesh() if sharded else None)
    expected = stepped(OPTIMIZERS[name](), params)[:2]
    found = stepped(jlora.offload(OPTIMIZERS[name]()), params)[:2]
    same_bits(found, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sharded", [False, True], ids=["alone", "mesh"])
def test_offload_state_is_on_host_between_steps(name: str, sharded: bool) -> None:
    params = parameters(mesh() if sharded else None)
    optimizer = jlora.offload(OPTIMIZERS[name]())
    assert kinds(optimizer.init(params)) <= {"pinned_host"}
    after, state, _ = stepped(optimizer, params)
    assert kinds(state) <= {"pinned_host"}
    assert kinds(after) == {"device"}


@pytest.mark.parametrize("name", INSIDE)
def test_offload_nested_moves_only_its_state(name: str) -> None:
    params = parameters()
    expected, _, _ = stepped(OPTIMIZERS[name](), params)
    found, state, _ = stepped(INSIDE[name](), params)
    same_bits(found, expected)
    assert kinds(state) == {"pinned_host"}
    both = optax.chain(optax.trace(0.9), INSIDE[name]())
    assert kinds(stepped(both, params)[1]) == {"device", "pinned_host"}


def test_offload_second_step_uses_cache() -> None:
    place = NamedSharding(mesh(), PartitionSpec())
    params = jax.device_put(parameters(), place)
    optimizer = jlora.offload(optax.adam(1e-2))
    _, _, run = stepped(optimizer, params, steps=1)
    assert run._cache_size() == 1
    _, _, run = stepped(optimizer, params)
    assert run._cache_size() == 1


def test_offload_init_keeps_shardings() -> None:
    params = parameters(mesh())
    state = jlora.offload(optax.adam(1e-2)).init(params)
    split = NamedSharding(mesh(), PartitionSpec("fsdp"), memory_kind="pinned_host")
    assert state[0].mu["kernel"].sharding == split
    assert len(state[0].count.sharding.device_set) == 8
    places = jlora.host_shardings(jax.tree.map(lambda array: array.sharding, params))
    assert places["kernel"] == split


def test_offload_donated_state_is_deleted() -> None:
    optimizer = jlora.offload(optax.adam(1e-2))
    params = parameters()
    state = optimizer.init(params)
    run = jax.jit(functools.partial(step, optimizer), donate_argnums=(0, 1))
    run(jax.tree.map(jnp.copy, params), state, jnp.ones((3, 8)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_offload_inside_scan_is_bit_identical() -> None:
    x = jax.device_put(np.random.default_rng(2).normal(size=(4, 3, 8)).astype(np.float32))
    params = parameters()

    def many(optimizer: Any, params: Any, state: Any) -> Any:
        def one(carry: Any, x: jax.Array) -> Any:
            return step(optimizer, *carry, x), None

        return lax.scan(one, (params, state), x)[0]

    ends = []
    for optimizer in (optax.adam(1e-2), jlora.offload(optax.adam(1e-2))):
        ends.append(jax.jit(functools.partial(many, optimizer))(params, optimizer.init(params)))
    same_bits(ends[1], ends[0])
    assert kinds(ends[1][1]) == {"pinned_host"}


def test_offload_lora_optimizer_state_is_on_host() -> None:
    one = case("attention", "float32")
    optimizer = jlora.offload(jlora.lora_optimizer(optax.adam(1e-2), lr_multipliers={"b": 16}))
    state = optimizer.init(one.fresh)
    jlora.check_offload(jlora.lora_optimizer(optax.adam(1e-2)), one.fresh, state_of(one.fresh))
    gradient = jax.tree.map(jnp.ones_like, one.fresh)
    _, after = jax.jit(optimizer.update)(gradient, state, one.fresh)
    assert kinds(after) == {"pinned_host"}


def state_of(params: Any) -> Any:
    return jlora.lora_optimizer(optax.adam(1e-2)).init(params)


def test_offload_passes_extra_args() -> None:
    def update(updates: Any, state: Any, params: Any = None, *, factor: float) -> Any:
        return jax.tree.map(lambda u: factor * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)  # type: ignore
    optimizer = jlora.offload(inner)
    updates, _ = optimizer.update(jnp.ones(3), optimizer.init(jnp.ones(3)), factor=2.0)
    np.testing.assert_array_equal(updates, 2 * np.ones(3))


# --- the self-test --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.thin(5)
def test_check_offload_correct_passes(name: str, passes: int) -> None:
    params = parameters(mesh())
    transform = OPTIMIZERS[name]()
    state = jlora.offload(transform).init(params)
    jlora.check_offload(transform, params, state, accumulation_steps=passes)


def test_check_offload_empty_passes() -> None:
    transform = optax.adam(1e-2)
    jlora.check_offload(
        transform, {}, jax.device_put(transform.init({}), NamedSharding(mesh(), PartitionSpec()))
    )


def test_check_offload_abstract_long_axes_are_cut() -> None:
    place = NamedSharding(mesh(), PartitionSpec("fsdp"))
    params = {"kernel": jax.ShapeDtypeStruct((1 << 40, 3), jnp.bfloat16, sharding=place)}
    transform = optax.adafactor(1e-2, min_dim_size_to_factor=2)
    state = jax.eval_shape(transform.init, params)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole_or_split(x, place)), state
    )
    jlora.check_offload(transform, params, state)
    assert offload._shrink_params(params)["kernel"].shape == (64, 3)


def whole_or_split(shape: Any, place: NamedSharding) -> NamedSharding:
    split = bool(shape.shape) and shape.shape[0] > 1
    return place if split else NamedSharding(place.mesh, PartitionSpec())


def last_bit(x: jax.Array) -> jax.Array:
    """Replaces the first entry of an array by the next float."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or not x.ndim:
        return x
    return jnp.where(jnp.arange(x.size).reshape(x.shape) == 0, jnp.nextafter(x, jnp.inf), x)


def stale(tree: Any) -> Any:
    """Returns zeros, as a missing transfer would send."""
    return jax.tree.map(jnp.zeros_like, tree)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize(
    ("fetch", "store"),
    [
        (lambda s: jax.tree.map(last_bit, offload.to_device(s)), offload.to_host),
        (offload.to_device, lambda s: offload.to_host(jax.tree.map(last_bit, s))),
        (lambda s: stale(offload.to_device(s)), offload.to_host),
        (offload.to_device, lambda s: offload.to_host(stale(s))),
    ],
    ids=["a bit in", "a bit out", "nothing in", "nothing out"],
)
def test_check_offload_broken_transfer_raises(fetch: Any, store: Any, passes: int) -> None:
    params = parameters(mesh())
    transform = optax.adam(1e-2)
    broken = offload._wrap_with_transfers(transform, fetch, store)
    with pytest.raises(RuntimeError, match=r"wrong values .*arrays differ.*offload=false"):
        jlora.check_offload(
            transform,
            params,
            jlora.offload(transform).init(params),
            accumulation_steps=passes,
            offloaded_transform=broken,
        )


def test_check_offload_wrong_scan_gradient_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a program with transfers that loses the last pass of its scan."""
    params = parameters()
    whole, calls = offload._self_test_grads, []

    def losing(params: Any, rows: jax.Array) -> Any:
        calls.append(len(rows))
        return whole(params, rows if len(calls) == 1 else rows[:-1])

    monkeypatch.setattr(offload, "_self_test_grads", losing)
    transform = optax.adam(1e-2)
    state = transform.init(params)
    with pytest.raises(RuntimeError, match="wrong values"):
        jlora.check_offload(transform, params, state, accumulation_steps=3)
    assert calls == [3, 3]


# --- without host memory --------------------------------------------------------------------------


class NoHost:
    """A device of a platform without pinned host memory."""

    process_index = 0

    def addressable_memories(self) -> list[Any]:
        return []

    def __str__(self) -> str:
        return "toaster:0"


def test_check_host_memory_missing_raises() -> None:
    offload.check_host_memory(jax.devices())
    with pytest.raises(ValueError, match=r"toaster:0 has .*'pinned_host'.*offload=false"):
        offload.check_host_memory([NoHost()])


def test_offload_without_host_memory_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "HOST_MEMORY_KIND", "punched_cards")
    with pytest.raises(ValueError, match="has memories of the kinds .*'punched_cards'"):
        jlora.offload(optax.adam(1e-2)).init(parameters())
    state = optax.adam(1e-2).init(parameters())
    with pytest.raises(ValueError, match="'punched_cards' is not among them"):
        jlora.check_offload(optax.adam(1e-2), parameters(), state)
