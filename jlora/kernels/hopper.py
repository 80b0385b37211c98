"""Pallas kernels for NVIDIA GPUs of the Hopper generation: `x W + T B`, and its LoRA gradients.

`hopper_matmul_add` computes `x W + T B` in one pass over the result. A product with a frozen weight
is bound by arithmetic. Its low-rank update, as a separate product, is bound by writing the result
to memory and reading it back. In the kernel the update is one more step of the contraction over
tiles, `[x, T] [W; B]`, and neither pair is concatenated in memory. Two warpgroups multiply, each a
tile of its own rows. A third one loads the tiles of `x` and `W` some steps ahead. Blocks are
persistent: each computes one tile of the result after another, in an order that reuses the cache.

`lora_grads` computes `dy B^T` and `T^T dy` in one pass over the cotangent `dy`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

MAX_KERNEL_RANK = 64


def import_mosaic_gpu() -> Any:
    """Imports Pallas for Hopper GPUs; late, because the import takes a second."""
    import jax.experimental.pallas.mosaic_gpu as module

    return module


def round_up_rank(rank: int) -> int:
    """Returns the padded rank that the kernels use.

    Contractions take 16 entries at a time, and a row of shared memory is 32, 64 or 128 bytes.

    Raises:
        ValueError: If the rank is above `MAX_KERNEL_RANK`.
    """
    for size in (16, 32, MAX_KERNEL_RANK):
        if size >= rank:
            return size
    raise ValueError(
        f"rank={rank} must be at most {MAX_KERNEL_RANK} for these kernels. Use plain products."
    )


def make_mosaic_kernel(
    body: Callable[..., None],
    out_shape: Any,
    *,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    num_threads: int,
) -> Callable[..., Any]:
    """Creates a kernel, a function of arrays in global memory.

    Args:
        body: Function of references to arguments and results, run by each warpgroup of each block.
        out_shape: Shapes and types of the results.
        grid: Number of blocks along each grid axis.
        grid_names: Names of the grid axes.
        num_threads: Number of warpgroups per block; their axis is called "group".
    """
    module = import_mosaic_gpu()
    # JAX renamed the argument for the shapes of the results after 0.10.
    name = "out_type" if "out_type" in inspect.signature(module.kernel).parameters else "out_shape"
    return module.kernel(
        body,
        **{name: out_shape},
        grid=grid,
        grid_names=grid_names,
        num_threads=num_threads,
        thread_name="group",
        compiler_params=module.CompilerParams(
            lowering_semantics=module.LoweringSemantics.Warpgroup
        ),
    )


def get_swizzle_transforms(columns: int, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    """Returns the layout of tiles in shared memory that tensor cores read without bank conflicts.

    Args:
        columns: Number of columns of a tile.
        dtype: Type of its entries.
    """
    module = import_mosaic_gpu()
    width = jnp.dtype(dtype).itemsize
    swizzle = module.find_swizzle(columns * width * 8)
    return module.TilingTransform((8, swizzle // width)), module.SwizzleTransform(swizzle)


def make_smem_spec(shape: Sequence[int], dtype: Any) -> Any:
    """Describes shared memory for tiles of this shape."""
    return import_mosaic_gpu().SMEM(
        tuple(shape), dtype, transforms=get_swizzle_transforms(shape[-1], dtype)
    )


def make_block_spec(shape: tuple[int, int], index_map: Callable[..., tuple[Any, Any]]) -> Any:
    """Describes the tiles of a bfloat16 argument that a pipeline loads ahead into shared memory."""
    module = import_mosaic_gpu()
    return module.BlockSpec(
        shape, index_map, transforms=get_swizzle_transforms(shape[1]), memory_space=module.SMEM
    )


def noop_step(*_: Any) -> None:
    """Replaces the step of a pipeline that is built only for its allocations."""


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Tile sizes of `hopper_matmul_add`.

    Attributes:
        m: Rows of the result per warpgroup; a block has twice as many.
        n: Columns of the result per block.
        k: Length of the contraction per step.
        num_stages: Number of steps that are loaded ahead.
        out_columns: Columns of the 64-row parts in which a result is stored.
        snake_width: Number of column tiles that are visited before the next row of tiles.
    """

    m: int = 128
    n: int = 128
    k: int = 64
    num_stages: int = 3
    out_columns: int = 64
    snake_width: int = 8


def fits_hopper_tiles(m: int, k: int, n: int, rank: int) -> bool:
    """Whether `hopper_matmul_add` supports bfloat16 products of these sizes."""
    tiles = TileConfig()
    is_divisible = not (m % (2 * tiles.m) or n % tiles.n or k % tiles.k)
    is_nonempty = min(m, k, n, rank) > 0
    return is_divisible and is_nonempty and rank <= MAX_KERNEL_RANK


