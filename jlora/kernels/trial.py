"""Whether the kernels work on the device that is here."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.kernels import hopper, meeting, mosaic

_BOUND = 2.0**-7  # Relative; factors and result are rounded to bfloat16, each by 2**-9 at most.


def passed(rank: int) -> bool:
    """Whether the device that JAX computes on runs the kernels for updates of a rank, and gets the
    plain results.

    They are left out on a host with several GPUs: the compiler cannot split them over these.
    """
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or capability != "9.0" or jax.device_count() > 1:
        return False
    return _passed(mosaic.padded_rank(rank))


@functools.cache
def _passed(rank: int) -> bool:
    try:
        wrong = max(_errors(rank))
    except Exception as error:  # Whatever the compiler of an experimental kernel raises.
        reason = f"{type(error).__name__}: {error}"
    else:
        if wrong < _BOUND:
            return True
        reason = f"results are off by {wrong:.1e}"
    warnings.warn(
        f"jlora's kernels for Hopper GPUs do not work here ({reason[:300]}). Plain products are "
        f"used instead, which are right and slower.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _errors(rank: int) -> Iterator[float]:
    """How far each kernel is from NumPy in float32, relative to the result's size."""
    numbers = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray[Any, Any]:
        return numbers.standard_normal(shape, np.float32).astype(jnp.bfloat16)

    # More tiles than there are multiprocessors, and as many columns as any kernel takes at once.
    x, w, t, b = array(8192, 192), array(192, 1024), array(8192, rank), array(rank, 1024)
    wanted = _wide(x) @ _wide(w) + _wide(t) @ _wide(b)
    for turned in (False, True):
        product = functools.partial(hopper.product, turned=turned)
        yield _distance(_called(product, x, w.T.copy() if turned else w, t, b), wanted)
    if rank <= meeting.MAX_RANK:
        dy = array(8192, 1024)
        u, db = _called(meeting.meeting, dy, t, b)
        yield _distance(u, _wide(dy) @ _wide(b).T)
        yield _distance(db, _wide(t).T @ _wide(dy))


def _called(fn: Callable[..., Any], *arrays: Any) -> Any:
    """What a function makes of arrays. It is compiled and called by hand: this may happen while
    another program is traced, of which a plain call would become a part.
    """
    # Whatever the caller has set must not be taken for a fault of the kernels.
    here = jax.default_device(jax.devices()[0])
    with here, jax.transfer_guard("allow"), jax.disable_jit(False):
        return jax.jit(fn).lower(*arrays).compile()(*arrays)


def _wide(array: Any) -> np.ndarray[Any, Any]:
    return np.asarray(array).astype(np.float32)


def _distance(found: Any, wanted: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(_wide(found) - wanted) / np.linalg.norm(wanted))
