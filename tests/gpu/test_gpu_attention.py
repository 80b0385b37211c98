"""Kernels of attention on a GPU: right for every case for which they may be chosen."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.attention_cases import ATTENTION_CASE as CASE

from jlora.models import attention, attention_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("heads", [(8, 2, 128), (8, 8, 64), (7, 1, 96), (4, 2, 256)], ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", [None, "packed", "padded", "any"])
def test_chosen_kernel_is_right(
    layout: Any, causal: bool, window: int | None, softcap: float | None, heads: Any
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    case = CASE._replace(
        text_layout=layout,
        causal=causal,
        window=window,
        softcap=softcap,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # No kernel before the chosen one fails.
        kernel = attention.choose_kernel(case)
    possible = attention_kernels.list_gpu_kernels(case, attention_kernels._get_compute_capability())
    assert kernel == possible[0]
    # 500 tokens fill no whole block. The choice has tried 256 in bfloat16.
    for dtype, length in (("bfloat16", 500), ("float16", 256), ("float16", 500)):
        one = case._replace(dtype=dtype, length=length)
        assert attention_kernels.find_failure(kernel, one, attention._run_kernel) is None


def test_kernel_of_long_rows_is_that_of_xla() -> None:
    """At the size of a training step, where each block meets other texts."""
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(2, 2048, heads, 128)), jnp.bfloat16)
    query, key, value = draw(8), draw(2), draw(2)
    lengths = [300, 17, 511, 128, 1, 700, 200, 191]
    ids = jnp.asarray(np.repeat([[1, 2, 3, 4, 5, 6, 7, 0]] * 2, lengths, axis=1))
    out = {
        layout: jax.jit(
            lambda q, k, v, layout=layout: attention.attend(
                q, k, v, scale=0.1, query_segment_ids=ids, text_layout=layout
            )
        )(query, key, value)
        for layout in ("packed", "any")
    }
    for array in out.values():
        assert np.isfinite(np.asarray(array, np.float32)).all()
    is_token = np.asarray(ids > 0)[..., None, None]
    one, other = (np.where(is_token, np.asarray(x, np.float32), 0) for x in out.values())
    assert np.linalg.norm(one - other) / np.linalg.norm(other) < 2**-7
