"""Training from a recipe: data, meshes, the step, the loop around it, and the report."""

from __future__ import annotations

from jlora.training.callbacks import Callback, Request
from jlora.training.checkpointing import CheckpointManager
from jlora.training.loop import NonFiniteError
from jlora.training.metrics import METRICS_FILE, MetricsLogger, read_metrics
from jlora.training.program_cache import ProgramCache
from jlora.training.progress import describe_attention
from jlora.training.recipe import Recipe
from jlora.training.runtime import initialize_distributed
from jlora.training.setup import Setup, build_setup
from jlora.training.sharding import (
    BATCH_AXES,
    MESH_AXES,
    check_batch_size,
    make_mesh,
    use_mesh,
)
from jlora.training.signals import TrainingInterrupted
from jlora.training.train import RESULT_FILE, TrainResult, train
from jlora.training.train_step import ScheduledOptimizer, TrainState, init_train_state
from jlora.training.wandb_logger import WandbLogger

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "METRICS_FILE",
    "RESULT_FILE",
    "Callback",
    "CheckpointManager",
    "MetricsLogger",
    "NonFiniteError",
    "ProgramCache",
    "Recipe",
    "Request",
    "ScheduledOptimizer",
    "Setup",
    "TrainResult",
    "TrainState",
    "TrainingInterrupted",
    "WandbLogger",
    "build_setup",
    "check_batch_size",
    "describe_attention",
    "init_train_state",
    "initialize_distributed",
    "make_mesh",
    "read_metrics",
    "train",
    "use_mesh",
]
