"""An optimizer's state in the host's memory between steps.

Inside a jitted update it is sent to the devices once the gradients are there, and back afterwards,
so that while a model runs forward and back its activations have the room that the state had.

References:
    Dettmers et al., QLoRA, arXiv:2305.14314, section 3, paged optimizers. There pages move when
    the device runs out; here all of the state moves at every step, as the program says.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jlora._tree import PyTree

TransferFn = Callable[[PyTree], PyTree]

HOST_MEMORY_KIND = "pinned_host"

# The self-test: how many steps it makes, and how long the axes of its arrays are at most.
_SELF_TEST_STEPS, _SELF_TEST_MAX_AXIS = 3, 64


def offload(transform: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same transformation, whose state lies in the host's memory between updates.

    It takes a transformation's place alone, in a chain, and in `optax.multi_transform` or
    `optax.masked`, where only its own part of the state moves. Jit a step with parameters and state
    donated, both or neither: of the state alone, JAX 0.10 to 0.12 may give the buffers to the new
    parameters, which ends the process. On a mesh, jit it with `out_shardings` of both; JAX else
    calls the results that are random keys an array of the devices' memory.

    Args:
        transform: Any of optax's, or a chain of them.

    Raises:
        ValueError: From `init` outside of jit: the devices have no such memory.
    """
    return _wrap_with_transfers(transform, to_device, to_host)