def hopper_matmul_add(
    x: jax.Array,
    w: jax.Array,
    t: jax.Array,
    b: jax.Array,
    *,
    transpose_rhs: bool,
    num_sms: int | None = None,
) -> jax.Array:
    """Computes `x W + t b` (m, n) in bfloat16 with float32 accumulation.

    Args:
        x: Activation, (m, k).
        w: Base weight, (k, n), or (n, k) if `transpose_rhs`.
        t: Activation times `A`, (m, rank).
        b: Factor `B`, (rank, n).
        transpose_rhs: Whether the contracted axis of `w` is its last.
        num_sms: Number of multiprocessors of the GPU. None: that of the first device.
    """
    padded_rank = round_up_rank(t.shape[1])
    padding = (0, padded_rank - t.shape[1])
    t, b = jnp.pad(t, ((0, 0), padding)), jnp.pad(b, (padding, (0, 0)))
    # Shared memory has no room for more columns at the largest rank.
    tiles = TileConfig() if padded_rank < MAX_KERNEL_RANK else TileConfig(out_columns=32)
    call = make_mosaic_kernel(
        functools.partial(_matmul_add_body, tiles=tiles, transpose_rhs=transpose_rhs),
        jax.ShapeDtypeStruct((x.shape[0], b.shape[1]), x.dtype),
        grid=(num_sms or jax.devices()[0].core_count,),
        grid_names=("block",),
        num_threads=3,
    )
    return call(x, w, t, b.T)


