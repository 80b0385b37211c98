"""A run from its recipe to its end."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from jlora import models
from jlora.checkpoints import hub
from jlora.optim.labels import combine
from jlora.training import ending
from jlora.training import mesh as meshes
from jlora.training import report as reports
from jlora.training.data.arrays import Classes
from jlora.training.data.batches import Batch, Position, Stream
from jlora.training.data.prefetching import prefetch
from jlora.training.interruption import Watch
from jlora.training.loop import Hooks, Loop, Placed, Progress, means_of
from jlora.training.reading import Datasets, read
from jlora.training.recipe.sections import Distributed, Recipe
from jlora.training.records import JsonLines, Recorder, TensorBoard, read_lines
from jlora.training.saving import Saver, check_writable
from jlora.training.setup import Setup, model_of, set_up
from jlora.training.speed import flops_per_token, peak_memory_gib, peak_tflops
from jlora.training.step import State

PyTree = Any
METRICS, REPORT, RECIPE, CHECKPOINTS = "metrics.jsonl", "report.html", "recipe.yaml", "checkpoints"
# What a run may not change while it goes on; all else may differ when it is resumed.
_BOUND = ("seed", "lora", "more", "frozen", "optimizer", "preference", "classification")


_VERSIONS = ("jax", "jaxlib", "flax", "optax")


class Outcome(NamedTuple):
    """What a run came to.

    Attributes:
        why: "steps", or "patience" when evaluations got no better.
        step: The last one.
        kept: The step whose adapter was written: the best one, or the last.
        last: What the last step measured.
        tested: The means on the test data, before and after; nothing without any.
        written: Files and folders.
    """

    why: str
    step: int
    kept: int
    last: dict[str, float]
    tested: list[dict[str, float]]
    written: list[Path]


def connect(options: Distributed) -> None:
    """Joins the processes of a run, before anything else is asked of JAX.

    Raises:
        RuntimeError: They do not find each other.
    """
    arguments = joining(options, os.environ)
    if arguments is not None:
        jax.distributed.initialize(**arguments)


def joining(options: Distributed, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is called with; None for a process alone.

    Raises:
        ValueError: A variable is no number.
    """
    if options.coordinator is not None:
        return {
            "coordinator_address": options.coordinator,
            "num_processes": options.processes,
            "process_id": options.process,
        }
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address is None:
        return {} if options.auto else None
    found: dict[str, Any] = {"coordinator_address": address}
    for name, variable in (
        ("num_processes", "JAX_NUM_PROCESSES"),
        ("process_id", "JAX_PROCESS_ID"),
    ):
        text = environment.get(variable)
        if text is not None and not text.isdigit():
            raise ValueError(f"{variable}={text!r} is no number. Set it to one, or unset it.")
        found[name] = None if text is None else int(text)
    return found


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    recorders: Sequence[Recorder] = (),
    devices: Sequence[Any] | None = None,
    quiet: bool = False,
) -> Outcome:
    """Trains what the recipe describes, and writes the adapter, exports and report to its folder.

    Args:
        recipe: Checked already.
        resume: Whether to go on from the last checkpoint in the folder.
        allow_changes: Whether data, base or hyperparameters may differ from those that the
            checkpoint was made with.
        recorders: Take what is measured, besides metrics.jsonl.
        devices: Those that are used; all when left out.
        quiet: Whether to show nothing.

    Raises:
        FileExistsError: There is a run in the folder, and it is not resumed.
        FileNotFoundError: The base or data are not there, or there is no checkpoint to resume.
        ValueError: Something of the recipe cannot be, or the checkpoint is of another run.
        NotFinite: A loss or gradient is not, and the recipe does not skip such steps.
        Interrupted: SIGTERM or SIGINT came; the step is saved.
        OSError: Something could not be written.
    """
    connect(recipe.distributed)
    output = Path(recipe.output)
    checkpoints = output / CHECKPOINTS
    if not resume and (checkpoints.exists() or (output / METRICS).exists()):
        raise FileExistsError(
            f"{output} holds a run, which is left as it was. Go on with --resume, or give another "
            f"--output."
        )
    say = _Talk(quiet or jax.process_index() > 0)
    sizes = {"fsdp": recipe.mesh.fsdp, "tensor": recipe.mesh.tensor}
    if recipe.mesh.data is not None:
        sizes["data"] = recipe.mesh.data
    mesh = meshes.make_mesh(sizes, devices)
    evaluation_rows = recipe.batch.evaluation_rows or recipe.batch.rows
    for rows in (recipe.batch.rows, evaluation_rows):
        meshes.check_batch(mesh, rows)
    check_writable(output)
    folder = hub.folder_of(recipe.model.path, recipe.model.revision)
    model = model_of(recipe, folder)
    _check_length(recipe, model)
    mine, evaluated = (_mine(mesh, rows) for rows in (recipe.batch.rows, evaluation_rows))
    data = read(recipe, folder, model.config.vocab_size, mine, evaluated)
    for path, told in data.reports.items():
        say(f"{path}: {told}")
    steps = recipe.training.steps or data.train.steps(recipe.training.epochs)
    labels = None if data.labels is None else len(data.labels)
    setup = set_up(recipe, mesh, steps=steps, labels=labels)
    say(_counted(setup))
    saver = Saver(checkpoints, keep_last=recipe.training.keep_last)
    facts = _facts(recipe, setup, data)
    state, progress = setup.state, Progress()
    if resume:
        state, progress = _resumed(saver, setup, facts, allow_changes)
        say(f"Going on after step {progress.step} of {steps}.")
    if jax.process_index() == 0:
        (output / RECIPE).write_text(
            yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        )
    prompts = _prompts(recipe, data)
    before = _written(recipe, setup, None, data, prompts)
    test = _evaluation(setup, data.test, mesh)
    tested = [] if test is None else [test(setup.state.trained)]
    every = [*_recorders(recipe, progress.step), *recorders]
    start = time.monotonic()
    with Watch() as watch, say.bar(steps, progress.step, _Shown(recipe, setup)) as show:
        hooks = Hooks(every, show, _evaluation(setup, data.validation, mesh))
        loop = Loop(recipe, setup, state, progress, saver, facts, hooks, watch, steps)
        batches = data.train.batches(Position(*progress.position))
        place = functools.partial(_placed, mesh, data.train)
        try:
            with prefetch(batches, place) as ahead:
                why = loop.run(ahead)
                waited = ahead.waited_s
        finally:
            for recorder in every:
                recorder.close()
    seconds = time.monotonic() - start
    state, kept = loop.state, progress.step
    if progress.best_step is not None and progress.best_step != progress.step:
        kept = progress.best_step
        state = saver.restore(state, kept).state
    saver.close()
    if test is not None:
        tested.append(test(state.trained))
    written = ending.write(recipe, setup, state.trained, facts["base"], data.labels)
    adapter = combine(state.trained["adapter"], setup.frozen["adapter"])
    after = _written(recipe, setup, adapter, data, prompts)
    if jax.process_index() == 0:
        lines = read_lines(output / METRICS)
        told = _told(recipe, setup, data, lines, why, kept, steps, seconds, waited, tested)
        samples = [
            reports.Sample(*texts)
            for texts in zip(recipe.report.prompts, before, after, strict=True)
        ]
        changes = {} if jax.process_count() > 1 else reports.norms(setup.frozen["base"], adapter)
        reports.write(
            output / REPORT,
            title=f"jlora: {output.name}",
            facts=told,
            lines=lines,
            changes=changes,
            samples=samples,
        )
        written.append(output / REPORT)
        for name, value in told.items():
            say(f"{name}: {value}")
    for path in written:
        say(f"Wrote {path}.")
    return Outcome(why, progress.step, kept, loop.last, tested, written)


