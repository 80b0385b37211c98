"""Adapter files, their lineage, and safetensors in general."""

from __future__ import annotations

from jlora.checkpoints.adapter_file import (
    adapted_weight_paths,
    load_adapter,
    read_lineage,
    read_quantization_schemes,
    save_adapter,
)
from jlora.checkpoints.hub import resolve_checkpoint_folder
from jlora.checkpoints.lineage import Lineage, ParentAdapter, content_hash
from jlora.checkpoints.output_lock import OutputInUseError

__all__ = [
    "Lineage",
    "OutputInUseError",
    "ParentAdapter",
    "adapted_weight_paths",
    "content_hash",
    "load_adapter",
    "read_lineage",
    "read_quantization_schemes",
    "resolve_checkpoint_folder",
    "save_adapter",
]
