"""The choice of an attention kernel: the fastest for the device that passes a test there."""

from __future__ import annotations

import functools
import importlib.metadata
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.kernels.self_test import compile_and_call
from jlora.models import tokamax_attention

AttentionKernel = Literal["xla", "cudnn", "splash", "mosaic", "triton"]
TextLayout = Literal["any", "packed", "padded"]

# Outputs and gradients are rounded to bfloat16 or float16, each by 2**-9 of itself at most, and so
# are the weights before them.
_MAX_RELATIVE_ERROR = 2.0**-6
_TEST_LENGTH, _TEST_WINDOW = 256, 50
# Shorter rows have few pairs, and fill no block of a kernel.
_MIN_KERNEL_LENGTH = 64


class AttentionCase(NamedTuple):
    """Properties of a self-attention over whole rows, on which the choice of a kernel depends.

    Attributes:
        dtype: Name of the dtype of queries, keys and values.
        length: Number of tokens of a row.
        num_heads: Number of heads of the queries.
        num_kv_heads: Number of heads of the keys.
        head_dim: Width of one head.
        text_layout: How texts lie in a row, as in `jlora.models.attention.attend`. None: each row
            is one text.
        causal: Whether later keys are hidden.
        window: Number of keys that a query attends to. None: all of them.
        softcap: Bound on the scores. None: no bound.
    """

    dtype: str
    length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    text_layout: TextLayout | None
    causal: bool
    window: int | None
    softcap: float | None


RunKernel = Callable[..., jax.Array]


def select_gpu_kernel(
    case: AttentionCase, attention: RunKernel, *, only_tokamax: bool = False
) -> AttentionKernel:
    """Returns the fastest kernel for GPUs.

    On a GPU of this process, a kernel is tried before its first use: its outputs and gradients must
    be those of masked attention in float32. A kernel that fails is named in a warning, and the next
    one is tried.

    Args:
        case: Case of the attention.
        attention: Function `(query, key, value, segment_ids, kernel, case, scale)` that runs a
            kernel.
        only_tokamax: Whether other kernels are left out, except xla, which comes last.
    """
    if case.dtype not in ("bfloat16", "float16"):
        return "xla"
    candidates = list_gpu_kernels(case, _get_compute_capability())
    if jax.default_backend() != "gpu":  # Compiled for another machine: there is nothing to try on.
        return "cudnn" if candidates[0] == "cudnn" else "xla"
    for kernel in candidates:
        if only_tokamax and kernel not in ("mosaic", "triton", "xla"):
            continue
        if kernel == "xla" or _passes_test(kernel, _test_case(case), attention):
            return kernel
    raise AssertionError("xla is the last candidate.")


def list_gpu_kernels(case: AttentionCase, capability: float | None) -> list[AttentionKernel]:
    """Returns the kernels that may be used for a case on a GPU, the fastest first; the last is xla.

    Args:
        case: Case of the attention.
        capability: Compute capability of the NVIDIA GPU, such as 9.0; None for another GPU.
    """
    if capability is None or case.length < _MIN_KERNEL_LENGTH:
        return ["xla"]
    found: list[AttentionKernel] = []
    cudnn_fits = case.softcap is None and case.head_dim % 8 == 0 and case.head_dim <= 128
    # Its own windows reach back alone.
    cudnn_has_window = case.window is None or case.causal
    if case.text_layout is None and cudnn_fits and cudnn_has_window:
        found.append("cudnn")
    kernels = tokamax_attention.list_kernels(capability)
    if case.text_layout != "any" and kernels:
        if tokamax_attention.is_installed():
            found.extend(k for k in kernels if k != "triton" or case.softcap is None)
        elif case.text_layout == "packed":
            _warn_not_installed(cudnn_fits)
    # cuDNN takes masks of an even number of keys; rows of one text need none.
    needs_mask = case.text_layout in ("any", "packed")
    if needs_mask and cudnn_fits and case.length % 2 == 0:
        found.append("cudnn")
    if case.text_layout == "padded" and cudnn_fits and cudnn_has_window:
        found.append("cudnn")
    return [*found, "xla"]


def _get_compute_capability() -> float | None:
    try:
        return float(getattr(jax.devices()[0], "compute_capability", ""))
    except ValueError:
        return None


@functools.cache
def _warn_not_installed(has_cudnn: bool) -> None:
    mend = (
        'Install it: pip install "jlora[gpu]".'
        if sys.version_info >= (3, 12)
        else 'Use Python 3.12 or newer, and pip install "jlora[gpu]".'
    )
    instead = "cuDNN with a mask" if has_cudnn else "XLA with an array of all pairs of tokens"
    warnings.warn(
        f"Packed texts use {instead}, because tokamax is not installed, whose attention is faster "
        f"and skips the other texts of a row. {mend}",
        RuntimeWarning,
        stacklevel=2,
    )


def _test_case(case: AttentionCase) -> AttentionCase:
    """Returns the case of the test, which does not depend on lengths."""
    window = None if case.window is None else _TEST_WINDOW
    return case._replace(length=_TEST_LENGTH, window=window)


