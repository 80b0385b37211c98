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
from jlora.training import export, report, sharding
from jlora.training.checkpointing import CheckpointManager, check_writable
from jlora.training.data.batch_stream import StreamPosition
from jlora.training.data_loader import local_rows, make_eval_fn, make_test_fn, prefetch_to_device
from jlora.training.datasets import Datasets, load_datasets
from jlora.training.distributed import SignalHandler, initialize_distributed
from jlora.training.loop import LoopCallbacks, TrainLoop, TrainProgress
from jlora.training.metrics import (
    METRICS_FILE,
    MetricsLogger,
    make_metrics_loggers,
    read_metrics,
    to_strict_json,
)
from jlora.training.program_cache import ProgramCache
from jlora.training.progress import (
    Console,
    ThroughputMeter,
    describe_quantized_base,
    trainable_params_line,
)
from jlora.training.recipe.sections import Recipe
from jlora.training.report import RunSummary, make_result_json, make_run_overview
from jlora.training.resume import collect_run_metadata, resolve_defaults, restore_run
from jlora.training.setup import Setup, build_setup, model_from_recipe
from jlora.training.train_step import TrainState

REPORT_FILE, RECIPE_FILE, CHECKPOINTS_DIR = "report.html", "recipe.yaml", "checkpoints"

RESULT_FILE = "result.json"


