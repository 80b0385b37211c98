"""A recipe's own step, compiled ahead of time for a TPU that is not here."""

from __future__ import annotations

import collections
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

# The learning rate alone depends on it.
_SCHEDULE_STEPS = 1000


class TrainingPlan(NamedTuple):
    """What a recipe's step needs on a topology.

    Attributes:
        topology: Its name.
        chip: What each chip can do.
        mesh_shape: Sizes of its axes.
        memory: What each chip holds.
        available_bytes: What it may hold.
        cost: What a step does; None where it does not fit.
        estimate: Of its time; None where it does not fit.
        suggestions: What would make it fit, or nothing.
        compile_seconds: That compiling took.
        quantization: What the quantised weights of the base take in all; None without any.
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
        """Whether a step can run there."""
        return self.cost is not None

    def __str__(self) -> str:
        chips = 1
        for size in self.mesh_shape.values():
            chips *= size
        sizes = ", ".join(f"{axis} {size}" for axis, size in self.mesh_shape.items())
        lines = [
            f"{self.topology}: {chips} chips of {format_gib(self.chip.hbm_bytes)}, as {sizes}; compiled "
            f"in {self.compile_seconds:.0f} s",
            *([] if self.quantization is None else [f"quantised: {self.quantization}"]),
            "",
            "memory of each chip",
            *(
                f"  {name:<12} {format_gib(size):>12}"
                for name, size in self.memory.arguments.items()
            ),
            f"  {'temporaries':<12} {format_gib(self.memory.temporaries):>12}",
        ]
        other = self.memory.padding + self.memory.outputs + self.memory.program
        lines += [f"  {'other':<12} {format_gib(other):>12}"] if other else []
        word = "fits" if self.fits else "does not fit"
        lines.append(
            f"  {'in all':<12} {format_gib(self.memory.peak):>12}  of {format_gib(self.available_bytes)}: {word}"
        )
        if self.memory.host:
            lines.append(f"  {'on the host':<12} {format_gib(self.memory.host):>12}  for each chip")
        lines += self._suggestion_lines() if self.suggestions else []
        return "\n".join([*lines, *self._cost_lines()])

    def _suggestion_lines(self) -> list[str]:
        lines = ["", "what would make it fit"]
        for change in self.suggestions:
            enough = "enough alone" if change.is_sufficient else "not enough alone"
            lines.append(
                f"  {change.description} ({format_gib(change.saved_bytes)} less, {enough})"
            )
        return lines

    def _cost_lines(self) -> list[str]:
        if self.cost is None or self.estimate is None:
            return []
        each = collections.Counter(one.kind for one in self.cost.collectives)
        moved: dict[str, tuple[float, float]] = {}
        for one in self.cost.collectives:
            times, size = moved.get(one.kind, (0.0, 0.0))
            moved[one.kind] = times + one.executions, size + one.sent_bytes
        low, high = self.estimate.tokens_per_s
        lines = [
            "",
            "a step, on each chip",
            f"  products     {self.cost.flops / 1e12:>10.2f} TFLOP, "
            f"{1e3 * self.estimate.compute_s:.1f} ms at the peak",
            f"  memory       {self.cost.hbm_bytes / 1e9:>10.2f} GB, "
            f"{1e3 * self.estimate.hbm_s:.1f} ms at its bandwidth",
            f"  exchanged    {self.cost.ici_bytes / 1e9:>10.2f} GB, "
            f"{1e3 * self.estimate.ici_s:.1f} ms at that of the links",
        ]
        for kind in each:
            times, size = moved[kind]
            lines.append(f"    {kind} {times:,.0f} times, {size / 1e9:.2f} GB")
        lines += [
            "",
            f"bounds: {low:,.0f} tokens/s if nothing overlaps, {high:,.0f} if all does; most of "
            f"the time goes to {_BOUND_LABELS[self.estimate.bound]}",
        ]
        if self.cost.unknown_loops:
            lines.append(f"{self.cost.unknown_loops} loops of unknown length count once.")
        return lines


_BOUND_LABELS = {"compute": "products", "hbm": "the chip's memory", "ici": "exchange between chips"}


def plan(recipe: Recipe, topology: str) -> TrainingPlan:
    """What a step of the recipe needs on every chip of a topology; nothing is run or allocated.

    A decoder's config.json is enough of the base, and no data is read.

    Args:
        recipe: As for training.
        topology: Such as "v5e:4x4".

    Raises:
        ValueError: There is no such topology, or the mesh does not divide the model or batch.
        ModuleNotFoundError: The compiler for TPUs is not installed.
        FileNotFoundError: The base is not there.
    """
    found = get_tpu_topology(topology)
    sizes = {name: size for name, size in recipe.mesh if size is not None}
    mesh = sharding.make_mesh(sizes, found.devices)
    sharding.check_batch_size(mesh, recipe.batch.size)
    labels = len(recipe.classification.labels or ("no", "yes"))
    setup = build_setup(recipe, mesh, total_steps=_SCHEDULE_STEPS, num_labels=labels, abstract=True)
    batch = _make_abstract_batch(recipe, mesh)
    groups = {
        "weights": setup.frozen["base"],
        "adapter": (setup.state.trainable, setup.frozen["adapter"]),
        "optimizer": setup.state._replace(trainable=None),
        "batch": batch,
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    began = time.monotonic()
    with plain_products():  # A host's own GPU has kernels that the target has not.
        lowered = setup.train_step.lower(setup.state, setup.frozen, batch, key)
    shape, quantized = dict(mesh.shape), quantization_summary(setup.frozen["base"])
    try:
        compiled = compile_step(lowered, groups)
    except DoesNotFitError as error:
        changes = _suggest_for_recipe(recipe, setup, error.memory, error.available_bytes, shape)
        seconds = time.monotonic() - began
        return TrainingPlan(
            topology=topology,
            chip=found.chip,
            mesh_shape=shape,
            memory=error.memory,
            available_bytes=error.available_bytes,
            cost=None,
            estimate=None,
            suggestions=changes,
            compile_seconds=seconds,
            quantization=quantized,
        )
    seconds = time.monotonic() - began
    did = compute_step_cost(compiled, groups)
    tokens = (
        recipe.batch.size * recipe.batch.gradient_accumulation_steps * recipe.data.max_seq_length
    )
    if recipe.task == "preference":
        tokens *= 2
    time_of = estimate_step_time(did, found.chip, tokens=tokens, chips=mesh.size)
    room = int(found.chip.hbm_bytes)
    return TrainingPlan(
        topology=topology,
        chip=found.chip,
        mesh_shape=shape,
        memory=did.memory,
        available_bytes=room,
        cost=did,
        estimate=time_of,
        suggestions=[],
        compile_seconds=seconds,
        quantization=quantized,
    )


def _make_abstract_batch(recipe: Recipe, mesh: Mesh) -> Any:
    """The shapes of a batch of full rows."""
    place = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH_AXES))
    rows = (recipe.batch.gradient_accumulation_steps, recipe.batch.size)

    def shape(dtype: Any, *more: int) -> Any:
        return jax.ShapeDtypeStruct((*rows, *more), dtype, sharding=place)

    if recipe.task == "classification":
        ids = shape(jnp.int32, recipe.data.max_seq_length)
        return ClassificationBatch(ids, ids, ids, shape(jnp.int32), shape(jnp.float32))
    inner = (
        (2, recipe.data.max_seq_length)
        if recipe.task == "preference"
        else (recipe.data.max_seq_length,)
    )
    ids = shape(jnp.int32, *inner)
    return LMBatch(ids, ids, shape(jnp.float32, *inner), ids, ids)


def _suggest_for_recipe(
    recipe: Recipe,
    setup: Setup,
    memory: StepMemory,
    available_bytes: int,
    mesh_shape: dict[str, int],
) -> list[PlanSuggestion]:
    decoder = isinstance(setup.model, models.Decoder)
    config = setup.model.config
    return suggest_plan_changes(
        memory,
        available_bytes,
        mesh_shape=mesh_shape,
        batch_size=recipe.batch.size,
        seq_length=recipe.data.max_seq_length,
        remat_policy=recipe.model.remat_policy if decoder else "full",
        num_layers=len(config.layer_kind_ids) if decoder else config.num_layers,
        hidden_size=config.hidden_size,
    )
