"""A recipe's own step, compiled ahead of time for a TPU that is not here."""

from __future__ import annotations

import collections
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import models
from jlora.kernels.adapted import plain_products
from jlora.planning.compiled import DoesNotFit, Measured, Memory, compile_step, gib, measured
from jlora.planning.roofline import Change, Estimate, advice, estimate
from jlora.planning.topology import Chip, devices_of
from jlora.quantization.rules import Held, held
from jlora.training import mesh as meshes
from jlora.training.data.arrays import Classes, Language
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import Setup, set_up

# The learning rate alone depends on it.
_STEPS = 1000


class Plan(NamedTuple):
    """What a recipe's step needs on a topology.

    Attributes:
        topology: Its name.
        chip: What each chip can do.
        mesh: Sizes of its axes.
        memory: What each chip holds.
        available: What it may hold.
        measured: What a step does; None where it does not fit.
        estimate: Of its time; None where it does not fit.
        changes: What would make it fit, or nothing.
        seconds: That compiling took.
        quantized: What the quantised weights of the base take in all; None without any.
    """

    topology: str
    chip: Chip
    mesh: dict[str, int]
    memory: Memory
    available: int
    measured: Measured | None
    estimate: Estimate | None
    changes: list[Change]
    seconds: float
    quantized: Held | None = None

    @property
    def fits(self) -> bool:
        """Whether a step can run there."""
        return self.measured is not None

    def __str__(self) -> str:
        chips = 1
        for size in self.mesh.values():
            chips *= size
        sizes = ", ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        lines = [
            f"{self.topology}: {chips} chips of {gib(self.chip.hbm_bytes)}, as {sizes}; compiled "
            f"in {self.seconds:.0f} s",
            *([] if self.quantized is None else [f"quantised: {self.quantized}"]),
            "",
            "memory of each chip",
            *(f"  {name:<12} {gib(size):>12}" for name, size in self.memory.arguments.items()),
            f"  {'temporaries':<12} {gib(self.memory.temporaries):>12}",
        ]
        other = self.memory.padding + self.memory.outputs + self.memory.program
        lines += [f"  {'other':<12} {gib(other):>12}"] if other else []
        word = "fits" if self.fits else "does not fit"
        lines.append(
            f"  {'in all':<12} {gib(self.memory.peak):>12}  of {gib(self.available)}: {word}"
        )
        if self.memory.host:
            lines.append(f"  {'on the host':<12} {gib(self.memory.host):>12}  for each chip")
        lines += self._changes() if self.changes else []
        return "\n".join([*lines, *self._step()])

    def _changes(self) -> list[str]:
        lines = ["", "what would make it fit"]
        for change in self.changes:
            enough = "enough alone" if change.fits else "not enough alone"
            lines.append(f"  {change.what} ({gib(change.frees)} less, {enough})")
        return lines

    def _step(self) -> list[str]:
        if self.measured is None or self.estimate is None:
            return []
        each = collections.Counter(one.kind for one in self.measured.collectives)
        moved: dict[str, tuple[float, float]] = {}
        for one in self.measured.collectives:
            times, size = moved.get(one.kind, (0.0, 0.0))
            moved[one.kind] = times + one.times, size + one.bytes
        low, high = self.estimate.tokens_per_s
        lines = [
            "",
            "a step, on each chip",
            f"  products     {self.measured.flops / 1e12:>10.2f} TFLOP, "
            f"{1e3 * self.estimate.compute_s:.1f} ms at the peak",
            f"  memory       {self.measured.hbm_bytes / 1e9:>10.2f} GB, "
            f"{1e3 * self.estimate.hbm_s:.1f} ms at its bandwidth",
            f"  exchanged    {self.measured.ici_bytes / 1e9:>10.2f} GB, "
            f"{1e3 * self.estimate.ici_s:.1f} ms at that of the links",
        ]
        for kind in each:
            times, size = moved[kind]
            lines.append(f"    {kind} {times:,.0f} times, {size / 1e9:.2f} GB")
        lines += [
            "",
            f"bounds: {low:,.0f} tokens/s if nothing overlaps, {high:,.0f} if all does; most of "
            f"the time goes to {_SAID[self.estimate.bound]}",
        ]
        if self.measured.unknown_loops:
            lines.append(f"{self.measured.unknown_loops} loops of unknown length count once.")
        return lines


