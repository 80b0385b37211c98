"""`x W + T B` in one pass over the result, on NVIDIA GPUs of the Hopper generation.

A product with a frozen weight is bound by arithmetic; its low-rank update, as a product of its own,
by writing the result to memory and reading it back. Here the update is one more step of the sum
over tiles that the tensor cores make: `[x, T] [W; B]`, with neither pair ever joined in memory.

Two warpgroups multiply, each a tile of its own rows; a third one loads the tiles of `x` and `W`
some steps ahead. Blocks stay on their multiprocessor and take one tile of the result after another,
in an order that keeps what they read in the cache.
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
    """Pallas for this generation of GPUs, which takes a second to import."""
    import jax.experimental.pallas.mosaic_gpu as module

    return module


def round_up_rank(rank: int) -> int:
    """The rank that kernels compute with: sums go over 16 entries at a time, and a row of shared
    memory takes 32, 64 or 128 bytes.
    """
    for size in (16, 32, MAX_KERNEL_RANK):
        if size >= rank:
            return size
    raise ValueError(
        f"Rank {rank} is more than {MAX_KERNEL_RANK}, the most that these kernels take."
    )


def make_mosaic_kernel(
    body: Callable[..., None],
    out_shape: Any,
    *,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    num_threads: int,
) -> Callable[..., Any]:
    """A function of arrays in global memory.

    Args:
        body: Of references to arguments and results, for one warpgroup of one block.
        out_shape: Shapes and types of the results.
        grid: How many blocks there are.
        grid_names: Of the grid's axes.
        num_threads: How many warpgroups a block has; they are the axis "group".
    """
    module = import_mosaic_gpu()
    # The name of the argument for the results' shapes changed after JAX 0.10.
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
    """The layout of tiles in shared memory that the tensor cores read without conflicts."""
    module = import_mosaic_gpu()
    width = jnp.dtype(dtype).itemsize
    swizzle = module.find_swizzle(columns * width * 8)
    return module.TilingTransform((8, swizzle // width)), module.SwizzleTransform(swizzle)


def make_smem_spec(shape: Sequence[int], dtype: Any) -> Any:
    """Shared memory for tiles of this shape."""
    return import_mosaic_gpu().SMEM(
        tuple(shape), dtype, transforms=get_swizzle_transforms(shape[-1], dtype)
    )


def make_block_spec(shape: tuple[int, int], index_map: Callable[..., tuple[Any, Any]]) -> Any:
    """Tiles of a bfloat16 argument that a pipeline loads ahead into shared memory."""
    module = import_mosaic_gpu()
    return module.BlockSpec(
        shape, index_map, transforms=get_swizzle_transforms(shape[1]), memory_space=module.SMEM
    )


def noop_step(*_: Any) -> None:
    """In the place of a pipeline's step, where only what it allocates is asked for."""


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How the work is cut.

    Attributes:
        m: Rows of the result that one warpgroup makes at a time; a block makes twice as many.
        n: Columns.
        k: How much of the sum one step makes.
        num_stages: How many steps are loaded ahead.
        out_columns: Columns of the part in which a result leaves; the rows are 64.
        snake_width: How many tiles of columns are visited before the next row of tiles.
    """

    m: int = 128
    n: int = 128
    k: int = 64
    num_stages: int = 3
    out_columns: int = 64
    snake_width: int = 8


def fits_hopper_tiles(m: int, k: int, n: int, rank: int, dtype: Any) -> bool:
    """Whether a product of these sizes is one that `hopper_matmul_add` makes."""
    tiles = TileConfig()
    whole = not (m % (2 * tiles.m) or n % tiles.n or k % tiles.k)
    some = min(m, k, n, rank) > 0
    return dtype == jnp.bfloat16 and whole and some and rank <= MAX_KERNEL_RANK


def hopper_matmul_add(
    x: jax.Array,
    w: jax.Array,
    t: jax.Array,
    b: jax.Array,
    *,
    transpose_rhs: bool,
    multiprocessors: int | None = None,
) -> jax.Array:
    """`x W + t b` (m, n) in bfloat16, summed in float32.

    Args:
        x: (m, k).
        w: (k, n), or (n, k) if transpose_rhs.
        t: (m, rank).
        b: (rank, n).
        transpose_rhs: Whether W's contracted axis is its last.
        multiprocessors: Of the GPU; those of the first device when left out.
    """
    size = round_up_rank(t.shape[1])
    padding = (0, size - t.shape[1])
    t, b = jnp.pad(t, ((0, 0), padding)), jnp.pad(b, (padding, (0, 0)))
    tiles = (
        TileConfig() if size < MAX_KERNEL_RANK else TileConfig(out_columns=32)
    )  # What shared memory holds.
    call = make_mosaic_kernel(
        functools.partial(_matmul_add_body, tiles=tiles, transpose_rhs=transpose_rhs),
        jax.ShapeDtypeStruct((x.shape[0], b.shape[1]), x.dtype),
        grid=(multiprocessors or jax.devices()[0].core_count,),
        grid_names=("block",),
        num_threads=3,
    )
    return call(x, w, t, b.T)


def _matmul_add_body(
    x: Any, w: Any, t: Any, b: Any, out: Any, *, tiles: TileConfig, transpose_rhs: bool
) -> None:
    """One block's share of the result. All arguments are in global memory, `b` as (n, rank)."""
    import jax.experimental.pallas as pl

    plgpu = import_mosaic_gpu()
    (m, k), n, rank = x.shape, out.shape[1], t.shape[1]
    grid = m // (2 * tiles.m), n // tiles.n
    w_tile = (tiles.n, tiles.k) if transpose_rhs else (tiles.k, tiles.n)

    def pipeline(step: Any, around: Any) -> Any:
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
            compute_context=around,
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
            both = pl.ds(row * 2 * tiles.m, 2 * tiles.m)
            rows = pl.ds(row * 2 * tiles.m + group * tiles.m, tiles.m)
            columns = pl.ds(column * tiles.n, tiles.n)

            def multiply(run: Any) -> None:
                @functools.partial(pl.run_scoped, total=plgpu.ACC((tiles.m, tiles.n), jnp.float32))
                def _accumulate(total: Any) -> None:
                    # Each group loads its own, so that they wait for nothing but the memory.
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
                for number, (i, j) in enumerate(parts):
                    slot = out_part.at[group, number % 2]
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
            pipeline(step, multiply)(x.at[both, :], w_part, allocations=buffers)

    # A block that ended would take its shared memory with it.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