# --- data on devices -----------------------------------------------------------------------------


def _sharding(mesh: Mesh) -> NamedSharding:
    """Of batches, whose axes are passes and rows first."""
    return NamedSharding(mesh, PartitionSpec(None, meshes.BATCH))


def _mine(mesh: Mesh, rows: int) -> slice:
    """The rows of a batch that devices of this process hold."""
    indices = _sharding(mesh).addressable_devices_indices_map((1, rows)).values()
    parts = [part[1].indices(rows) for part in indices if part is not None]
    return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def _placed(mesh: Mesh, stream: Stream, given: tuple[Position, Batch]) -> Placed:
    """A batch on the devices."""
    after, batch = given
    first = stream.mine.indices(stream.batching.rows)[0]
    sharding = _sharding(mesh)

    def put(array: np.ndarray) -> jax.Array:
        shape = (array.shape[0], stream.batching.rows, *array.shape[2:])

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(shape[1])
            return array[(index[0], slice(start - first, stop - first), *index[2:])]

        return jax.make_array_from_callback(shape, sharding, part)

    held = batch.arrays
    tokens = int(np.count_nonzero(held.mask if isinstance(held, Classes) else held.segments))
    arrays = jax.tree.map(put, held)
    return Placed(arrays, batch.ids, (after.epoch, after.batch), after.batch == 0, tokens)


