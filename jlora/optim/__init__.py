"""Optimizers for adapters, built on Optax: labels, rank allocation, offloading, regularizers."""

from __future__ import annotations

from jlora.optim.adalora import adalora_rank_allocator
from jlora.optim.multi_transform import (
    combine,
    lora_optimizer,
    param_labels,
    partition,
    weight_decay_mask,
)
from jlora.optim.offload import check_offload, host_shardings, offload
from jlora.optim.rank_schedule import rank_schedule, trim_zero_ranks
from jlora.optim.regularizers import (
    orthogonal_regularizer,
    soft_threshold,
    subspace_overlap,
)

__all__ = [
    "adalora_rank_allocator",
    "check_offload",
    "combine",
    "host_shardings",
    "lora_optimizer",
    "offload",
    "orthogonal_regularizer",
    "param_labels",
    "partition",
    "rank_schedule",
    "soft_threshold",
    "subspace_overlap",
    "trim_zero_ranks",
    "weight_decay_mask",
]