MAX_LORA_GRADS_RANK = 32  # With more, parts of sums would take as much memory as the cotangent.

_TILE_ROWS = 64  # Of a tile: as many as one instruction of the tensor cores takes.

_NUM_BLOCKS = 128  # About as many as there are multiprocessors.


def lora_grads(dy: jax.Array, t: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`dy Bᵀ` (m, rank) and `tᵀ dy` (rank, n), summed in float32, in the type of `dy`.

    Args:
        dy: (m, n), where m is a multiple of 256 and n of 128.
        t: (m, rank), where the rank is at most `MAX_LORA_GRADS_RANK`.
        b: (rank, n).
    """
    (m, n), rank = dy.shape, t.shape[1]
    size = round_up_rank(rank)
    padding = (0, size - rank), (0, 0)
    t, b = jnp.pad(t.T, padding), jnp.pad(b, padding)
    # What a block sums over rows stays in registers, of which a large rank leaves fewer columns.
    widest = 512 if size == 16 else 256
    wide = next(columns for columns in (512, 256, 128) if columns <= widest and n % columns == 0)
    while wide > 128 and (n // wide) * (m // (4 * _TILE_ROWS)) < _NUM_BLOCKS:
        wide //= 2  # A few columns are taken by more blocks.
    splits = max(1, _NUM_BLOCKS // (n // wide))
    while m % (splits * 4 * _TILE_ROWS):
        splits -= 1
    outs = [
        jax.ShapeDtypeStruct((n // wide, m, size), jnp.float32),
        jax.ShapeDtypeStruct((splits, n, size), jnp.float32),
    ]
    call = make_mosaic_kernel(
        functools.partial(_lora_grads_body, wide=wide, steps=m // (splits * _TILE_ROWS)),
        outs,
        grid=(n // wide, splits),
        grid_names=("column", "split"),
        num_threads=2,
    )
    u, db = call(dy, t, b)
    # Parts of sums are added up here: in an order that is always the same.
    return (
        u.sum(axis=0).astype(dy.dtype)[:, :rank],
        db.sum(axis=0).astype(dy.dtype)[:, :rank].T,
    )


def _lora_grads_body(dy: Any, t: Any, b: Any, u: Any, db: Any, *, wide: int, steps: int) -> None:
    """One block's share. All arguments are in global memory, `t` and `b` as (rank, m or n)."""
    import jax.experimental.pallas as pl

    plgpu = import_mosaic_gpu()
    rank = t.shape[0]
    column, split = lax.axis_index("column"), lax.axis_index("split")
    columns = pl.ds(column * wide, wide)
    start = split * steps * _TILE_ROWS
    rows = pl.ds(start, steps * _TILE_ROWS)

    def pipeline(step: Any, around: Any) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(steps,),
            memory_registers=40,
            in_specs=[
                make_block_spec((_TILE_ROWS, wide), lambda i: (i, 0)),
                make_block_spec((rank, _TILE_ROWS), lambda i: (0, i)),
            ],
            wg_axis="group",
            num_compute_wgs=1,
            max_concurrent_steps=min(3, steps),
            compute_context=around,
        )

    @functools.partial(
        pl.run_scoped,
        buffers=pipeline(noop_step, noop_step).get_allocations(dy, t),
        b_tile=make_smem_spec((rank, wide), b.dtype),
        arrived=plgpu.Barrier(),
        collective_axes="group",
    )
    def _scope(buffers: Any, b_tile: Any, arrived: Any) -> None:
        def multiply(run: Any) -> None:
            @functools.partial(pl.run_scoped, grown=plgpu.ACC((wide, rank), jnp.float32))
            def _accumulate(grown: Any) -> None:
                plgpu.copy_gmem_to_smem(b.at[:, columns], b_tile, arrived)
                plgpu.barrier_wait(arrived)
                run(grown)
                db[split, columns, :] = grown[...]

        def step(indices: Any, dy_tile: Any, t_tile: Any, grown: Any) -> Any:
            @functools.partial(pl.run_scoped, along=plgpu.ACC((_TILE_ROWS, rank), jnp.float32))
            def _row(along: Any) -> None:
                plgpu.wgmma(along, dy_tile, b_tile.transpose((1, 0)))
                plgpu.wgmma(grown, dy_tile.transpose((1, 0)), t_tile.transpose((1, 0)))
                plgpu.wgmma_wait(0)
                u[column, pl.ds(start + indices[0] * _TILE_ROWS, _TILE_ROWS), :] = along[...]

            return grown

        pipeline(step, multiply)(dy.at[rows, columns], t.at[:, rows], allocations=buffers)