def _evaluation(
    setup: Setup, stream: Stream | None, mesh: Mesh
) -> Callable[[PyTree], dict[str, float]] | None:
    """From the trained arrays to the means over all of a stream's examples; None without any."""
    if stream is None:
        return None

    def evaluate(trained: PyTree) -> dict[str, float]:
        place = functools.partial(_placed, mesh, stream)
        with prefetch(stream.batches(epochs=1), place) as ahead:
            return means_of(setup.evaluate(trained, setup.frozen, b.arrays) for b in ahead)

    return evaluate


def _check_length(recipe: Recipe, model: Any) -> None:
    if recipe.data.length > model.config.max_length:
        raise ValueError(
            f"data.length={recipe.data.length} runs past the {model.config.max_length} tokens that "
            f"the base was made for. Give a smaller one."
        )


# --- going on ------------------------------------------------------------------------------------


def _facts(recipe: Recipe, setup: Setup, data: Datasets) -> dict[str, Any]:
    """What a checkpoint says of the run that it is of."""
    dumped = recipe.model_dump(mode="json")
    return {
        "recipe": {name: dumped[name] for name in _BOUND},
        "schedule": {name: dumped["training"][name] for name in ("epochs", "steps")},
        "data": data.train.fingerprint,
        "tokenizer": data.tokenizer.fingerprint,
        "base": setup.fingerprints,
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
    }


def _resumed(
    saver: Saver, setup: Setup, facts: dict[str, Any], allow_changes: bool
) -> tuple[State, Progress]:
    """The state and progress of the last checkpoint.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or of another run.
    """
    restored = saver.restore(setup.state)
    changed = [name for name in facts if facts[name] != restored.facts[name] and name != "versions"]
    if changed and not allow_changes:
        told = [_difference(name, restored.facts[name], facts[name]) for name in changed]
        raise ValueError(
            f"The checkpoint of step {restored.step} in {saver.folder} was made with another "
            f"{'; another '.join(told)}. Resume with what it was made with, or say "
            f"--allow-changes to go on all the same."
        )
    if facts["versions"] != restored.facts["versions"]:
        warnings.warn(
            f"The checkpoint was made with {restored.facts['versions']}, and this is "
            f"{facts['versions']}: the same to the last bit is not to be expected.",
            stacklevel=2,
        )
    return restored.state, Progress.of(restored.facts["progress"])


def _difference(name: str, old: Any, new: Any) -> str:
    """What changed of one fact, as far as it can be said in a line."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        if name == "base":
            return f"base (the weight {keys[0]!r} has other numbers)"
        parts = [f"{key}: {old.get(key)} there, {new.get(key)} here" for key in keys]
        return f"{name} ({'; '.join(parts)})"
    return name


# --- what is told --------------------------------------------------------------------------------


class _Talk:
    """Lines and a progress bar, or silence."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    def __call__(self, text: str) -> None:
        if not self._quiet:
            tqdm.write(text)

    def bar(self, steps: int, done: int, shown: _Shown) -> _Bar:
        return _Bar(
            tqdm(total=steps, initial=done, unit="step", disable=self._quiet, file=sys.stderr),
            shown,
        )


