"""Offloading: an optimizer's state in host memory between steps, and a self-test of transfers.

Inside a jitted update the state is sent to the devices once the gradients are there, and back
afterwards, so that the activations of the forward and backward pass can use the memory of the
state.

References:
    Dettmers et al., QLoRA, arXiv:2305.14314, section 3, paged optimizers. There, pages move when
    the device runs out of memory; here, all of the state moves at every step, as programmed.
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

# The self-test: its number of steps, and the greatest length of an axis of its arrays.
_SELF_TEST_STEPS, _SELF_TEST_MAX_AXIS = 3, 64


def offload(transform: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps a transformation so that its state is in host memory between updates.

    The result takes the transformation's place alone, in a chain, and in `optax.multi_transform` or
    `optax.masked`, where only its own part of the state moves. Jit a step with parameters and state
    donated, both or neither: with the state alone donated, JAX 0.10 to 0.12 may give its buffers to
    the new parameters, which ends the process. On a mesh, jit it with `out_shardings` of both;
    otherwise JAX reports results that are random keys as arrays in device memory.

    Args:
        transform: Any Optax transformation, or a chain of them.

    Raises:
        ValueError: From `init` outside of jit: the devices have no pinned host memory.

    Example:
        >>> import jax.numpy as jnp, jlora, optax
        >>> state = jlora.offload(optax.adam(1e-3)).init(jnp.ones(3))
        >>> state[0].mu.sharding.memory_kind
        'pinned_host'
    """
    return _wrap_with_transfers(transform, to_device, to_host)


def host_shardings(shardings: PyTree) -> PyTree:
    """Returns the same shardings in host memory.

    Args:
        shardings: Tree of shardings.

    Example:
        >>> import jax, jlora
        >>> sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        >>> jlora.host_shardings({"w": sharding})["w"].memory_kind
        'pinned_host'
    """
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(HOST_MEMORY_KIND), shardings)


def check_offload(
    transform: optax.GradientTransformation,
    params: PyTree,
    state: PyTree,
    *,
    accumulation_steps: int = 1,
    offloaded_transform: optax.GradientTransformation | None = None,
) -> None:
    """Checks that, on these devices, an offloaded optimizer takes exactly the same steps.

    Takes a few steps on small arrays with the state in device memory and with the state in host
    memory; both must end with the same bits. In programs that move arrays between memories, faults
    of a compiler show up as wrong values rather than as errors; call this before training.

    Args:
        transform: Transformation to offload.
        params: Trainable parameters, or abstract arrays with shardings. Long axes are cut short.
        state: State of `transform` for `params`, or abstract arrays with shardings; its shardings
            are used in the test.
        accumulation_steps: Number of batches whose gradients a step sums in a scan; 1: no scan.
        offloaded_transform: Transformation that is compared with `transform`. None:
            `offload(transform)`.

    Raises:
        ValueError: The devices have no pinned host memory.
        RuntimeError: The steps differ.

    Example:
        >>> import jax.numpy as jnp, jlora, optax
        >>> optimizer, params = optax.sgd(0.1, momentum=0.9), {"w": jnp.ones((4, 3))}
        >>> jlora.check_offload(optimizer, params, optimizer.init(params))
    """
    shardings = [leaf.sharding for leaf in jax.tree.leaves(state)]
    check_host_memory(device for sharding in shardings for device in sharding.device_set)
    # Programs with and without transfers are fused alike if there is a barrier in either.
    reference = _wrap_with_transfers(transform, lax.optimization_barrier, lax.optimization_barrier)
    offloaded = offload(transform) if offloaded_transform is None else offloaded_transform
    fitted = _fit_state_shardings(jax.eval_shape(transform.init, _shrink_params(params)), state)
    # Parameters are donated too, so each run gets its own.
    expected = _run_self_test(
        reference,
        transform.init,
        _shrink_params(params),
        _device_shardings(fitted),
        accumulation_steps,
    )
    actual = _run_self_test(
        offloaded,
        transform.init,
        _shrink_params(params),
        host_shardings(fitted),
        accumulation_steps,
    )
    differing = _find_differing_leaves(expected, actual)
    if differing:
        platform = next(iter(shardings[0].device_set)).platform
        raise RuntimeError(
            f"Offloading the optimizer's state gives wrong values with jax {jax.__version__} on "
            f"{platform}: after {_SELF_TEST_STEPS} steps of a self-test, {len(differing)} arrays "
            f"differ from those of the same steps without it, such as {differing[0]}. Leave the "
            f"state on the devices (optimizer.offload=false in a recipe), or try another release "
            f"of JAX."
        )


def check_host_memory(devices: Iterable[Any]) -> None:
    """Checks that devices have pinned host memory.

    Args:
        devices: Devices, possibly of a topology that is not attached.

    Raises:
        ValueError: A device has no such memory.
    """
    devices = set(devices)
    # A process knows the memories of its own devices only.
    local = {device for device in devices if device.process_index == jax.process_index()}
    for device in local or devices:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST_MEMORY_KIND not in kinds:
            raise ValueError(
                f"An optimizer's state cannot be placed in host memory: {device} has memories of "
                f"the kinds {kinds}, and {HOST_MEMORY_KIND!r} is not among them. Leave the state "
                f"on the devices (optimizer.offload=false in a recipe); sharded over more of them "
                f"(mesh.fsdp), it takes less memory on each."
            )


