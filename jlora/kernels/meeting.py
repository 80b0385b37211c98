"""What the gradient of a low-rank update needs of a product's cotangent, in one look at it.

`dy Bᵀ` goes on to `A` and to the input, `tᵀ dy` is the gradient of `B`. Each is a product with a
side as short as the rank, so each takes as long as reading `dy`, which is as large as the layer's
result. Here every tile of it is read once and meets both.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_ROWS, _COLUMNS = 64, 128  # Of a tile.
_HIGH, _WIDE = 4, 4  # How many tiles a program takes, at most.


def meeting(dy: jax.Array, t: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`dy Bᵀ` (m, rank) and `tᵀ dy` (rank, n), summed in float32, in the type of `dy`.

    Args:
        dy: (m, n), where m is a multiple of 64 and n of 128.
        t: (m, rank).
        b: (rank, n).
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.triton as triton

    (m, n), rank = dy.shape, t.shape[1]
    # Triton's blocks are powers of two, and its products take 16 entries at a time.
    padded = max(16, 1 << (rank - 1).bit_length())
    padding = (0, padded - rank)
    t, b = jnp.pad(t, ((0, 0), padding)), jnp.pad(b, (padding, (0, 0)))
    high = _ROWS * next(count for count in (_HIGH, 2, 1) if m % (count * _ROWS) == 0)
    wide = _COLUMNS * next(count for count in (_WIDE, 2, 1) if n % (count * _COLUMNS) == 0)
    grid = m // high, n // wide
    # Parts of sums are added up afterwards: in an order that is always the same.
    outs = [
        jax.ShapeDtypeStruct((grid[1], m, padded), jnp.float32),
        jax.ShapeDtypeStruct((grid[0], padded, n), jnp.float32),
    ]
    parts = pl.pallas_call(
        functools.partial(_kernel, high=high, wide=wide),
        out_shape=outs,
        grid=grid,
        in_specs=[
            pl.BlockSpec((high, wide), lambda i, j: (i, j)),
            pl.BlockSpec((high, padded), lambda i, j: (i, 0)),
            pl.BlockSpec((padded, wide), lambda i, j: (0, j)),
        ],
        out_specs=[
            pl.BlockSpec((1, high, padded), lambda i, j: (j, i, 0)),
            pl.BlockSpec((1, padded, wide), lambda i, j: (i, 0, j)),
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    )(dy, t, b)
    u, db = (part.sum(axis=0).astype(dy.dtype) for part in parts)
    return u[:, :rank], db[:rank]


def _kernel(dy: Any, t: Any, b: Any, u: Any, db: Any, *, high: int, wide: int) -> None:
    """One program's share: all arguments are the blocks that it meets."""
    import jax.experimental.pallas as pl

    rank = t.shape[1]
    columns = [pl.ds(j, _COLUMNS) for j in range(0, wide, _COLUMNS)]

    def row_of_tiles(number: Any, totals: tuple[Any, ...]) -> tuple[Any, ...]:
        rows = pl.ds(number * _ROWS, _ROWS)
        t_tile = t[rows, :]
        along = jnp.zeros((_ROWS, rank), jnp.float32)
        grown = []
        for total, column in zip(totals, columns, strict=True):
            tile = dy[rows, column]
            along += _dot(tile, b[:, column], 1, 1)
            grown.append(total + _dot(t_tile, tile, 0, 0))
        u[0, rows, :] = along
        return tuple(grown)

    start = tuple(jnp.zeros((rank, _COLUMNS), jnp.float32) for _ in columns)
    totals = lax.fori_loop(0, high // _ROWS, row_of_tiles, start)
    for total, column in zip(totals, columns, strict=True):
        db[0, :, column] = total


def _dot(a: Any, b: Any, a_axis: int, b_axis: int) -> Any:
    """The product of two matrices, summed in float32 over an axis of each."""
    dimensions = ((a_axis,), (b_axis,)), ((), ())
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
