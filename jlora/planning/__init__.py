"""Plans: memory, FLOPs and time of a training step on TPUs that are not attached."""

from __future__ import annotations

from jlora.planning.compiled_cost import (
    DoesNotFitError,
    StepCost,
    StepMemory,
    compile_step,
    compute_step_cost,
)
from jlora.planning.plan import TrainingPlan, plan
from jlora.planning.roofline import StepTimeEstimate, estimate_step_time, suggest_plan_changes
from jlora.planning.tpu_topology import TPUChip, TPUTopology, get_tpu_topology

__all__ = [
    "DoesNotFitError",
    "StepCost",
    "StepMemory",
    "StepTimeEstimate",
    "TPUChip",
    "TPUTopology",
    "TrainingPlan",
    "compile_step",
    "compute_step_cost",
    "estimate_step_time",
    "get_tpu_topology",
    "plan",
    "suggest_plan_changes",
]