class _Shown:
    """The few numbers beside the bar."""

    def __init__(self, recipe: Recipe, setup: Setup) -> None:
        peak = recipe.report.peak_tflops or peak_tflops(setup.mesh.devices.flat[0])
        self._flops = flops_per_token(
            setup.model, setup.frozen["base"], setup.state.trained, recipe.data.length
        )
        self._peak = None if peak is None else peak * 1e12 * setup.mesh.size

    def text(self, values: dict[str, float]) -> str:
        speed = values["tokens"] / values["seconds"] if values["seconds"] else 0.0
        parts = [f"loss {values['loss']:.3f}", f"{speed:,.0f} tokens/s"]
        if self._peak is not None:
            parts.append(f"{speed * self._flops / self._peak:.0%} of peak")
        return ", ".join([*parts, f"{peak_memory_gib():.1f} GiB"])


class _Bar:
    """Shows every step's numbers."""

    def __init__(self, bar: Any, shown: _Shown) -> None:
        self._bar, self._shown = bar, shown

    def __enter__(self) -> Any:
        def show(step: int, values: dict[str, float]) -> None:
            self._bar.set_postfix_str(self._shown.text(values), refresh=False)
            self._bar.update(step - self._bar.n)

        return show

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _recorders(recipe: Recipe, after: int) -> Iterator[Recorder]:
    if jax.process_index() > 0:
        return
    yield JsonLines(Path(recipe.output) / METRICS, after=after)
    if recipe.report.tensorboard:
        yield TensorBoard(Path(recipe.output) / "tensorboard", after=after)


def _counted(setup: Setup) -> str:
    trained = sum(array.size for array in jax.tree.leaves(setup.state.trained))
    base = sum(array.size for array in jax.tree.leaves(setup.frozen["base"]))
    return f"{trained:,} numbers are trained, {trained / base:.2%} of the base's {base:,}."


def _prompts(recipe: Recipe, data: Datasets) -> list[list[int]]:
    """The tokens of the prompts, as the model is used to them."""
    tokenizer, prompts = data.tokenizer, recipe.report.prompts
    if recipe.data.train[0].format != "chat" or tokenizer.template is None:
        return [[*tokenizer.before, *ids] for ids in tokenizer.encode(prompts)]
    chats = ([{"role": "user", "content": prompt}] for prompt in prompts)
    render = functools.partial(tokenizer.template.render, add_generation_prompt=True)
    return tokenizer.encode([render(chat) for chat in chats])


def _written(
    recipe: Recipe, setup: Setup, adapter: PyTree | None, data: Datasets, prompts: list[list[int]]
) -> list[str]:
    if not isinstance(setup.model, models.Decoder) or recipe.task == "classification":
        return [""] * len(prompts)
    tokens = recipe.report.max_new_tokens
    with meshes.active(setup.mesh):
        return ending.texts(setup, adapter, data.tokenizer, prompts, tokens)


def _told(
    recipe: Recipe,
    setup: Setup,
    data: Datasets,
    lines: Sequence[dict[str, Any]],
    why: str,
    kept: int,
    steps: int,
    seconds: float,
    waited: float,
    tested: Sequence[dict[str, float]],
) -> dict[str, str]:
    """What the report begins with."""
    stepped = [line for line in lines if "loss" in line]
    held = [line for line in lines if "validation_loss" in line]
    told = {
        "base": recipe.model.path,
        "adapter": ", ".join(rule.family for rule in (*recipe.more, recipe.lora)),
        "trained": _counted(setup),
        "devices": f"{setup.mesh.size} x {setup.mesh.devices.flat[0].device_kind}",
        "steps": f"{len(stepped)} of {steps}",
        "time": f"{seconds:.0f} s, of which the devices waited {waited:.0f} s for data",
        "loss": f"{_mean(stepped[:10])} at first, {_mean(stepped[-10:])} at last",
    }
    if why == "patience":
        told["steps"] += f": no better evaluation in {recipe.training.patience}"
    for path, said in data.reports.items():
        told[path] = said
    for name in tested[0] if tested else ():
        told[f"test {name}"] = " before, ".join(f"{one[name]:.4f}" for one in tested) + " after"
    if held:
        best = next(line for line in held if line["step"] == kept) if kept else held[-1]
        measured = {name: value for name, value in best.items() if name != "step"}
        values = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
        told["validation"] = f"{values} at step {best['step']}, whose adapter was kept"
    return told


def _mean(lines: Sequence[dict[str, Any]]) -> str:
    values = [line["loss"] for line in lines if math.isfinite(line["loss"])]
    return f"{np.mean(values):.4f}" if values else "none"
