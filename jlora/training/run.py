"""A run from its recipe to its end."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import yaml
from jax.sharding import Mesh

from jlora.checkpoints import hub
from jlora.training import ending, report
from jlora.training import mesh as meshes
from jlora.training.data.batches import Position
from jlora.training.interruption import Watch
from jlora.training.loop import Hooks, Loop, Progress
from jlora.training.placing import evaluation, placed_ahead, rows_here, test_of
from jlora.training.processes import connect
from jlora.training.reading import Datasets, read
from jlora.training.recipe.sections import Recipe
from jlora.training.records import METRICS, Recorder, plain, read_lines, recorders_of
from jlora.training.resuming import facts_of, resumed, settled
from jlora.training.saving import Saver, check_writable
from jlora.training.setup import Setup, model_of, set_up
from jlora.training.sharing import Shared
from jlora.training.step import State
from jlora.training.telling import Course, Shown, Talk, counted, figures, quantized, summary

PyTree = Any
REPORT, RECIPE, CHECKPOINTS = "report.html", "recipe.yaml", "checkpoints"
RESULT = "result.json"


class Outcome(NamedTuple):
    """What a run came to.

    Attributes:
        why: "steps", "patience" when evaluations got no better, or "until" where it pauses.
        step: The last one.
        kept: The step whose adapter was written: the best one, or the last. Where it pauses, the
            last one, whose adapter was not written yet.
        last: What the last step measured.
        tested: The means on the test data, before and after; nothing without any.
        written: Files and folders.
        paused: The means on the validation data where it pauses; nothing elsewhere.
    """

    why: str
    step: int
    kept: int
    last: dict[str, float]
    tested: list[dict[str, float]]
    written: list[Path]
    paused: dict[str, float]


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    until: int | None = None,
    recorders: Sequence[Recorder] = (),
    devices: Sequence[Any] | None = None,
    shared: Shared | None = None,
    quiet: bool = False,
) -> Outcome:
    """Trains what the recipe describes, and writes the adapter, exports and report to its folder.

    Args:
        recipe: Checked already.
        resume: Whether to go on from the last checkpoint in the folder.
        allow_changes: Whether data, base or hyperparameters may differ from those that the
            checkpoint was made with.
        until: The step after which the run pauses: it is saved and evaluated, and nothing else is
            written. Learning rates stay those of all the recipe's steps, and `resume` goes on to
            the same bytes as without a pause. A run that has no more steps ends as ever.
        recorders: Take what is measured, besides metrics.jsonl.
        devices: Those that are used; all when left out.
        shared: What this run takes from earlier ones of the process, and leaves for later ones.
        quiet: Whether to show nothing.

    Raises:
        FileExistsError: There is a run in the folder, and it is not resumed.
        FileNotFoundError: The base or data are not there, or there is no checkpoint to resume.
        ValueError: Something of the recipe cannot be, the checkpoint is of another run, or the run
            is past `until` already.
        RuntimeError: The optimizer's state was to be offloaded, and steps then come out wrong.
        NotFinite: A loss or gradient is not, and the recipe does not skip such steps.
        Interrupted: SIGTERM or SIGINT came; the step is saved.
        MemoryError: A step has no room on the devices.
        OSError: Something could not be written.
    """
    _check_until(until)
    connect(recipe.distributed)
    say = Talk(quiet or jax.process_index() > 0)
    output = _output(recipe, resume)
    mesh = _mesh(recipe, devices)
    recipe = settled(recipe, output / RECIPE, resume, list(mesh.devices.flat))
    data, setup, steps = _made(recipe, mesh, say, shared)
    ending.check(recipe, setup)
    prompts = ending.prompts_of(recipe, setup, data.tokenizer)
    saver = Saver(output / CHECKPOINTS, keep_last=recipe.training.keep_last)
    facts = facts_of(recipe, setup, data)
    state, progress = setup.state, Progress()
    if resume:
        state, progress = resumed(saver, setup, facts, allow_changes)
        say(f"Going on after step {progress.step} of {steps}.")
    _check_until(until, progress.step)
    if jax.process_index() == 0:
        _write_recipe(output / RECIPE, recipe)
    length = recipe.report.max_new_tokens
    before = ending.texts(setup, None, data.tokenizer, prompts, length)
    test = None if data.test is None else test_of(setup, data.test)
    tested = [] if test is None else [test(setup.state.trained)]

    validate = None if data.validation is None else evaluation(setup, data.validation)
    own = recorders_of(output, tensorboard=recipe.report.tensorboard, after=progress.step)
    every = [*own, *recorders]
    try:
        with (
            Watch() as watch,
            say.bar(steps, progress.step, Shown(recipe, setup)) as show,
            placed_ahead(setup.mesh, data.train, Position(*progress.position)) as ahead,
        ):
            hooks = Hooks(every, show, validate)
            loop = Loop(recipe, setup, state, progress, saver, facts, hooks, watch, steps, until)
            why = loop.run(ahead)
    finally:
        for recorder in every:
            recorder.close()

    if why == "until":
        saver.close()
        return Outcome(why, progress.step, progress.step, loop.last, tested, [], loop.means)
    state, kept = _kept(loop.state, progress, saver)
    saver.close()
    if test is not None:
        tested.append(test(state.trained))
    written = ending.write(recipe, setup, state.trained, facts["base"], data.labels)
    adapter = ending.whole_adapter(setup, state.trained)
    after = ending.texts(setup, adapter, data.tokenizer, prompts, length)
    if jax.process_index() == 0:
        course = Course(why, kept, steps, ahead.waited_s, tested, read_lines(output / METRICS))
        told = summary(recipe, setup, data, course)
        report.write(
            output / REPORT,
            title=f"jlora: {output.name}",
            facts=told,
            lines=course.lines,
            changes=_changes(setup, state),
            samples=list(map(report.Sample, recipe.report.prompts, before, after)),
        )
        _write_result(output / RESULT, {**figures(setup, course), "versions": facts["versions"]})
        written += [output / REPORT, output / RESULT]
        for name, value in told.items():
            say(f"{name}: {value}")
    # Last, because it may fail where nothing else does.
    written += ending.export(recipe, setup, state.trained, data.labels)
    for path in written:
        say(f"Wrote {path}.")
    return Outcome(why, progress.step, kept, loop.last, tested, written, {})


def _check_until(until: int | None, step: int = 0) -> None:
    if until is not None and until < max(step, 1):
        where = f"the run has made {step}" if step else "the first is 1"
        raise ValueError(f"until={until} is no step to pause after: {where}. Give a later one.")


def _write_recipe(path: Path, recipe: Recipe) -> None:
    dumped = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    path.write_text(dumped, encoding="utf-8")


def _write_result(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(plain(result), indent=2) + "\n", encoding="utf-8")


def _output(recipe: Recipe, resume: bool) -> Path:
    """The folder of the run, in which something can be written and nothing is lost."""
    output = Path(recipe.output)
    exports = ending.export_folders(recipe)
    base = Path(recipe.model.path).resolve()
    for folder in exports:
        if folder.resolve() in (base, *base.parents):
            raise ValueError(
                f"model.path={recipe.model.path!r} is in {folder}, which an export would replace. "
                f"Give another output."
            )
    if not resume and jax.process_index() == 0:
        steps = [path for path in (output / CHECKPOINTS).glob("*") if path.name.isdigit()]
        if steps or (output / ending.ADAPTER).exists():
            raise FileExistsError(
                f"{output} holds a run, which is left as it was. Go on with --resume, or give "
                f"another --output."
            )
        for folder in exports:
            if folder.exists():
                raise FileExistsError(
                    f"{folder} is there already, and is left as it was. Remove it, or give "
                    f"another --output."
                )
    check_writable(output)
    return output


def _mesh(recipe: Recipe, devices: Sequence[Any] | None) -> Mesh:
    """The mesh of the recipe, which can share out its rows."""
    sizes = {name: size for name, size in recipe.mesh if size is not None}
    mesh = meshes.make_mesh(sizes, devices)
    for rows in (recipe.batch.rows, recipe.batch.evaluation_rows or recipe.batch.rows):
        meshes.check_batch(mesh, rows)
    return mesh


def _made(
    recipe: Recipe, mesh: Mesh, say: Talk, shared: Shared | None
) -> tuple[Datasets, Setup, int]:
    """The data, everything that is computed with, and how many steps there are."""
    folder = hub.folder_of(recipe.model.path, recipe.model.revision)
    config = model_of(recipe, folder).config
    if recipe.data.length > config.max_length:
        raise ValueError(
            f"data.length={recipe.data.length} runs past the {config.max_length} tokens that the "
            f"base was made for. Give a smaller one."
        )
    rows = recipe.batch.rows
    mine, evaluated = (rows_here(mesh, n) for n in (rows, recipe.batch.evaluation_rows or rows))
    reading = functools.partial(read, recipe, folder, config.vocab_size, mine, evaluated)
    data = reading() if shared is None else shared.data(recipe, mesh, reading)
    for path, told in data.reports.items():
        say(f"{path}: {told}")
    steps = recipe.training.steps or data.train.steps(recipe.training.epochs)
    if not steps:
        raise ValueError(
            f"training.epochs={recipe.training.epochs} of these data make no whole batch. Give "
            f"more epochs, more data, or training.steps."
        )
    labels = None if data.labels is None else len(data.labels)
    setup = set_up(recipe, mesh, steps=steps, labels=labels)
    if shared is not None:
        setup = shared.programs(recipe, setup, steps, labels)
    say(counted(setup))
    for name, told in quantized(setup).items():
        say(f"{name}: {told}")
    return data, setup, steps


def _kept(state: State, progress: Progress, saver: Saver) -> tuple[State, int]:
    """The state of the best evaluation, or the last, and its step."""
    best = progress.best_step
    if best is None or best == progress.step:
        return state, progress.step
    if best not in saver.steps():
        warnings.warn(
            f"The best checkpoint, of step {best}, could not be written; what is left is the last, "
            f"of step {progress.step}.",
            stacklevel=2,
        )
        return state, progress.step
    return saver.restore(state, best).state, best


def _changes(setup: Setup, state: State) -> dict[str, Any]:
    """How far each weight moved; nothing where several processes hold parts of them."""
    if jax.process_count() > 1:
        return {}
    adapter = ending.adapter_of(setup, state.trained)
    return report.norms(setup.frozen["base"], adapter, setup.fresh)
