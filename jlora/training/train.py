"""Training runs: from a recipe to an adapter, its exports and a report."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import yaml
from jax.sharding import Mesh

from jlora.checkpoints import hub
from jlora.checkpoints.output_lock import lock_output
from jlora.checkpoints.safetensors_io import remove_partial_outputs, replace_file_atomically
from jlora.training import export, report, sharding
from jlora.training.callbacks import Callback
from jlora.training.checkpointing import CheckpointManager, CheckpointSaver, check_writable
from jlora.training.data.batch_stream import StreamPosition
from jlora.training.data_loader import local_rows, prefetch_to_device
from jlora.training.datasets import Datasets, load_datasets
from jlora.training.evaluation import Evaluator, make_eval_fn, make_test_fn
from jlora.training.loop import NonFiniteGuard, TrainLoop, TrainProgress
from jlora.training.metrics import (
    METRICS_FILE,
    JsonlMetricsLogger,
    MetricsLogger,
    TensorBoardLogger,
    read_metrics,
    to_strict_json,
)
from jlora.training.program_cache import ProgramCache
from jlora.training.progress import (
    Console,
    ProgressBar,
    ThroughputMeter,
    compilation_line,
    describe_attention,
    describe_quantized_base,
    trainable_params_line,
)
from jlora.training.recipe.sections import Recipe
from jlora.training.recipe_checks import check_recipe
from jlora.training.report import RunSummary
from jlora.training.resume import (
    collect_run_metadata,
    forget_unused_date,
    resolve_defaults,
    restore_run,
)
from jlora.training.runtime import initialize_distributed, user_compilation_cache
from jlora.training.setup import Setup, build_setup, model_from_recipe
from jlora.training.signals import SignalHandler
from jlora.training.train_step import TrainState
from jlora.training.wandb_logger import WandbLogger

REPORT_FILE, RECIPE_FILE, RESULT_FILE = "report.html", "recipe.yaml", "result.json"

CHECKPOINTS_DIR = "checkpoints"


class TrainResult(NamedTuple):
    """Result of `train`.

    Attributes:
        stop_reason: "max_steps", "early_stopping" when evaluations no longer improved, "paused", or
            the `stop_reason` of the callback that requested the end.
        step: Last step.
        best_step: Step of the written adapter: that of the best evaluation, or the last one without
            evaluations. At a pause, the last step; its adapter is not written yet.
        last_metrics: Metrics of the last step, as in metrics.jsonl.
        test_metrics: Means on the test data before and after training; empty without test data.
        output_paths: Files and folders that were written; empty at a pause.
        paused_eval_metrics: Means on the validation data at a pause; empty otherwise.

    Example:
        >>> from jlora.training import TrainResult
        >>> result = TrainResult("max_steps", 9, 6, {"train/loss": 0.9}, [], [], {})
        >>> result.best_step
        6
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
    callbacks: Sequence[Callback] = (),
    devices: Sequence[Any] | None = None,
    program_cache: ProgramCache | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Trains from a recipe and writes the adapter, exports and report to the output folder.

    Programs for GPUs and TPUs are kept in $XDG_CACHE_HOME/jlora/programs, at most 10 GiB of them,
    so that the next run starts sooner. JAX_COMPILATION_CACHE_DIR is another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false keeps none.

    Args:
        recipe: Validated recipe.
        resume: Whether to continue from the last checkpoint in the output folder.
        allow_changes: Whether data, base or hyperparameters may differ from the checkpoint's.
        pause_after_step: Step after which the run pauses: it saves a checkpoint, evaluates, and
            writes nothing else. The learning rate schedule stays that of all steps, and a resumed
            run gives the same bytes as one without a pause. None, or a step after the last one: no
            pause.
        callbacks: Further callbacks, such as loggers and stopping conditions. They are called after
            those that write metrics.jsonl, and closed at the end.
        devices: Devices of the mesh; None: all devices.
        program_cache: Cache of data and compiled steps, shared with other runs of the process.
        quiet: Whether to print nothing.

    Returns:
        The stop reason, metrics and written paths.

    Raises:
        FileExistsError: The output folder has a run, and `resume` is false.
        FileNotFoundError: The base, data, or the checkpoint to resume from does not exist.
        ImportError: The recipe logs to W&B, and wandb is not installed.
        TypeError: `recipe` is not a Recipe, or `callbacks` not a list of callbacks.
        ValueError: The recipe does not fit the base, data or devices; the checkpoint belongs to
            another run; or the run is past `pause_after_step`.
        RuntimeError: The devices compute wrong steps with an offloaded optimizer state.
        NonFiniteError: A loss or gradient is not finite, and the recipe does not skip the step.
        TrainingInterrupted: SIGTERM or SIGINT arrived; the state is saved.
        MemoryError: The devices are out of memory.
        OutputInUseError: Another process is writing the output folder.
        OSError: A file cannot be written.

    Example:
        >>> from jlora.training import recipe, train
        >>> train(recipe.load("recipe.yaml"))  # doctest: +SKIP
    """
    _check_arguments(recipe, callbacks)
    _check_pause_step(pause_after_step)
    initialize_distributed(recipe.distributed)
    lock = lock_output if jax.process_index() == 0 else contextlib.nullcontext
    check_writable(Path(recipe.output))
    with lock(recipe.output), user_compilation_cache() as cache_folder:
        return _train_locked(
            recipe,
            cache_folder=cache_folder,
            resume=resume,
            allow_changes=allow_changes,
            pause_after_step=pause_after_step,
            callbacks=callbacks,
            devices=devices,
            program_cache=program_cache,
            quiet=quiet,
        )


def _train_locked(
    recipe: Recipe,
    *,
    cache_folder: Path | None,
    resume: bool,
    allow_changes: bool,
    pause_after_step: int | None,
    callbacks: Sequence[Callback],
    devices: Sequence[Any] | None,
    program_cache: ProgramCache | None,
    quiet: bool,
) -> TrainResult:
    """Implements `train` in an output folder that no other process writes."""
    console = Console(quiet or jax.process_index() > 0)
    output = _prepare_output_folder(recipe, resume)
    if jax.process_index() == 0:
        remove_partial_outputs(output)
    loggers = _make_metrics_loggers(recipe)
    mesh = _build_recipe_mesh(recipe, devices)
    given_date = recipe.data.chat_template_date
    recipe = resolve_defaults(recipe, output / RECIPE_FILE, resume, list(mesh.devices.flat))
    run = _build_run(recipe, mesh, console, program_cache)
    recipe = forget_unused_date(recipe, given_date, run.datasets.tokenizer)
    run = run._replace(recipe=recipe)
    export.check_exports(recipe, run.setup)  # Fails before training, not after.
    state, progress = _restore_or_init(run, console, resume, allow_changes)
    _check_pause_step(pause_after_step, progress.step)
    if jax.process_index() == 0:
        _write_recipe(output / RECIPE_FILE, recipe)
    measure = _make_measure_fn(run)
    before = measure(run.setup.state, run.setup.frozen["reference"])

    bar = ProgressBar(console, ThroughputMeter(recipe, run.setup))
    saver = CheckpointSaver(run.checkpoints, run.metadata, recipe.training, mesh)
    signals = SignalHandler(mesh, run.checkpoints)
    evaluator = _make_evaluator(run, signals, console)
    guard = NonFiniteGuard(recipe.training, run.checkpoints)
    loop = TrainLoop(
        recipe,
        run.setup,
        callbacks=[*loggers, *callbacks, bar, saver, evaluator, signals, guard],
        total_steps=run.total_steps,
        progress=progress,
        pause_after_step=pause_after_step,
    )
    if progress.step < loop.last_step:
        console(compilation_line(read_metrics(output / METRICS_FILE), cache_folder))
    position = StreamPosition(*progress.position)
    try:
        with prefetch_to_device(mesh, run.datasets.train, position) as batches:
            loop.run(state, batches)
    except BaseException:
        with contextlib.suppress(Exception):  # The first error is the reason.
            run.checkpoints.close()
        raise
    if loop.stop_reason == "paused":
        return _pause_result(run, loop, evaluator, before)
    # Tests, exports and the report.
    return _finish(run, loop, measure, before, batches.data_wait_s, console)


class _Run(NamedTuple):
    """Parts of a run that do not change with its steps."""

    recipe: Recipe
    datasets: Datasets
    setup: Setup
    total_steps: int
    checkpoints: CheckpointManager
    metadata: dict[str, Any]


class _Measurement(NamedTuple):
    """Test metrics and sample texts of a model."""

    test_metrics: list[dict[str, float]]
    texts: list[str]


def _check_arguments(recipe: Any, callbacks: Any) -> None:
    """Checks the types, before any file is written."""
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"recipe must be a Recipe, got {type(recipe).__name__}. Use recipe.load(path) or "
            f"recipe.validate(mapping) of jlora.training."
        )
    if not isinstance(callbacks, Sequence):
        raise TypeError(
            f"callbacks must be a list of callbacks, got {type(callbacks).__name__}. Use "
            f"callbacks=[callback]."
        )
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(
                f"callbacks must be instances of jlora.training.Callback, got {callback!r}."
            )


def _check_pause_step(pause_after_step: int | None, step: int = 0) -> None:
    """Checks that the pause is after the first step and not before the given one."""
    if pause_after_step is not None and pause_after_step < max(step, 1):
        raise ValueError(
            f"pause_after_step={pause_after_step} must be at least {max(step, 1)}"
            f"{', the step of the last checkpoint' if step else ''}."
        )


def _prepare_output_folder(recipe: Recipe, resume: bool) -> Path:
    """Returns the output folder, checked to be writable and free of files to overwrite."""
    output = Path(recipe.output)
    exports = export.export_folders(recipe)
    base = Path(recipe.model.path).resolve()
    for folder in exports:
        if folder.resolve() in (base, *base.parents):
            raise ValueError(
                f"model.path={recipe.model.path!r} is in {folder}, which an export would replace. "
                f"Use another output."
            )
    if not resume and jax.process_index() == 0:
        steps = [path for path in (output / CHECKPOINTS_DIR).glob("*") if path.name.isdigit()]
        if steps or os.path.lexists(output / export.ADAPTER_FILE):
            raise FileExistsError(
                f"output={str(output)!r} has a run already, which was not changed. Continue it "
                f"with resume=True (--resume), or use another output."
            )
        for folder in exports:
            if os.path.lexists(folder):
                raise FileExistsError(
                    f"{folder} exists already and was not changed. Remove it, or use another "
                    f"output."
                )
    check_writable(output)
    return output


def _make_metrics_loggers(recipe: Recipe) -> list[MetricsLogger]:
    """Returns the loggers that write to the output folder of a recipe, and to W&B."""
    output, options = Path(recipe.output), recipe.report
    loggers: list[MetricsLogger] = [JsonlMetricsLogger(output / METRICS_FILE)]
    if options.tensorboard:
        loggers.append(TensorBoardLogger(output / "tensorboard"))
    if options.wandb is not None:
        loggers.append(WandbLogger(**options.wandb.model_dump()))
    return loggers


def _build_recipe_mesh(recipe: Recipe, devices: Sequence[Any] | None) -> Mesh:
    """Returns the mesh of a recipe, checked to divide its batches."""
    sizes = {name: size for name, size in recipe.mesh if size is not None}
    mesh = sharding.make_mesh(sizes, devices)
    for batch_size in (recipe.batch.size, recipe.batch.eval_batch_size or recipe.batch.size):
        sharding.check_batch_size(mesh, batch_size)
    return mesh


def _build_run(
    recipe: Recipe, mesh: Mesh, console: Console, program_cache: ProgramCache | None
) -> _Run:
    """Returns the data, arrays, compiled steps and checkpoints of a run."""
    folder = _resolve_base_folder(recipe)
    config = model_from_recipe(recipe, folder).config
    check_recipe(recipe, folder, mesh.devices.flat)
    batch_size = recipe.batch.size
    load = functools.partial(
        load_datasets,
        recipe,
        folder,
        config.vocab_size,
        local_rows(mesh, batch_size),
        local_rows(mesh, recipe.batch.eval_batch_size or batch_size),
    )
    datasets = (
        load() if program_cache is None else program_cache.get_datasets(recipe, folder, mesh, load)
    )
    for path, counts in datasets.source_reports.items():
        console(f"{path}: {counts}")
    steps = recipe.training.steps or datasets.train.num_batches(recipe.training.epochs)
    if not steps:
        raise ValueError(
            f"training.epochs={recipe.training.epochs} of the training data do not fill one batch. "
            f"Use more epochs, more data, a smaller batch, or set training.steps."
        )
    num_labels = None if datasets.label_names is None else len(datasets.label_names)
    setup = build_setup(recipe, mesh, total_steps=steps, num_labels=num_labels)
    if program_cache is not None:
        setup = program_cache.reuse_programs(recipe, setup, steps, num_labels)
    console(trainable_params_line(setup))
    console(f"attention: {describe_attention(recipe, setup)}")
    if recipe.quantize is not None:
        for name, value in describe_quantized_base(setup).items():
            console(f"{name}: {value}")
    checkpoints = CheckpointManager(
        Path(recipe.output) / CHECKPOINTS_DIR, save_total_limit=recipe.training.save_total_limit
    )
    metadata = collect_run_metadata(recipe, setup, datasets)
    return _Run(recipe, datasets, setup, steps, checkpoints, metadata)


def _resolve_base_folder(recipe: Recipe) -> Path:
    """Returns the folder of the base, which has a config.json."""
    try:
        folder = hub.resolve_checkpoint_folder(recipe.model.path, recipe.model.revision)
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"model.path={recipe.model.path!r}: {error}") from error
    if not os.path.lexists(folder / "config.json"):
        reason = "is not a folder" if not folder.is_dir() else "has no config.json"
        raise FileNotFoundError(
            f"model.path={recipe.model.path!r} {reason}. Use the folder of a checkpoint, or its "
            f"owner/name on the Hub."
        )
    return folder


def _restore_or_init(
    run: _Run, console: Console, resume: bool, allow_changes: bool
) -> tuple[TrainState, TrainProgress]:
    """Returns the state and progress of the last checkpoint, or those of a new run."""
    if not resume:
        return run.setup.state, TrainProgress()
    state, progress = restore_run(run.checkpoints, run.setup, run.metadata, allow_changes)
    console(f"Resuming after step {progress.step} of {run.total_steps}.")
    return state, progress


def _make_measure_fn(run: _Run) -> Callable[[TrainState, Any], _Measurement]:
    """Returns a function from a state and its adapter to its test metrics and sample texts."""
    recipe, setup, datasets = run.recipe, run.setup, run.datasets
    prompts = export.tokenize_prompts(
        recipe, setup, datasets.tokenizer, datasets.prompt_format.is_chat
    )
    test = None if datasets.test is None else make_test_fn(setup, datasets.test)

    def measure(state: TrainState, adapter: Any) -> _Measurement:
        texts = export.generate_texts(
            setup,
            adapter,
            datasets.tokenizer,
            prompts,
            recipe.report.max_new_tokens,
            datasets.end_token_ids,
        )
        return _Measurement([] if test is None else [test(state.trainable)], texts)

    return measure


def _make_evaluator(run: _Run, signals: SignalHandler, console: Console) -> Evaluator:
    """Returns the callback that evaluates on the validation data, until a signal arrives."""
    stream = run.datasets.validation
    evaluate = None if stream is None else make_eval_fn(run.setup, stream)
    options = run.recipe.training
    return Evaluator(evaluate, options, is_cancelled=signals.is_pending, console=console)


def _pause_result(
    run: _Run, loop: TrainLoop, evaluator: Evaluator, before: _Measurement
) -> TrainResult:
    """Closes the checkpoints of a paused run and returns its result."""
    run.checkpoints.close()
    step, last = loop.progress.step, loop.last_metrics
    return TrainResult("paused", step, step, last, before.test_metrics, [], evaluator.means)


def _finish(
    run: _Run,
    loop: TrainLoop,
    measure: Callable[[TrainState, Any], _Measurement],
    before: _Measurement,
    data_wait_s: float,
    console: Console,
) -> TrainResult:
    """Tests the best state, writes the adapter, report and exports, and returns the result."""
    recipe, setup, label_names = run.recipe, run.setup, run.datasets.label_names
    assert loop.stop_reason is not None
    state, best_step = _best_state(loop.state, loop.progress, run.checkpoints)
    run.checkpoints.close()
    output_paths = export.save_adapter_and_head(
        recipe, setup, state.trainable, label_names, run.datasets.prompt_format
    )
    after = measure(state, export.combine_adapter(setup, state.trainable))
    test_metrics = [*before.test_metrics, *after.test_metrics]
    if jax.process_index() == 0:
        metrics = read_metrics(Path(recipe.output) / METRICS_FILE)
        summary = RunSummary(
            loop.stop_reason, best_step, run.total_steps, data_wait_s, test_metrics, metrics
        )
        texts = zip(recipe.report.sample_prompts, before.texts, after.texts, strict=False)
        samples = [report.PromptSample(*each) for each in texts]
        output_paths += _write_results(run, state, summary, samples, console)
    # Last, because an export may fail where all other steps succeed.
    output_paths += export.write_exports(
        recipe, setup, state.trainable, label_names, run.datasets.prompt_format
    )
    for path in output_paths:
        console(f"Wrote {path}.")
    step = loop.progress.step
    return TrainResult(
        loop.stop_reason, step, best_step, loop.last_metrics, test_metrics, output_paths, {}
    )


def _best_state(
    state: TrainState, progress: TrainProgress, checkpoints: CheckpointManager
) -> tuple[TrainState, int]:
    """Returns the state of the best evaluation, or the last state, and its step."""
    best = progress.best_step
    if best is None or best == progress.step:
        return state, progress.step
    if best not in checkpoints.all_steps():
        warnings.warn(
            f"The best checkpoint, of step {best}, could not be written. The last one, of step "
            f"{progress.step}, is used instead.",
            stacklevel=2,
        )
        return state, progress.step
    return checkpoints.restore(state, best).state, best


def _write_results(
    run: _Run,
    state: TrainState,
    summary: RunSummary,
    samples: Sequence[report.PromptSample],
    console: Console,
) -> list[Path]:
    """Writes report.html and result.json, prints the summary, and returns the paths."""
    recipe, setup, output = run.recipe, run.setup, Path(run.recipe.output)
    overview = report.make_run_overview(recipe, setup, run.datasets, summary)
    versions = run.metadata["versions"]
    report.write_report(
        output / REPORT_FILE,
        title=f"jlora: {output.name}",
        run_overview=overview,
        settings=report.make_settings_table(recipe, setup, report.collect_versions(versions)),
        metrics=summary.metrics,
        best_step=summary.best_step,
        update_norms=_compute_update_norms(setup, state),
        samples=samples,
    )
    result = report.make_result_json(recipe, setup, summary)
    _write_result(output / RESULT_FILE, {**result, "versions": versions})
    for name, value in overview.items():
        console(f"{name}: {value}")
    return [output / REPORT_FILE, output / RESULT_FILE]


def _compute_update_norms(setup: Setup, state: TrainState) -> dict[str, Any]:
    """Returns the relative update norms; empty with several processes, which share the weights."""
    if jax.process_count() > 1:
        return {}
    adapter = export.gather_adapter(setup, state.trainable)
    return report.relative_update_norms(setup.frozen["base"], adapter, setup.frozen["reference"])


def _write_recipe(path: Path, recipe: Recipe) -> None:
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    replace_file_atomically(path, text.encode())  # A resumed run reads it.


def _write_result(path: Path, result: dict[str, Any]) -> None:
    text = json.dumps(to_strict_json(result), indent=2) + "\n"
    replace_file_atomically(path, text.encode())
