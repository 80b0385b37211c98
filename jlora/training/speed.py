"""How much of a device's arithmetic a run uses, and how much of its memory."""

from __future__ import annotations

import resource
import sys
from typing import Any

import jax

from jlora import models, tree
from jlora.optim.labels import FULL, labels

# Dense bfloat16 products in TFLOP/s as vendors give them, by what JAX calls the device.
PEAK_TFLOPS = {
    "NVIDIA A100": 312.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
}


def peak_tflops(device: Any) -> float | None:
    """What one device can do at most; None where it is not known."""
    kind = getattr(device, "device_kind", "")
    known = [name for name in PEAK_TFLOPS if kind.startswith(name)]
    return PEAK_TFLOPS[max(known, key=len)] if known else None


def flops_per_token(model: Any, params: Any, trained: Any, length: int) -> float:
    """The arithmetic that one token needs in a step of training an adapter.

    A weight's product counts twice: forward, and for the gradient of what goes in; an adapter's
    also for its own. What is computed again to save memory does not count. Attention counts half
    of a full row.

    Args:
        model: Of `jlora.models`.
        params: Its weights, or shapes.
        trained: The arrays that are trained.
        length: Of a row.
    """
    decoder, c = isinstance(model, models.Decoder), model.config
    flat = tree.flatten(params)
    weights = 0.0
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if leaf.ndim < 2 or (path.endswith("embedding") and not (decoder and c.tied)):
            continue
        sparse = decoder and path.endswith(
            ("moe/gate_up", "moe/down")
        )  # A token goes through a few of these.
        weights += leaf.size * (c.experts.chosen / c.experts.count if sparse else 1)
    each = zip(jax.tree.leaves(labels(trained)), jax.tree.leaves(trained), strict=True)
    own = sum(array.size for label, array in each if array.ndim > 1 and label != FULL)
    layers = len(c.layers) if decoder else c.num_layers
    width = c.num_heads * c.head_dim if decoder else c.hidden_size
    seen = length / 2 if decoder else length
    return 4.0 * weights + 6.0 * own + 12.0 * layers * width * seen


def peak_memory_gib() -> float:
    """The most that a device of this process held, or the process itself on a CPU, in GiB."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max(stat.get("peak_bytes_in_use", 0) for stat in stats)
    if not peak:
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = held if sys.platform == "darwin" else 1024 * held
    return peak / 2**30