def _matmul_add_body(
    x: Any, w: Any, t: Any, b: Any, out: Any, *, tiles: TileConfig, transpose_rhs: bool
) -> None:
    """Computes the tiles of one block. All arguments are in global memory, `b` as (n, rank)."""
    import jax.experimental.pallas as pl

    plgpu = import_mosaic_gpu()
    (m, k), n, rank = x.shape, out.shape[1], t.shape[1]
    grid = m // (2 * tiles.m), n // tiles.n
    w_tile = (tiles.n, tiles.k) if transpose_rhs else (tiles.k, tiles.n)

    def pipeline(step: Any, compute_context: Any) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(k // tiles.k,),
            memory_registers=40,
            in_specs=[
                make_block_spec((2 * tiles.m, tiles.k), lambda i: (0, i)),
                make_block_spec(
                    w_tile, (lambda i: (0, i)) if transpose_rhs else (lambda i: (i, 0))
                ),
            ],
            wg_axis="group",
            num_compute_wgs=2,
            max_concurrent_steps=tiles.num_stages,
            compute_context=compute_context,
        )

    @functools.partial(
        pl.run_scoped,
        buffers=pipeline(noop_step, noop_step).get_allocations(x, w),
        out_part=make_smem_spec((2, 2, 64, tiles.out_columns), out.dtype),
        t_tile=make_smem_spec((2, tiles.m, rank), t.dtype),
        b_tile=make_smem_spec((2, tiles.n, rank), b.dtype),
        arrived=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        collective_axes="group",
    )
    def _scope(buffers: Any, out_part: Any, t_tile: Any, b_tile: Any, arrived: Any) -> None:
        group = lax.axis_index("group")

        @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="block")
        def _tiles(loop: Any) -> None:
            row, column = plgpu.planar_snake(loop.index[0], grid, 1, tiles.snake_width)
            block_rows = pl.ds(row * 2 * tiles.m, 2 * tiles.m)
            rows = pl.ds(row * 2 * tiles.m + group * tiles.m, tiles.m)
            columns = pl.ds(column * tiles.n, tiles.n)

            def multiply(run: Any) -> None:
                @functools.partial(pl.run_scoped, total=plgpu.ACC((tiles.m, tiles.n), jnp.float32))
                def _accumulate(total: Any) -> None:
                    # Each warpgroup loads its own tiles, so that it waits for memory alone.
                    plgpu.copy_gmem_to_smem(t.at[rows, :], t_tile.at[group], arrived.at[group])
                    plgpu.copy_gmem_to_smem(b.at[columns, :], b_tile.at[group], arrived.at[group])
                    run(total)
                    plgpu.barrier_wait(arrived.at[group])
                    plgpu.wgmma(total, t_tile.at[group], b_tile.at[group].transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    store(total[...].astype(out.dtype))

            def store(result: Any) -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                parts = [
                    (slice(i, i + 64), slice(j, j + tiles.out_columns))
                    for i in range(0, tiles.m, 64)
                    for j in range(0, tiles.n, tiles.out_columns)
                ]
                for index, (i, j) in enumerate(parts):
                    slot = out_part.at[group, index % 2]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    slot[...] = result[i, j]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(slot, out.at[rows, columns].at[i, j])

            def step(_: Any, x_tile: Any, w_tile: Any, total: Any) -> Any:
                x_part = x_tile.at[pl.ds(group * tiles.m, tiles.m)]
                w_part = w_tile.transpose((1, 0)) if transpose_rhs else w_tile
                plgpu.wgmma(total, x_part, w_part)
                plgpu.wgmma_wait(0)
                return total

            w_part = w.at[columns, :] if transpose_rhs else w.at[:, columns]
            pipeline(step, multiply)(x.at[block_rows, :], w_part, allocations=buffers)

    # The shared memory of a block is freed when it ends, so its stores must be complete.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


MAX_LORA_GRADS_RANK = 32  # Partial sums of larger ranks would be as large as the cotangent.

_TILE_ROWS = 64  # Rows of one tensor core instruction.

_NUM_BLOCKS = 128  # About the number of multiprocessors.


def lora_grads(dy: jax.Array, t: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes `dy Bᵀ` (m, rank) and `tᵀ dy` (rank, n) in the type of `dy`, summed in float32.

    Args:
        dy: Cotangent of the result, (m, n), where m is a multiple of 256 and n of 128.
        t: Activation times `A`, (m, rank), where the rank is at most `MAX_LORA_GRADS_RANK`.
        b: Factor `B`, (rank, n).
    """
    (m, n), rank = dy.shape, t.shape[1]
    padded_rank = round_up_rank(rank)
    padding = (0, padded_rank - rank), (0, 0)
    t, b = jnp.pad(t.T, padding), jnp.pad(b, padding)
    # The sum over rows of a block stays in registers, so a large rank allows fewer columns.
    max_columns = 512 if padded_rank == 16 else 256
    num_columns = next(
        columns for columns in (512, 256, 128) if columns <= max_columns and n % columns == 0
    )
    while num_columns > 128 and (n // num_columns) * (m // (4 * _TILE_ROWS)) < _NUM_BLOCKS:
        num_columns //= 2  # Narrow column blocks increase their number.
    splits = max(1, _NUM_BLOCKS // (n // num_columns))
    while m % (splits * 4 * _TILE_ROWS):
        splits -= 1
    out_shapes = [
        jax.ShapeDtypeStruct((n // num_columns, m, padded_rank), jnp.float32),
        jax.ShapeDtypeStruct((splits, n, padded_rank), jnp.float32),
    ]
    call = make_mosaic_kernel(
        functools.partial(
            _lora_grads_body, num_columns=num_columns, steps=m // (splits * _TILE_ROWS)
        ),
        out_shapes,
        grid=(n // num_columns, splits),
        grid_names=("column", "split"),
        num_threads=2,
    )
    u, db = call(dy, t, b)
    # Partial sums are added here, in a deterministic order.
    return (
        u.sum(axis=0).astype(dy.dtype)[:, :rank],
        db.sum(axis=0).astype(dy.dtype)[:, :rank].T,
    )


def _lora_grads_body(
    dy: Any, t: Any, b: Any, u: Any, db: Any, *, num_columns: int, steps: int
) -> None:
    """Computes the part of one block. All arguments are in global memory, `t` as (rank, m)."""
    import jax.experimental.pallas as pl

    plgpu = import_mosaic_gpu()
    rank = t.shape[0]
    column, split = lax.axis_index("column"), lax.axis_index("split")
    columns = pl.ds(column * num_columns, num_columns)
    start = split * steps * _TILE_ROWS
    rows = pl.ds(start, steps * _TILE_ROWS)

    def pipeline(step: Any, compute_context: Any) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(steps,),
            memory_registers=40,
            in_specs=[
                make_block_spec((_TILE_ROWS, num_columns), lambda i: (i, 0)),
                make_block_spec((rank, _TILE_ROWS), lambda i: (0, i)),
            ],
            wg_axis="group",
            num_compute_wgs=1,
            max_concurrent_steps=min(3, steps),
            compute_context=compute_context,
        )

    @functools.partial(
        pl.run_scoped,
        buffers=pipeline(noop_step, noop_step).get_allocations(dy, t),
        b_tile=make_smem_spec((rank, num_columns), b.dtype),
        arrived=plgpu.Barrier(),
        collective_axes="group",
    )
    def _scope(buffers: Any, b_tile: Any, arrived: Any) -> None:
        def multiply(run: Any) -> None:
            @functools.partial(pl.run_scoped, db_total=plgpu.ACC((num_columns, rank), jnp.float32))
            def _accumulate(db_total: Any) -> None:
                plgpu.copy_gmem_to_smem(b.at[:, columns], b_tile, arrived)
                plgpu.barrier_wait(arrived)
                run(db_total)
                db[split, columns, :] = db_total[...]

        def step(indices: Any, dy_tile: Any, t_tile: Any, db_total: Any) -> Any:
            @functools.partial(pl.run_scoped, u_tile=plgpu.ACC((_TILE_ROWS, rank), jnp.float32))
            def _row(u_tile: Any) -> None:
                plgpu.wgmma(u_tile, dy_tile, b_tile.transpose((1, 0)))
                plgpu.wgmma(db_total, dy_tile.transpose((1, 0)), t_tile.transpose((1, 0)))
                plgpu.wgmma_wait(0)
                u[column, pl.ds(start + indices[0] * _TILE_ROWS, _TILE_ROWS), :] = u_tile[...]

            return db_total

        pipeline(step, multiply)(dy.at[rows, columns], t.at[:, rows], allocations=buffers)
