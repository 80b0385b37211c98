"""Self-test of the kernels for Hopper GPUs, run on the device before their first use."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.kernels import hopper

# Factors and result are rounded to bfloat16, each by a relative error of 2**-9 at most.
_MAX_RELATIVE_ERROR = 2.0**-7


def kernels_work(rank: int) -> bool:
    """Whether the kernels run on the default device and give the results of plain products.

    False on hosts with several GPUs, because the compiler cannot shard the kernels.

    Args:
        rank: Rank of the update.
    """
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or capability != "9.0" or jax.device_count() > 1:
        return False
    return _test_kernels(hopper.round_up_rank(rank))


@functools.cache
def _test_kernels(rank: int) -> bool:
    """Compares the kernels with NumPy, and warns where they fail."""
    try:
        max_error = max(_measure_kernel_errors(rank))
    except Exception as error:  # The compiler of experimental kernels may raise anything.
        reason = f"{type(error).__name__}: {error}"
    else:
        if max_error < _MAX_RELATIVE_ERROR:
            return True
        reason = f"results are off by {max_error:.1e}"
    warnings.warn(
        f"jlora's kernels for Hopper GPUs do not work on this device ({reason[:300]}). Plain "
        f"products are used instead, which are correct but slower.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _measure_kernel_errors(rank: int) -> Iterator[float]:
    """Yields the error of each result against NumPy in float32, relative to its norm."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape, np.float32).astype(jnp.bfloat16)

    # More tiles than multiprocessors, and at least the columns of the widest tile.
    x, w, t, b = draw(8192, 192), draw(192, 1024), draw(8192, rank), draw(rank, 1024)
    expected = _to_float32_numpy(x) @ _to_float32_numpy(w) + _to_float32_numpy(
        t
    ) @ _to_float32_numpy(b)
    for transpose_rhs in (False, True):
        product = functools.partial(hopper.hopper_matmul_add, transpose_rhs=transpose_rhs)
        yield _relative_error(
            compile_and_call(product, x, w.T.copy() if transpose_rhs else w, t, b), expected
        )
    if rank <= hopper.MAX_LORA_GRADS_RANK:
        dy = draw(8192, 1024)
        u, db = compile_and_call(hopper.lora_grads, dy, t, b)
        yield _relative_error(u, _to_float32_numpy(dy) @ _to_float32_numpy(b).T)
        yield _relative_error(db, _to_float32_numpy(t).T @ _to_float32_numpy(dy))


def compile_and_call(fn: Callable[..., Any], *arrays: Any) -> Any:
    """Compiles a function and calls it, also while another program is traced.

    A plain call would become part of that program.
    """
    device = jax.devices()[0]
    # Nothing here is worth a search for the fastest products.
    options: dict[str, Any] = {"xla_gpu_autotune_level": 0} if device.platform == "gpu" else {}
    # Settings of the caller must not make the test fail.
    on_device = jax.default_device(device)
    with on_device, jax.transfer_guard("allow"), jax.disable_jit(False):
        return jax.jit(fn).lower(*arrays).compile(compiler_options=options or None)(*arrays)


def _to_float32_numpy(array: Any) -> np.ndarray[Any, Any]:
    return np.asarray(array).astype(np.float32)


def _relative_error(result: Any, expected: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(_to_float32_numpy(result) - expected) / np.linalg.norm(expected))
