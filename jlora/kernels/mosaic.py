"""What kernels for NVIDIA GPUs of the Hopper generation are written with: Pallas, and the sizes and
layouts that its tensor cores ask for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

MAX_RANK = 64


def plgpu() -> Any:
    """Pallas for this generation of GPUs, which takes a second to import."""
    import jax.experimental.pallas.mosaic_gpu as module

    return module


def padded_rank(rank: int) -> int:
    """The rank that kernels compute with: sums go over 16 entries at a time, and a row of shared
    memory takes 32, 64 or 128 bytes.
    """
    for size in (16, 32, MAX_RANK):
        if size >= rank:
            return size
    raise ValueError(f"Rank {rank} is more than {MAX_RANK}, the most that these kernels take.")


def kernel(
    body: Callable[..., None],
    out: Any,
    *,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    num_threads: int,
) -> Callable[..., Any]:
    """A function of arrays in global memory.

    Args:
        body: Of references to arguments and results, for one warpgroup of one block.
        out: Shapes and types of the results.
        grid: How many blocks there are.
        grid_names: Of the grid's axes.
        num_threads: How many warpgroups a block has; they are the axis "group".
    """
    module = plgpu()
    # The name of the argument for the results' shapes changed after JAX 0.10.
    name = "out_type" if "out_type" in inspect.signature(module.kernel).parameters else "out_shape"
    return module.kernel(
        body,
        **{name: out},
        grid=grid,
        grid_names=grid_names,
        num_threads=num_threads,
        thread_name="group",
        compiler_params=module.CompilerParams(
            lowering_semantics=module.LoweringSemantics.Warpgroup
        ),
    )


def swizzled(columns: int, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    """The layout of tiles in shared memory that the tensor cores read without conflicts."""
    module = plgpu()
    width = jnp.dtype(dtype).itemsize
    swizzle = module.find_swizzle(columns * width * 8)
    return module.TilingTransform((8, swizzle // width)), module.SwizzleTransform(swizzle)


def shared(shape: Sequence[int], dtype: Any) -> Any:
    """Shared memory for tiles of this shape."""
    return plgpu().SMEM(tuple(shape), dtype, transforms=swizzled(shape[-1], dtype))


def block(shape: tuple[int, int], place: Callable[..., tuple[Any, Any]]) -> Any:
    """Tiles of a bfloat16 argument that a pipeline loads ahead into shared memory."""
    module = plgpu()
    return module.BlockSpec(shape, place, transforms=swizzled(shape[1]), memory_space=module.SMEM)


def nothing(*_: Any) -> None:
    """In the place of a pipeline's step, where only what it allocates is asked for."""