def _wrap_with_transfers(
    transform: optax.GradientTransformation, fetch: TransferFn, store: TransferFn
) -> optax.GradientTransformationExtraArgs:
    inner = optax.with_extra_args_support(transform)

    def init(params: PyTree) -> PyTree:
        return to_host(inner.init(params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> Any:
        # Nothing else holds the state back until the gradients are there, and XLA would send it
        # before the forward pass: on a GPU a step then needs more memory than without offload.
        updates, state = lax.optimization_barrier((updates, state))
        updates, state = inner.update(updates, fetch(state), params, **extra)
        return updates, store(state)

    return optax.GradientTransformationExtraArgs(init, update)


def to_host(state: PyTree) -> PyTree:
    """The same arrays in the host's memory, inside of jit and outside.

    Outside, every array keeps its sharding; one that was not given any, such as a count, lies
    whole on all devices of the mesh that the others are on.

    Raises:
        ValueError: Outside of jit: the devices have no such memory.
    """
    held = [leaf for leaf in jax.tree.leaves(state) if _is_concrete(leaf)]
    check_host_memory(device for leaf in held for device in leaf.sharding.device_set)
    meshes = [leaf.sharding.mesh for leaf in held if isinstance(leaf.sharding, NamedSharding)]

    def put(leaf: Any) -> Any:
        if meshes and _is_concrete(leaf) and not leaf.committed:
            return jax.device_put(
                leaf, NamedSharding(meshes[0], PartitionSpec(), memory_kind=HOST_MEMORY_KIND)
            )
        return jax.device_put(leaf, jax.memory.Space.Host)

    return jax.tree.map(put, state)


def to_device(state: PyTree) -> PyTree:
    """The same arrays in the devices' memory, inside of jit and outside."""
    return jax.device_put(state, jax.memory.Space.Device)


def _is_concrete(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)


def host_shardings(shardings: PyTree) -> PyTree:
    """Shardings that split arrays like those of a tree do, in the host's memory."""
    return jax.tree.map(lambda place: place.with_memory_kind(HOST_MEMORY_KIND), shardings)


def check_host_memory(devices: Iterable[Any]) -> None:
    """Checks that arrays of some devices can lie in the host's memory.

    Args:
        devices: May be of a topology that is not here.

    Raises:
        ValueError: They cannot.
    """
    every = set(devices)
    # Only of its own devices does a process know the memories.
    for device in {d for d in every if d.process_index == jax.process_index()} or every:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST_MEMORY_KIND not in kinds:
            raise ValueError(
                f"An optimizer's state cannot lie in the host's memory: {device} has memories of "
                f"the kinds {kinds}, and {HOST_MEMORY_KIND!r} is not among them. Leave the state on the "
                f"devices (optimizer.offload=false in a recipe); split over more of them it takes "
                f"less of each (mesh.fsdp)."
            )


def check_offload(
    transform: optax.GradientTransformation,
    params: PyTree,
    state: PyTree,
    *,
    accumulation_steps: int = 1,
    offloaded_transform: optax.GradientTransformation | None = None,
) -> None:
    """Checks that on these devices an optimizer moves small arrays the same way when offloaded.

    A few steps are made with the state on the devices and with the state in the host's memory,
    and have to end with the same bits. Programs that move arrays between memories are where a
    compiler's faults show up as numbers that are wrong, not as errors; call this before training.

    Args:
        transform: That is offloaded.
        params: What is trained, or shapes with shardings. Long axes are cut short.
        state: Of all of it, or shapes with shardings; those say where it lies.
        accumulation_steps: Over how many batches the step sums up its gradients in a scan; 1 is without one.
        offloaded_transform: `offload(transform)` when left out.

    Raises:
        ValueError: The devices have no such memory.
        RuntimeError: The steps differ.
    """
    places = [leaf.sharding for leaf in jax.tree.leaves(state)]
    check_host_memory(device for place in places for device in place.device_set)
    # Programs with and without transfers are fused alike if there is a border in either.
    plain = _wrap_with_transfers(transform, lax.optimization_barrier, lax.optimization_barrier)
    moved = offload(transform) if offloaded_transform is None else offloaded_transform
    there = _fit_state_shardings(jax.eval_shape(transform.init, _shrink_params(params)), state)
    # Parameters are donated too, so either run has its own.
    expected = _run_self_test(
        plain, transform.init, _shrink_params(params), _device_shardings(there), accumulation_steps
    )
    found = _run_self_test(
        moved, transform.init, _shrink_params(params), host_shardings(there), accumulation_steps
    )
    wrong = _find_differing_leaves(expected, found)
    if wrong:
        raise RuntimeError(
            f"Offloading the optimizer's state gives wrong numbers with jax {jax.__version__} on "
            f"{next(iter(places[0].device_set)).platform}: after {_SELF_TEST_STEPS} steps of a self-test "
            f"{len(wrong)} arrays differ from those of the same steps without it, such as "
            f"{wrong[0]}. Leave the state on the devices (optimizer.offload=false in a recipe), or "
            f"try another release of JAX."
        )


def _shrink_params(params: PyTree) -> PyTree:
    """Arrays like those of a tree, with long axes cut; equal lengths stay equal, and divisible."""
    leaves, treedef = jax.tree.flatten(params)
    parts = max((len(leaf.sharding.device_set) for leaf in leaves), default=1)
    longest = parts * math.ceil(_SELF_TEST_MAX_AXIS / parts)
    rng = np.random.default_rng(0)
    made = []
    for leaf in leaves:
        shape = tuple(min(length, longest) for length in leaf.shape)
        drawn = rng.normal(size=shape).astype(leaf.dtype)
        made.append(jax.make_array_from_callback(shape, leaf.sharding, drawn.__getitem__))
    return jax.tree.unflatten(treedef, made)


def _fit_state_shardings(shapes: PyTree, reference: PyTree) -> PyTree:
    """The shardings of `reference`, whole where they do not divide an array that was cut."""

    def fit(shape: Any, leaf: Any) -> Sharding:
        try:
            leaf.sharding.shard_shape(shape.shape)
        except ValueError:
            return NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return leaf.sharding

    return jax.tree.map(fit, shapes, reference)


def _device_shardings(shardings: PyTree) -> PyTree:
    def on_device(place: Sharding) -> Sharding:
        device = next(iter(place.addressable_devices))
        return place.with_memory_kind(device.default_memory().kind)

    return jax.tree.map(on_device, shardings)


def _run_self_test(
    transform: Any,
    init: Callable[[PyTree], PyTree],
    params: PyTree,
    state_shardings: PyTree,
    accumulation_steps: int,
) -> PyTree:
    """Parameters and state after some steps."""
    whole = jax.tree.map(lambda array: array.sharding, params)
    state = jax.jit(init, out_shardings=state_shardings)(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(whole, state_shardings))
    def step(params: PyTree, state: PyTree, rows: jax.Array) -> tuple[PyTree, PyTree]:
        updates, state = transform.update(_self_test_grads(params, rows), state, params)
        return optax.apply_updates(params, updates), state

    for number in range(_SELF_TEST_STEPS):
        rows = np.linspace(0.5, 1.5, accumulation_steps, dtype=np.float32) + np.float32(number)
        params, state = step(params, state, rows)
    return params, state


def _self_test_grads(params: PyTree, inputs: jax.Array) -> PyTree:
    """Of a loss that keeps arrays for its gradient, summed over rows as a training step does."""

    def loss(params: PyTree, row: jax.Array) -> jax.Array:
        waves = (jnp.sin(row.astype(x.dtype) * x).sum() for x in jax.tree.leaves(params))
        return sum(waves, start=jnp.zeros(()))

    of_row = jax.grad(loss)
    if len(inputs) == 1:
        return of_row(params, inputs[0])

    def add(total: PyTree, row: jax.Array) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, of_row(params, row)), None

    return lax.scan(add, jax.tree.map(jnp.zeros_like, params), inputs)[0]


def _find_differing_leaves(expected: PyTree, found: PyTree) -> list[str]:
    """The places in a tree at which arrays have other bits, as far as this process holds them."""
    pairs = zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True)
    return [
        jax.tree_util.keystr(path)
        for (path, array), other in pairs
        if _get_shard_bytes(array) != _get_shard_bytes(other)
    ]


def _get_shard_bytes(array: jax.Array) -> list[bytes]:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    shards = sorted(array.addressable_shards, key=lambda shard: shard.device.id)
    return [np.asarray(shard.data).tobytes() for shard in shards]
