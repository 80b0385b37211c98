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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.kernels import mosaic


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        m: Rows of the result that one warpgroup makes at a time; a block makes twice as many.
        n: Columns.
        k: How much of the sum one step makes.
        stages: How many steps are loaded ahead.
        out: Columns of the part in which a result leaves; the rows are 64.
        snake: How many tiles of columns are visited before the next row of tiles.
    """

    m: int = 128
    n: int = 128
    k: int = 64
    stages: int = 3
    out: int = 64
    snake: int = 8


def fits(rows: int, contracted: int, columns: int, rank: int, dtype: Any) -> bool:
    """Whether a product of these sizes is one that `product` makes."""
    tiles = Tiles()
    whole = not (rows % (2 * tiles.m) or columns % tiles.n or contracted % tiles.k)
    some = min(rows, contracted, columns, rank) > 0
    return dtype == jnp.bfloat16 and whole and some and rank <= mosaic.MAX_RANK


def product(
    x: jax.Array,
    w: jax.Array,
    t: jax.Array,
    b: jax.Array,
    *,
    turned: bool,
    multiprocessors: int | None = None,
) -> jax.Array:
    """`x W + t b` (m, n) in bfloat16, summed in float32.

    Args:
        x: (m, k).
        w: (k, n), or (n, k) if turned.
        t: (m, rank).
        b: (rank, n).
        turned: Whether W's contracted axis is its last.
        multiprocessors: Of the GPU; those of the first device when left out.
    """
    size = mosaic.padded_rank(t.shape[1])
    padding = (0, size - t.shape[1])
    t, b = jnp.pad(t, ((0, 0), padding)), jnp.pad(b, (padding, (0, 0)))
    tiles = Tiles() if size < mosaic.MAX_RANK else Tiles(out=32)  # What shared memory holds.
    call = mosaic.kernel(
        functools.partial(_kernel, tiles=tiles, turned=turned),
        jax.ShapeDtypeStruct((x.shape[0], b.shape[1]), x.dtype),
        grid=(multiprocessors or jax.devices()[0].core_count,),
        grid_names=("block",),
        num_threads=3,
    )
    return call(x, w, t, b.T)


def _kernel(x: Any, w: Any, t: Any, b: Any, out: Any, *, tiles: Tiles, turned: bool) -> None:
    """One block's share of the result. All arguments are in global memory, `b` as (n, rank)."""
    import jax.experimental.pallas as pl

    plgpu = mosaic.plgpu()
    (m, k), n, rank = x.shape, out.shape[1], t.shape[1]
    grid = m // (2 * tiles.m), n // tiles.n
    w_tile = (tiles.n, tiles.k) if turned else (tiles.k, tiles.n)

    def pipeline(step: Any, around: Any) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(k // tiles.k,),
            memory_registers=40,
            in_specs=[
                mosaic.block((2 * tiles.m, tiles.k), lambda i: (0, i)),
                mosaic.block(w_tile, (lambda i: (0, i)) if turned else (lambda i: (i, 0))),
            ],
            wg_axis="group",
            num_compute_wgs=2,
            max_concurrent_steps=tiles.stages,
            compute_context=around,
        )

    @functools.partial(
        pl.run_scoped,
        buffers=pipeline(mosaic.nothing, mosaic.nothing).get_allocations(x, w),
        out_part=mosaic.shared((2, 2, 64, tiles.out), out.dtype),
        t_tile=mosaic.shared((2, tiles.m, rank), t.dtype),
        b_tile=mosaic.shared((2, tiles.n, rank), b.dtype),
        arrived=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        collective_axes="group",
    )
    def _scope(buffers: Any, out_part: Any, t_tile: Any, b_tile: Any, arrived: Any) -> None:
        group = lax.axis_index("group")

        @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="block")
        def _tiles(loop: Any) -> None:
            row, column = plgpu.planar_snake(loop.index[0], grid, 1, tiles.snake)
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
                    (slice(i, i + 64), slice(j, j + tiles.out))
                    for i in range(0, tiles.m, 64)
                    for j in range(0, tiles.n, tiles.out)
                ]
                for number, (i, j) in enumerate(parts):
                    slot = out_part.at[group, number % 2]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    slot[...] = result[i, j]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(slot, out.at[rows, columns].at[i, j])

            def step(_: Any, x_tile: Any, w_tile: Any, total: Any) -> Any:
                x_part = x_tile.at[pl.ds(group * tiles.m, tiles.m)]
                w_part = w_tile.transpose((1, 0)) if turned else w_tile
                plgpu.wgmma(total, x_part, w_part)
                plgpu.wgmma_wait(0)
                return total

            w_part = w.at[columns, :] if turned else w.at[:, columns]
            pipeline(step, multiply)(x.at[both, :], w_part, allocations=buffers)

    # A block that ended would take its shared memory with it.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
