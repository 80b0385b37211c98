"""Whether the kernels work on the device that is here."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.kernels import hopper

_MAX_RELATIVE_ERROR = (
    2.0**-7
)  # Relative; factors and result are rounded to bfloat16, each by 2**-9 at most.


def kernels_work(rank: int) -> bool:
    """Whether the device that JAX computes on runs the kernels for updates of a rank, and gets the
    plain results.

    They are left out on a host with several GPUs: the compiler cannot split them over these.
    """
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or capability != "9.0" or jax.device_count() > 1:
        return False
    return _test_kernels(hopper.round_up_rank(rank))


@functools.cache
def _test_kernels(rank: int) -> bool:
    try:
        wrong = max(_measure_kernel_errors(rank))
    except Exception as error:  # Whatever the compiler of an experimental kernel raises.
        reason = f"{type(error).__name__}: {error}"
    else:
        if wrong < _MAX_RELATIVE_ERROR:
            return True
        reason = f"results are off by {wrong:.1e}"
    warnings.warn(
        f"jlora's kernels for Hopper GPUs do not work here ({reason[:300]}). Plain products are "
        f"used instead, which are right and slower.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _measure_kernel_errors(rank: int) -> Iterator[float]:
    """How far each kernel is from NumPy in float32, relative to the result's size."""
    numbers = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray[Any, Any]:
        return numbers.standard_normal(shape, np.float32).astype(jnp.bfloat16)

    # More tiles than there are multiprocessors, and as many columns as any kernel takes at once.
    x, w, t, b = array(8192, 192), array(192, 1024), array(8192, rank), array(rank, 1024)
    wanted = _to_float32_numpy(x) @ _to_float32_numpy(w) + _to_float32_numpy(t) @ _to_float32_numpy(
        b
    )
    for transpose_rhs in (False, True):
        product = functools.partial(hopper.hopper_matmul_add, transpose_rhs=transpose_rhs)
        yield _relative_error(
            _compile_and_call(product, x, w.T.copy() if transpose_rhs else w, t, b), wanted
        )
    if rank <= hopper.MAX_LORA_GRADS_RANK:
        dy = array(8192, 1024)
        u, db = _compile_and_call(hopper.lora_grads, dy, t, b)
        yield _relative_error(u, _to_float32_numpy(dy) @ _to_float32_numpy(b).T)
        yield _relative_error(db, _to_float32_numpy(t).T @ _to_float32_numpy(dy))


def _compile_and_call(fn: Callable[..., Any], *arrays: Any) -> Any:
    """What a function makes of arrays. It is compiled and called by hand: this may happen while
    another program is traced, of which a plain call would become a part.
    """
    # Whatever the caller has set must not be taken for a fault of the kernels.
    here = jax.default_device(jax.devices()[0])
    with here, jax.transfer_guard("allow"), jax.disable_jit(False):
        return jax.jit(fn).lower(*arrays).compile()(*arrays)


def _to_float32_numpy(array: Any) -> np.ndarray[Any, Any]:
    return np.asarray(array).astype(np.float32)


def _relative_error(result: Any, expected: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(_to_float32_numpy(result) - expected) / np.linalg.norm(expected))
