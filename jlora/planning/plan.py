"""Plan of a recipe: its training step, compiled ahead of time for TPUs that are not attached."""

from __future__ import annotations

import collections
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import models
from jlora.kernels.lora_matmul import plain_products
from jlora.planning.compiled_cost import (
    DoesNotFitError,
    StepCost,
    StepMemory,
    compile_step,
    compute_step_cost,
    format_gib,
)
from jlora.planning.roofline import (
    PlanSuggestion,
    StepTimeEstimate,
    estimate_step_time,
    suggest_plan_changes,
)
from jlora.planning.tpu_topology import TPUChip, get_tpu_topology
from jlora.quantization.quantize import QuantizationSummary, quantization_summary
from jlora.training import sharding
from jlora.training.data.batch_stream import ClassificationBatch, LMBatch
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import Setup, build_setup

# Only the learning rate depends on it.
_SCHEDULE_STEPS = 1000


class TrainingPlan(NamedTuple):
    """Requirements of a recipe's training step on a topology; `str` formats them.

    Attributes:
        topology: Name of the topology.
        chip: Performance of each chip.
        mesh_shape: Sizes of the mesh axes by name.
        memory: Peak memory of each chip.
        available_bytes: Memory of each chip in bytes.
        cost: Cost of a step; None if it does not fit.
        estimate: Bounds on the time of a step; None if it does not fit.
        suggestions: Changes that reduce the memory; empty if it fits.
        compile_seconds: Seconds of the compilation.
        quantization: Sizes of the quantized base weights; None without quantization.

    Example:
        >>> from jlora.planning import StepMemory, TPUChip, TrainingPlan
        >>> chip = TPUChip("v5e", 197e12, 16 * 2**30, 819e9, 200e9, 4, 256)
        >>> memory = StepMemory({"weights": 20 * 2**30}, 0, 0, 0, 0)
        >>> shape = {"data": 1, "fsdp": 4, "tensor": 1}
        >>> TrainingPlan("v5e:2x2", chip, shape, memory, 16 * 2**30, None, None, [], 1.0).fits
        False
    """

    topology: str
    chip: TPUChip
    mesh_shape: dict[str, int]
    memory: StepMemory
    available_bytes: int
    cost: StepCost | None
    estimate: StepTimeEstimate | None
    suggestions: list[PlanSuggestion]
    compile_seconds: float
    quantization: QuantizationSummary | None = None

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of a chip."""
        return self.cost is not None

    def __str__(self) -> str:
        memory, num_chips = self.memory, math.prod(self.mesh_shape.values())
        sizes = ", ".join(f"{axis} {size}" for axis, size in self.mesh_shape.items())
        lines = [
            f"{self.topology}: {num_chips} chips of {format_gib(self.chip.hbm_bytes)}, "
            f"mesh {sizes}; compiled in {self.compile_seconds:.0f} s",
            *([] if self.quantization is None else [f"quantized: {self.quantization}"]),
            "",
            "memory per chip",
            *(_memory_line(name, size) for name, size in memory.arguments.items()),
            _memory_line("temporaries", memory.temporaries),
        ]
        other = memory.padding + memory.outputs + memory.program
        lines += [_memory_line("other", other)] if other else []
        verdict = "fits" if self.fits else "does not fit"
        available = f"  of {format_gib(self.available_bytes)}: {verdict}"
        lines.append(f"{_memory_line('total', memory.peak)}{available}")
        if memory.host:
            lines.append(f"{_memory_line('on the host', memory.host)}  for each chip")
        lines += self._suggestion_lines() if self.suggestions else []
        return "\n".join([*lines, *self._cost_lines()])

    def _suggestion_lines(self) -> list[str]:
        lines = ["", "suggested changes"]
        for change in self.suggestions:
            verdict = "sufficient" if change.is_sufficient else "not sufficient alone"
            lines.append(
                f"  {change.description} (saves {format_gib(change.saved_bytes)}, {verdict})"
            )
        return lines

    def _cost_lines(self) -> list[str]:
        if self.cost is None or self.estimate is None:
            return []
        executions: collections.Counter[str] = collections.Counter()
        sent_bytes: collections.Counter[str] = collections.Counter()
        for collective in self.cost.collectives:
            executions[collective.kind] += collective.executions
            sent_bytes[collective.kind] += collective.sent_bytes
        low, high = self.estimate.tokens_per_s
        lines = [
            "",
            "step, per chip",
            f"  compute      {self.cost.flops / 1e12:>10.2f} TFLOP, "
            f"{1e3 * self.estimate.compute_s:.1f} ms at peak",
            f"  HBM traffic  {self.cost.hbm_bytes / 1e9:>10.2f} GB, "
            f"{1e3 * self.estimate.hbm_s:.1f} ms at peak bandwidth",
            f"  sent         {self.cost.ici_bytes / 1e9:>10.2f} GB, "
            f"{1e3 * self.estimate.ici_s:.1f} ms at peak link bandwidth",
            *(
                f"    {kind} {count:,.0f} times, {sent_bytes[kind] / 1e9:.2f} GB"
                for kind, count in executions.items()
            ),
            "",
            f"bounds: {low:,.0f} tokens/s without overlap, {high:,.0f} tokens/s with full overlap; "
            f"bound by {_BOUND_LABELS[self.estimate.bound]}",
        ]
        if self.cost.unknown_loops:
            lines.append(f"{self.cost.unknown_loops} loops of unknown length count once.")
        return lines


_BOUND_LABELS = {"compute": "compute", "hbm": "HBM bandwidth", "ici": "interconnect bandwidth"}


def _memory_line(name: str, size: int) -> str:
    return f"  {name:<12} {format_gib(size):>12}"


def plan(recipe: Recipe, topology: str) -> TrainingPlan:
    """Compiles the training step of a recipe for a topology and returns its requirements.

    Nothing is run or allocated, and no data is read. Of the base, config.json is sufficient.

    Args:
        recipe: Recipe of a training run.
        topology: Name of a TPU slice, such as "v5e:4x4".

    Raises:
        ValueError: There is no such topology, or the mesh does not divide the model or the batch.
        ModuleNotFoundError: The TPU compiler is not installed.
        FileNotFoundError: The base does not exist.

    Example:
        >>> from jlora.planning import plan
        >>> from jlora.training import recipe
        >>> print(plan(recipe.load("recipe.yaml"), "v5e:4x4"))  # doctest: +SKIP
    """
    tpu = get_tpu_topology(topology)
    sizes = {name: size for name, size in recipe.mesh if size is not None}
    mesh = sharding.make_mesh(sizes, tpu.devices)
    sharding.check_batch_size(mesh, recipe.batch.size)
    num_labels = len(recipe.classification.labels or ("no", "yes"))
    setup = build_setup(
        recipe, mesh, total_steps=_SCHEDULE_STEPS, num_labels=num_labels, abstract=True
    )
    batch = _make_abstract_batch(recipe, mesh)
    groups = {
        "weights": setup.frozen["base"],
        "adapter": (
            setup.state.trainable,
            setup.frozen["adapter"],
            setup.frozen["reference"],
        ),
        "optimizer": setup.state._replace(trainable=None),
        "batch": batch,
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    start = time.monotonic()
    with plain_products():  # The host may have a GPU, whose kernels a TPU does not support.
        lowered = setup.train_step.lower(setup.state, setup.frozen, batch, key)
    mesh_shape, cost, estimate = dict(mesh.shape), None, None
    suggestions: list[PlanSuggestion] = []
    try:
        compiled = compile_step(lowered, groups)
    except DoesNotFitError as error:
        seconds = time.monotonic() - start
        memory, available = error.memory, error.available_bytes
        suggestions = _suggest_for_recipe(recipe, setup, memory, available, mesh_shape)
    else:
        seconds = time.monotonic() - start
        cost = compute_step_cost(compiled, groups)
        memory, available = cost.memory, int(tpu.chip.hbm_bytes)
        tokens = _count_batch_tokens(recipe)
        estimate = estimate_step_time(cost, tpu.chip, tokens=tokens, chips=mesh.size)
    return TrainingPlan(
        topology=topology,
        chip=tpu.chip,
        mesh_shape=mesh_shape,
        memory=memory,
        available_bytes=available,
        cost=cost,
        estimate=estimate,
        suggestions=suggestions,
        compile_seconds=seconds,
        quantization=quantization_summary(setup.frozen["base"]),
    )


def _count_batch_tokens(recipe: Recipe) -> int:
    """Returns the tokens of a step with full rows."""
    batch = recipe.batch
    tokens = batch.size * batch.gradient_accumulation_steps * recipe.data.max_seq_length
    return 2 * tokens if recipe.task == "preference" else tokens


def _make_abstract_batch(recipe: Recipe, mesh: Mesh) -> Any:
    """Returns the shapes of a batch of full rows."""
    batch_sharding = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH_AXES))
    leading = (recipe.batch.gradient_accumulation_steps, recipe.batch.size)
    length = recipe.data.max_seq_length

    def shape(dtype: Any, *trailing: int) -> Any:
        return jax.ShapeDtypeStruct((*leading, *trailing), dtype, sharding=batch_sharding)

    if recipe.task == "classification":
        ids = shape(jnp.int32, length)
        return ClassificationBatch(ids, ids, ids, shape(jnp.int32), shape(jnp.float32))
    trailing = (2, length) if recipe.task == "preference" else (length,)
    ids = shape(jnp.int32, *trailing)
    return LMBatch(ids, ids, shape(jnp.float32, *trailing), ids, ids)


def _suggest_for_recipe(
    recipe: Recipe,
    setup: Setup,
    memory: StepMemory,
    available_bytes: int,
    mesh_shape: dict[str, int],
) -> list[PlanSuggestion]:
    is_decoder = isinstance(setup.model, models.Decoder)
    config = setup.model.config
    return suggest_plan_changes(
        memory,
        available_bytes,
        mesh_shape=mesh_shape,
        batch_size=recipe.batch.size,
        seq_length=recipe.data.max_seq_length,
        remat_policy=recipe.model.remat_policy if is_decoder else "full",
        num_layers=len(config.layer_kind_ids) if is_decoder else config.num_layers,
        hidden_size=config.hidden_size,
    )
