"""What the gradient of a low-rank update needs of a product's cotangent, in one look at it.

`dy Bᵀ` goes on to `A` and to the input, `tᵀ dy` is the gradient of `B`. Each is a product with a
side as short as the rank, so each takes as long as reading `dy`, which is as large as the layer's
result. Here every tile of it is read once and meets both, on NVIDIA GPUs of the Hopper generation.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.kernels import mosaic

MAX_RANK = 32  # With more, parts of sums would take as much memory as the cotangent.
_ROWS = 64  # Of a tile: as many as one instruction of the tensor cores takes.
_BLOCKS = 128  # About as many as there are multiprocessors.


def meeting(dy: jax.Array, t: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`dy Bᵀ` (m, rank) and `tᵀ dy` (rank, n), summed in float32, in the type of `dy`.

    Args:
        dy: (m, n), where m is a multiple of 256 and n of 128.
        t: (m, rank), where the rank is at most `MAX_RANK`.
        b: (rank, n).
    """
    (m, n), rank = dy.shape, t.shape[1]
    size = mosaic.padded_rank(rank)
    padding = (0, size - rank), (0, 0)
    t, b = jnp.pad(t.T, padding), jnp.pad(b, padding)
    # What a block sums over rows stays in registers, of which a large rank leaves fewer columns.
    widest = 512 if size == 16 else 256
    wide = next(columns for columns in (512, 256, 128) if columns <= widest and n % columns == 0)
    while wide > 128 and (n // wide) * (m // (4 * _ROWS)) < _BLOCKS:
        wide //= 2  # A few columns are taken by more blocks.
    splits = max(1, _BLOCKS // (n // wide))
    while m % (splits * 4 * _ROWS):
        splits -= 1
    outs = [
        jax.ShapeDtypeStruct((n // wide, m, size), jnp.float32),
        jax.ShapeDtypeStruct((splits, n, size), jnp.float32),
    ]
    call = mosaic.kernel(
        functools.partial(_kernel, wide=wide, steps=m // (splits * _ROWS)),
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


def _kernel(dy: Any, t: Any, b: Any, u: Any, db: Any, *, wide: int, steps: int) -> None:
    """One block's share. All arguments are in global memory, `t` and `b` as (rank, m or n)."""
    import jax.experimental.pallas as pl

    plgpu = mosaic.plgpu()
    rank = t.shape[0]
    column, split = lax.axis_index("column"), lax.axis_index("split")
    columns = pl.ds(column * wide, wide)
    start = split * steps * _ROWS
    rows = pl.ds(start, steps * _ROWS)

    def pipeline(step: Any, around: Any) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(steps,),
            memory_registers=40,
            in_specs=[
                mosaic.block((_ROWS, wide), lambda i: (i, 0)),
                mosaic.block((rank, _ROWS), lambda i: (0, i)),
            ],
            wg_axis="group",
            num_compute_wgs=1,
            max_concurrent_steps=min(3, steps),
            compute_context=around,
        )

    @functools.partial(
        pl.run_scoped,
        buffers=pipeline(mosaic.nothing, mosaic.nothing).get_allocations(dy, t),
        b_tile=mosaic.shared((rank, wide), b.dtype),
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
            @functools.partial(pl.run_scoped, along=plgpu.ACC((_ROWS, rank), jnp.float32))
            def _row(along: Any) -> None:
                plgpu.wgmma(along, dy_tile, b_tile.transpose((1, 0)))
                plgpu.wgmma(grown, dy_tile.transpose((1, 0)), t_tile.transpose((1, 0)))
                plgpu.wgmma_wait(0)
                u[column, pl.ds(start + indices[0] * _ROWS, _ROWS), :] = along[...]

            return grown

        pipeline(step, multiply)(dy.at[rows, columns], t.at[:, rows], allocations=buffers)