_SAID = {"compute": "products", "hbm": "the chip's memory", "ici": "exchange between chips"}


def plan(recipe: Recipe, topology: str) -> Plan:
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
    found = devices_of(topology)
    sizes = {name: size for name, size in recipe.mesh if size is not None}
    mesh = meshes.make_mesh(sizes, found.devices)
    meshes.check_batch(mesh, recipe.batch.rows)
    labels = len(recipe.classification.labels or ("no", "yes"))
    setup = set_up(recipe, mesh, steps=_STEPS, labels=labels, abstract=True)
    batch = _batch(recipe, mesh)
    groups = {
        "weights": setup.frozen["base"],
        "adapter": (setup.state.trained, setup.frozen["adapter"]),
        "optimizer": setup.state._replace(trained=None),
        "batch": batch,
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    began = time.monotonic()
    with plain_products():  # A host's own GPU has kernels that the target has not.
        lowered = setup.step.lower(setup.state, setup.frozen, batch, key)
    shape, quantized = dict(mesh.shape), held(setup.frozen["base"])
    try:
        compiled = compile_step(lowered, groups)
    except DoesNotFit as error:
        changes = _changes(recipe, setup, error.memory, error.available, shape)
        seconds = time.monotonic() - began
        return Plan(
            topology=topology,
            chip=found.chip,
            mesh=shape,
            memory=error.memory,
            available=error.available,
            measured=None,
            estimate=None,
            changes=changes,
            seconds=seconds,
            quantized=quantized,
        )
    seconds = time.monotonic() - began
    did = measured(compiled, groups)
    tokens = recipe.batch.rows * recipe.batch.accumulate * recipe.data.length
    if recipe.task == "preference":
        tokens *= 2
    time_of = estimate(did, found.chip, tokens=tokens, chips=mesh.size)
    room = int(found.chip.hbm_bytes)
    return Plan(
        topology=topology,
        chip=found.chip,
        mesh=shape,
        memory=did.memory,
        available=room,
        measured=did,
        estimate=time_of,
        changes=[],
        seconds=seconds,
        quantized=quantized,
    )


def _batch(recipe: Recipe, mesh: Mesh) -> Any:
    """The shapes of a batch of full rows."""
    place = NamedSharding(mesh, PartitionSpec(None, meshes.BATCH))
    rows = (recipe.batch.accumulate, recipe.batch.rows)

    def shape(dtype: Any, *more: int) -> Any:
        return jax.ShapeDtypeStruct((*rows, *more), dtype, sharding=place)

    if recipe.task == "classification":
        ids = shape(jnp.int32, recipe.data.length)
        return Classes(ids, ids, ids, shape(jnp.int32), shape(jnp.float32))
    inner = (2, recipe.data.length) if recipe.task == "preference" else (recipe.data.length,)
    ids = shape(jnp.int32, *inner)
    return Language(ids, ids, shape(jnp.float32, *inner), ids, ids)


def _changes(
    recipe: Recipe, setup: Setup, memory: Memory, available: int, mesh: dict[str, int]
) -> list[Change]:
    decoder = isinstance(setup.model, models.Decoder)
    config = setup.model.config
    return advice(
        memory,
        available,
        mesh=mesh,
        rows=recipe.batch.rows,
        length=recipe.data.length,
        remat=recipe.model.remat if decoder else "everything",
        layers=len(config.layers) if decoder else config.num_layers,
        width=config.hidden_size,
    )
