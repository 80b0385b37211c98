"""Combination and comparison of trained adapters, and merging into a checkpoint's dtype.

Adapters are combined by their weight updates (`combine_adapters`), by trainable mixing weights
(`weighted_sum`, `lorahub`, `fit_weights`), by a router (`fit_router`, `apply_routed`), or one on
top of another (`compose_adapters`). `measure_interference` compares them.
"""

from __future__ import annotations

from jlora.merging.combine import CombineResult, analogy, combine_adapters
from jlora.merging.lorahub import FusionResult, fit_weights, lorahub
from jlora.merging.measure_interference import (
    Interference,
    PairStats,
    measure_interference,
    save_heatmap,
)
from jlora.merging.merge_methods import DARE, DELLA, TIES, Linear, Magnitude, MergeMethod
from jlora.merging.merge_to import MergeFidelity, MergeResult, UpdateLostWarning, merge_to_dtype
from jlora.merging.routing import Router, apply_routed, fit_router, routing_weights
from jlora.merging.weighted import (
    adapter_names,
    compose_adapters,
    fold_weights,
    get_weights,
    weighted_sum,
    with_weights,
)

__all__ = [
    "DARE",
    "DELLA",
    "TIES",
    "CombineResult",
    "FusionResult",
    "Interference",
    "Linear",
    "Magnitude",
    "MergeFidelity",
    "MergeMethod",
    "MergeResult",
    "PairStats",
    "Router",
    "UpdateLostWarning",
    "adapter_names",
    "analogy",
    "apply_routed",
    "combine_adapters",
    "compose_adapters",
    "fit_router",
    "fit_weights",
    "fold_weights",
    "get_weights",
    "lorahub",
    "measure_interference",
    "merge_to_dtype",
    "routing_weights",
    "save_heatmap",
    "weighted_sum",
    "with_weights",
]
