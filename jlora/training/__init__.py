"""Training from a recipe: data, meshes, the step, the loop around it, and the report."""

from __future__ import annotations

from jlora.training.checkpointing import CheckpointManager
from jlora.training.distributed import TrainingInterrupted, initialize_distributed
from jlora.training.loop import NonFiniteError
from jlora.training.metrics import METRICS_FILE, MetricsLogger, read_metrics
from jlora.training.program_cache import ProgramCache
from jlora.training.recipe import Recipe
from jlora.training.setup import Setup, build_setup
from jlora.training.train import RESULT_FILE, TrainResult, train

__all__ = [
    "METRICS_FILE",
    "RESULT_FILE",
    "CheckpointManager",
    "MetricsLogger",
    "NonFiniteError",
    "ProgramCache",
    "Recipe",
    "Setup",
    "TrainResult",
    "TrainingInterrupted",
    "build_setup",
    "initialize_distributed",
    "read_metrics",
    "train",
]