def to_host(state: PyTree) -> PyTree:
    """Moves arrays to host memory, inside of jit and outside.

    Outside, every array keeps its sharding. An array without a committed sharding, such as a count,
    is replicated over the mesh of the other arrays.

    Raises:
        ValueError: Outside of jit: the devices have no pinned host memory.
    """
    arrays = [leaf for leaf in jax.tree.leaves(state) if _is_concrete(leaf)]
    check_host_memory(device for leaf in arrays for device in leaf.sharding.device_set)
    meshes = [leaf.sharding.mesh for leaf in arrays if isinstance(leaf.sharding, NamedSharding)]

    def put(leaf: Any) -> Any:
        if meshes and _is_concrete(leaf) and not leaf.committed:
            return jax.device_put(
                leaf, NamedSharding(meshes[0], PartitionSpec(), memory_kind=HOST_MEMORY_KIND)
            )
        return jax.device_put(leaf, jax.memory.Space.Host)

    return jax.tree.map(put, state)


def to_device(state: PyTree) -> PyTree:
    """Moves arrays to device memory, inside of jit and outside."""
    return jax.device_put(state, jax.memory.Space.Device)


def _wrap_with_transfers(
    transform: optax.GradientTransformation, fetch: TransferFn, store: TransferFn
) -> optax.GradientTransformationExtraArgs:
    inner = optax.with_extra_args_support(transform)

    def init(params: PyTree) -> PyTree:
        return to_host(inner.init(params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> Any:
        # Nothing else delays the state until the gradients are there, and XLA would send it before
        # the forward pass: on a GPU a step then needs more memory than without offload.
        updates, state = lax.optimization_barrier((updates, state))
        updates, state = inner.update(updates, fetch(state), params, **extra)
        return updates, store(state)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_concrete(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)


def _shrink_params(params: PyTree) -> PyTree:
    """Returns arrays like those of a tree with long axes cut; equal lengths stay equal.

    Axes that the shardings divide stay divisible.
    """
    leaves, treedef = jax.tree.flatten(params)
    num_devices = max((len(leaf.sharding.device_set) for leaf in leaves), default=1)
    max_length = num_devices * math.ceil(_SELF_TEST_MAX_AXIS / num_devices)
    rng = np.random.default_rng(0)
    arrays = []
    for leaf in leaves:
        shape = tuple(min(length, max_length) for length in leaf.shape)
        values = rng.normal(size=shape).astype(leaf.dtype)
        arrays.append(jax.make_array_from_callback(shape, leaf.sharding, values.__getitem__))
    return jax.tree.unflatten(treedef, arrays)


def _fit_state_shardings(shapes: PyTree, reference: PyTree) -> PyTree:
    """Returns the shardings of `reference`, replicated where they do not divide a cut array."""

    def fit(shape: Any, leaf: Any) -> Sharding:
        try:
            leaf.sharding.shard_shape(shape.shape)
        except ValueError:
            return NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return leaf.sharding

    return jax.tree.map(fit, shapes, reference)


def _device_shardings(shardings: PyTree) -> PyTree:
    def on_device(sharding: Sharding) -> Sharding:
        device = next(iter(sharding.addressable_devices))
        return sharding.with_memory_kind(device.default_memory().kind)

    return jax.tree.map(on_device, shardings)


def _run_self_test(
    transform: Any,
    init: Callable[[PyTree], PyTree],
    params: PyTree,
    state_shardings: PyTree,
    accumulation_steps: int,
) -> PyTree:
    """Returns parameters and state after the steps of the self-test."""
    param_shardings = jax.tree.map(lambda array: array.sharding, params)
    state = jax.jit(init, out_shardings=state_shardings)(params)

    @functools.partial(
        jax.jit, donate_argnums=(0, 1), out_shardings=(param_shardings, state_shardings)
    )
    def step(params: PyTree, state: PyTree, inputs: jax.Array) -> tuple[PyTree, PyTree]:
        updates, state = transform.update(_self_test_grads(params, inputs), state, params)
        return optax.apply_updates(params, updates), state

    for i in range(_SELF_TEST_STEPS):
        inputs = np.linspace(0.5, 1.5, accumulation_steps, dtype=np.float32) + np.float32(i)
        params, state = step(params, state, inputs)
    return params, state


def _self_test_grads(params: PyTree, inputs: jax.Array) -> PyTree:
    """Returns gradients of a loss with residuals, summed over inputs as in a training step."""

    def loss(params: PyTree, scale: jax.Array) -> jax.Array:
        terms = (jnp.sin(scale.astype(x.dtype) * x).sum() for x in jax.tree.leaves(params))
        return sum(terms, start=jnp.zeros(()))

    grad_fn = jax.grad(loss)
    if len(inputs) == 1:
        return grad_fn(params, inputs[0])

    def add(total: PyTree, scale: jax.Array) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, grad_fn(params, scale)), None

    return lax.scan(add, jax.tree.map(jnp.zeros_like, params), inputs)[0]


def _find_differing_leaves(expected: PyTree, actual: PyTree) -> list[str]:
    """Returns the paths of arrays whose bits differ, in the shards of this process."""
    pairs = zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(actual), strict=True)
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