@functools.cache
def _passes_test(kernel: AttentionKernel, case: AttentionCase, attention: RunKernel) -> bool:
    """Whether a kernel is right on this device; warns where it is not."""
    reason = find_failure(kernel, case, attention)
    if reason is None:
        return True
    library = "cuDNN" if kernel == "cudnn" else f"tokamax {importlib.metadata.version('tokamax')}"
    warnings.warn(
        f"The {kernel} attention of {library} does not work on this device for {case.dtype}, heads "
        f"of {case.head_dim} and {_describe_case(case)} ({reason[:300]}). Another one is used, "
        f"which is correct but slower. A newer release of the library may mend it.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _describe_case(case: AttentionCase) -> str:
    parts = ["one text a row" if case.text_layout is None else f"{case.text_layout} texts"]
    parts += ["a window"] * (case.window is not None)
    parts += [f"softcap {case.softcap}"] * (case.softcap is not None)
    return ", ".join(parts)


def find_failure(kernel: AttentionKernel, case: AttentionCase, attention: RunKernel) -> str | None:
    """Runs a kernel and its gradient, and returns why it cannot be used; None if it can.

    Args:
        kernel: Kernel to try.
        case: Case of the attention; its length is a multiple of 4.
        attention: As for `select_gpu_kernel`.
    """
    rng = np.random.default_rng(0)

    def draw(num_heads: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal((2, case.length, num_heads, case.head_dim), np.float32)

    arrays = [draw(n) for n in (case.num_heads, *[case.num_kv_heads] * 2, case.num_heads)]
    segments = None
    if case.text_layout is not None:
        part = case.length // 4
        ends = [part + 7, part + 37, part - 5, part - 39]
        rows = [[1, 1, 1, 0], [1] * 4] if case.text_layout == "padded" else [[1, 2, 3, 0], [1] * 4]
        segments = np.repeat(rows, ends, axis=1).astype(np.int32)
        arrays[3][segments == 0] = 0  # Outputs of padding have no meaning.

    is_token = True if segments is None else (segments > 0)[..., None, None]

    def evaluate(query: Any, key: Any, value: Any, out_gradient: Any) -> Any:
        def run(*inputs: Any) -> jax.Array:
            return attention(*inputs, segments, kernel, case, case.head_dim**-0.5)

        result, vjp = jax.vjp(run, query, key, value)
        return (jnp.where(is_token, result, 0), *vjp(out_gradient))

    narrow = [array.astype(case.dtype) for array in arrays]
    try:
        found = compile_and_call(evaluate, *narrow)
    except Exception as error:  # The compilers of kernels may raise anything.
        return f"{type(error).__name__}: {error}"
    mask = _make_numpy_mask(case, segments)
    wide = [array.astype(np.float32) for array in narrow]
    expected = _differentiate_attention(wide[0], wide[1], wide[2], wide[3], mask, case)
    expected[0] = np.where(is_token, expected[0], 0)
    for one, other in zip(found, expected, strict=True):
        error = np.linalg.norm(np.asarray(one).astype(np.float32) - other) / np.linalg.norm(other)
        if not error < _MAX_RELATIVE_ERROR:
            return f"results are off by {error:.1e}"
    return None


def _make_numpy_mask(
    case: AttentionCase, segments: np.ndarray[Any, Any] | None
) -> np.ndarray[Any, Any]:
    """Returns (batch or 1, 1, length, length), True where a query may attend to a key."""
    distance = np.arange(case.length)[:, None] - np.arange(case.length)
    mask = abs(distance) < (case.length if case.window is None else case.window)
    mask &= (distance >= 0) | (not case.causal)
    if segments is None:
        return mask[None, None]
    return (mask & (segments[:, :, None] == segments[:, None, :]))[:, None]


def _differentiate_attention(
    query: np.ndarray[Any, Any],
    key: np.ndarray[Any, Any],
    value: np.ndarray[Any, Any],
    out_gradient: np.ndarray[Any, Any],
    mask: np.ndarray[Any, Any],
    case: AttentionCase,
) -> list[np.ndarray[Any, Any]]:
    """Returns the output of attention and the gradients of query, key and value, in NumPy.

    A program of JAX would take longer to compile than the kernel itself.
    """
    group = case.num_heads // case.num_kv_heads
    scale = case.head_dim**-0.5
    q, g = query.swapaxes(1, 2), out_gradient.swapaxes(1, 2)  # (batch, heads, length, dim)
    k, v = (np.repeat(x.swapaxes(1, 2), group, axis=1) for x in (key, value))
    scores, slope = q @ k.mT * scale, np.float32(scale)
    if case.softcap is not None:
        bounded = np.tanh(scores / case.softcap)
        scores, slope = case.softcap * bounded, scale * (1 - bounded**2)
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    weight_gradient = g @ v.mT
    mean = (weights * weight_gradient).sum(axis=-1, keepdims=True)
    score_gradient = weights * (weight_gradient - mean) * slope
    batch, _, length, dim = q.shape

    def sum_groups(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return x.reshape(batch, case.num_kv_heads, group, length, dim).sum(axis=2)

    results = [weights @ v, score_gradient @ k]
    results += [sum_groups(score_gradient.mT @ q), sum_groups(weights.mT @ g)]
    return [x.swapaxes(1, 2) for x in results]