class TrainResult(NamedTuple):
    """What a run came to.

    Attributes:
        stop_reason: "max_steps", "early_stopping" when evaluations got no better, or "paused" where it pauses.
        step: The last one.
        best_step: The step whose adapter was written: the best one, or the last. Where it pauses, the
            last one, whose adapter was not written yet.
        last_metrics: What the last step measured.
        test_metrics: The means on the test data, before and after; nothing without any.
        output_paths: Files and folders.
        paused_eval_metrics: The means on the validation data where it pauses; nothing elsewhere.
    """

    stop_reason: str
    step: int
    best_step: int
    last_metrics: dict[str, float]
    test_metrics: list[dict[str, float]]
    output_paths: list[Path]
    paused_eval_metrics: dict[str, float]


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    pause_after_step: int | None = None,
    metrics_loggers: Sequence[MetricsLogger] = (),
    devices: Sequence[Any] | None = None,
    program_cache: ProgramCache | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Trains what the recipe describes, and writes the adapter, exports and report to its folder.

    Args:
        recipe: Checked already.
        resume: Whether to go on from the last checkpoint in the folder.
        allow_changes: Whether data, base or hyperparameters may differ from those that the
            checkpoint was made with.
        pause_after_step: The step after which the run pauses: it is saved and evaluated, and nothing else is
            written. Learning rates stay those of all the recipe's steps, and `resume` goes on to
            the same bytes as without a pause. A run that has no more steps ends as ever.
        metrics_loggers: Take what is measured, besides metrics.jsonl.
        devices: Those that are used; all when left out.
        program_cache: What this run takes from earlier ones of the process, and leaves for later ones.
        quiet: Whether to show nothing.

    Raises:
        FileExistsError: There is a run in the folder, and it is not resumed.
        FileNotFoundError: The base or data are not there, or there is no checkpoint to resume.
        ValueError: Something of the recipe cannot be, the checkpoint is of another run, or the run
            is past `pause_after_step` already.
        RuntimeError: The optimizer's state was to be offloaded, and steps then come out wrong.
        NonFiniteError: A loss or gradient is not, and the recipe does not skip such steps.
        Interrupted: SIGTERM or SIGINT came; the step is saved.
        MemoryError: A step has no room on the devices.
        OSError: Something could not be written.
    """
    _check_pause_step(pause_after_step)
    initialize_distributed(recipe.distributed)
    say = Console(quiet or jax.process_index() > 0)
    output = _prepare_output_folder(recipe, resume)
    mesh = _build_recipe_mesh(recipe, devices)
    recipe = resolve_defaults(recipe, output / RECIPE_FILE, resume, list(mesh.devices.flat))
    data, setup, steps = _build(recipe, mesh, say, program_cache)
    export.check_exports(recipe, setup)
    prompts = export.tokenize_prompts(recipe, setup, data.tokenizer)
    saver = CheckpointManager(
        output / CHECKPOINTS_DIR, save_total_limit=recipe.training.save_total_limit
    )
    facts = collect_run_metadata(recipe, setup, data)
    state, progress = setup.state, TrainProgress()
    if resume:
        state, progress = restore_run(saver, setup, facts, allow_changes)
        say(f"Going on after step {progress.step} of {steps}.")
    _check_pause_step(pause_after_step, progress.step)
    if jax.process_index() == 0:
        _write_recipe(output / RECIPE_FILE, recipe)
    length = recipe.report.max_new_tokens
    before = export.generate_texts(setup, None, data.tokenizer, prompts, length)
    test = None if data.test is None else make_test_fn(setup, data.test)
    tested = [] if test is None else [test(setup.state.trainable)]

    validate = None if data.validation is None else make_eval_fn(setup, data.validation)
    own = make_metrics_loggers(
        output, tensorboard=recipe.report.tensorboard, resume_step=progress.step
    )
    every = [*own, *metrics_loggers]
    try:
        with (
            SignalHandler() as watch,
            say.progress_bar(steps, progress.step, ThroughputMeter(recipe, setup)) as show,
            prefetch_to_device(setup.mesh, data.train, StreamPosition(*progress.position)) as ahead,
        ):
            hooks = LoopCallbacks(every, show, validate)
            loop = TrainLoop(
                recipe, setup, state, progress, saver, facts, hooks, watch, steps, pause_after_step
            )
            why = loop.run(ahead)
    finally:
        for recorder in every:
            recorder.close()

    if why == "paused":
        saver.close()
        return TrainResult(
            why, progress.step, progress.step, loop.last_metrics, tested, [], loop.eval_metrics
        )
    state, kept = _best_state(loop.state, progress, saver)
    saver.close()
    if test is not None:
        tested.append(test(state.trainable))
    written = export.save_adapter_and_head(
        recipe, setup, state.trainable, facts["base"], data.label_names
    )
    adapter = export.combine_adapter(setup, state.trainable)
    after = export.generate_texts(setup, adapter, data.tokenizer, prompts, length)
    if jax.process_index() == 0:
        course = RunSummary(
            why, kept, steps, ahead.data_wait_s, tested, read_metrics(output / METRICS_FILE)
        )
        told = make_run_overview(recipe, setup, data, course)
        report.write_report(
            output / REPORT_FILE,
            title=f"jlora: {output.name}",
            run_overview=told,
            metrics=course.metrics,
            update_norms=_compute_update_norms(setup, state),
            samples=list(map(report.PromptSample, recipe.report.sample_prompts, before, after)),
        )
        _write_result(
            output / RESULT_FILE, {**make_result_json(setup, course), "versions": facts["versions"]}
        )
        written += [output / REPORT_FILE, output / RESULT_FILE]
        for name, value in told.items():
            say(f"{name}: {value}")
    # Last, because it may fail where nothing else does.
    written += export.write_exports(recipe, setup, state.trainable, data.label_names)
    for path in written:
        say(f"Wrote {path}.")
    return TrainResult(why, progress.step, kept, loop.last_metrics, tested, written, {})


def _check_pause_step(pause_after_step: int | None, step: int = 0) -> None:
    if pause_after_step is not None and pause_after_step < max(step, 1):
        where = f"the run has made {step}" if step else "the first is 1"
        raise ValueError(
            f"until={pause_after_step} is no step to pause after: {where}. Give a later one."
        )


def _write_recipe(path: Path, recipe: Recipe) -> None:
    dumped = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    path.write_text(dumped, encoding="utf-8")


def _write_result(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(to_strict_json(result), indent=2) + "\n", encoding="utf-8")


def _prepare_output_folder(recipe: Recipe, resume: bool) -> Path:
    """The folder of the run, in which something can be written and nothing is lost."""
    output = Path(recipe.output)
    exports = export.export_folders(recipe)
    base = Path(recipe.model.path).resolve()
    for folder in exports:
        if folder.resolve() in (base, *base.parents):
            raise ValueError(
                f"model.path={recipe.model.path!r} is in {folder}, which an export would replace. "
                f"Give another output."
            )
    if not resume and jax.process_index() == 0:
        steps = [path for path in (output / CHECKPOINTS_DIR).glob("*") if path.name.isdigit()]
        if steps or (output / export.ADAPTER_FILE).exists():
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


def _build_recipe_mesh(recipe: Recipe, devices: Sequence[Any] | None) -> Mesh:
    """The mesh of the recipe, which can share out its rows."""
    sizes = {name: size for name, size in recipe.mesh if size is not None}
    mesh = sharding.make_mesh(sizes, devices)
    for rows in (recipe.batch.size, recipe.batch.eval_batch_size or recipe.batch.size):
        sharding.check_batch_size(mesh, rows)
    return mesh


def _build(
    recipe: Recipe, mesh: Mesh, console: Console, program_cache: ProgramCache | None
) -> tuple[Datasets, Setup, int]:
    """The data, everything that is computed with, and how many steps there are."""
    folder = hub.resolve_checkpoint_folder(recipe.model.path, recipe.model.revision)
    config = model_from_recipe(recipe, folder).config
    if recipe.data.max_seq_length > config.max_seq_length:
        raise ValueError(
            f"data.max_seq_length={recipe.data.max_seq_length} runs past the {config.max_seq_length} tokens that the "
            f"base was made for. Give a smaller one."
        )
    rows = recipe.batch.size
    mine, evaluated = (local_rows(mesh, n) for n in (rows, recipe.batch.eval_batch_size or rows))
    reading = functools.partial(load_datasets, recipe, folder, config.vocab_size, mine, evaluated)
    data = reading() if program_cache is None else program_cache.get_datasets(recipe, mesh, reading)
    for path, told in data.source_reports.items():
        console(f"{path}: {told}")
    steps = recipe.training.steps or data.train.num_batches(recipe.training.epochs)
    if not steps:
        raise ValueError(
            f"training.epochs={recipe.training.epochs} of these data make no whole batch. Give "
            f"more epochs, more data, or training.steps."
        )
    labels = None if data.label_names is None else len(data.label_names)
    setup = build_setup(recipe, mesh, total_steps=steps, num_labels=labels)
    if program_cache is not None:
        setup = program_cache.reuse_programs(recipe, setup, steps, labels)
    console(trainable_params_line(setup))
    for name, told in describe_quantized_base(setup).items():
        console(f"{name}: {told}")
    return data, setup, steps


def _best_state(
    state: TrainState, progress: TrainProgress, checkpoints: CheckpointManager
) -> tuple[TrainState, int]:
    """The state of the best evaluation, or the last, and its step."""
    best = progress.best_step
    if best is None or best == progress.step:
        return state, progress.step
    if best not in checkpoints.all_steps():
        warnings.warn(
            f"The best checkpoint, of step {best}, could not be written; what is left is the last, "
            f"of step {progress.step}.",
            stacklevel=2,
        )
        return state, progress.step
    return checkpoints.restore(state, best).state, best


def _compute_update_norms(setup: Setup, state: TrainState) -> dict[str, Any]:
    """How far each weight moved; nothing where several processes hold parts of them."""
    if jax.process_count() > 1:
        return {}
    adapter = export.gather_adapter(setup, state.trainable)
    return report.relative_update_norms(setup.frozen["base"], adapter, setup.initial_adapter)
