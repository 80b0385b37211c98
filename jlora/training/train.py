"""Training runs: from a recipe to an adapter, its exports and a report."""

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
    compilation_line,
    describe_quantized_base,
    trainable_params_line,
)
from jlora.training.recipe.sections import Recipe
from jlora.training.report import RunSummary
from jlora.training.resume import collect_run_metadata, resolve_defaults, restore_run
from jlora.training.setup import Setup, build_setup, model_from_recipe
from jlora.training.train_step import TrainState

REPORT_FILE, RECIPE_FILE, RESULT_FILE = "report.html", "recipe.yaml", "result.json"

CHECKPOINTS_DIR = "checkpoints"


class TrainResult(NamedTuple):
    """Result of `train`.

    Attributes:
        stop_reason: "max_steps", "early_stopping" when evaluations no longer improved, or "paused".
        step: Last step.
        best_step: Step of the written adapter: that of the best evaluation, or the last one without
            evaluations. At a pause, the last step; its adapter is not written yet.
        last_metrics: Metrics of the last step, as in metrics.jsonl.
        test_metrics: Means on the test data before and after training; empty without test data.
        output_paths: Files and folders that were written; empty at a pause.
        paused_eval_metrics: Means on the validation data at a pause; empty otherwise.

    Example:
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
    metrics_loggers: Sequence[MetricsLogger] = (),
    devices: Sequence[Any] | None = None,
    program_cache: ProgramCache | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Trains from a recipe and writes the adapter, exports and report to the output folder.

    Args:
        recipe: Validated recipe.
        resume: Whether to continue from the last checkpoint in the output folder.
        allow_changes: Whether data, base or hyperparameters may differ from the checkpoint's.
        pause_after_step: Step after which the run pauses: it saves a checkpoint, evaluates, and
            writes nothing else. The learning rate schedule stays that of all steps, and a resumed
            run gives the same bytes as one without a pause. None, or a step after the last one: no
            pause.
        metrics_loggers: Further loggers of the metrics that metrics.jsonl has. They are closed at
            the end.
        devices: Devices of the mesh; None: all devices.
        program_cache: Cache of data and compiled steps, shared with other runs of the process.
        quiet: Whether to print nothing.

    Returns:
        The stop reason, metrics and written paths.

    Raises:
        FileExistsError: The output folder has a run, and `resume` is false.
        FileNotFoundError: The base, data, or the checkpoint to resume from does not exist.
        ValueError: The recipe does not fit the base, data or devices; the checkpoint belongs to
            another run; or the run is past `pause_after_step`.
        RuntimeError: The devices compute wrong steps with an offloaded optimizer state.
        NonFiniteError: A loss or gradient is not finite, and the recipe does not skip the step.
        TrainingInterrupted: SIGTERM or SIGINT arrived; the state is saved.
        MemoryError: The devices are out of memory.
        OSError: A file cannot be written.

    Example:
        >>> from jlora.training import recipe, train
        >>> train(recipe.load("recipe.yaml"))  # doctest: +SKIP
    """
    _check_pause_step(pause_after_step)
    initialize_distributed(recipe.distributed)
    console = Console(quiet or jax.process_index() > 0)
    output = _prepare_output_folder(recipe, resume)
    mesh = _build_recipe_mesh(recipe, devices)
    recipe = resolve_defaults(recipe, output / RECIPE_FILE, resume, list(mesh.devices.flat))
    datasets, setup, total_steps = _build(recipe, mesh, console, program_cache)
    export.check_exports(recipe, setup)
    prompts = export.tokenize_prompts(recipe, setup, datasets.tokenizer)
    checkpoints = CheckpointManager(
        output / CHECKPOINTS_DIR, save_total_limit=recipe.training.save_total_limit
    )
    run_metadata = collect_run_metadata(recipe, setup, datasets)
    state, progress = setup.state, TrainProgress()
    if resume:
        state, progress = restore_run(checkpoints, setup, run_metadata, allow_changes)
        console(f"Resuming after step {progress.step} of {total_steps}.")
    _check_pause_step(pause_after_step, progress.step)
    if jax.process_index() == 0:
        _write_recipe(output / RECIPE_FILE, recipe)
    max_new_tokens = recipe.report.max_new_tokens
    base_texts = export.generate_texts(setup, None, datasets.tokenizer, prompts, max_new_tokens)
    test = None if datasets.test is None else make_test_fn(setup, datasets.test)
    test_metrics = [] if test is None else [test(setup.state.trainable)]

    evaluate = None if datasets.validation is None else make_eval_fn(setup, datasets.validation)
    if progress.step < min(pause_after_step or total_steps, total_steps):
        console(compilation_line(read_metrics(output / METRICS_FILE)))
    loggers = [
        *make_metrics_loggers(
            output, tensorboard=recipe.report.tensorboard, resume_step=progress.step
        ),
        *metrics_loggers,
    ]
    try:
        with (
            SignalHandler() as signals,
            console.progress_bar(
                total_steps, progress.step, ThroughputMeter(recipe, setup)
            ) as progress_bar,
            prefetch_to_device(
                setup.mesh, datasets.train, StreamPosition(*progress.position)
            ) as batches,
        ):
            callbacks = LoopCallbacks(
                loggers, progress_bar.show_step, progress_bar.show_evaluation, evaluate
            )
            loop = TrainLoop(
                recipe,
                setup,
                state,
                progress,
                checkpoints,
                run_metadata,
                callbacks,
                signals,
                total_steps,
                pause_after_step,
            )
            stop_reason = loop.run(batches)
    finally:
        for logger in loggers:
            logger.close()

    if stop_reason == "paused":
        checkpoints.close()
        step, last = progress.step, loop.last_metrics
        return TrainResult(stop_reason, step, step, last, test_metrics, [], loop.eval_metrics)
    state, best_step = _best_state(loop.state, progress, checkpoints)
    checkpoints.close()
    if test is not None:
        test_metrics.append(test(state.trainable))
    output_paths = export.save_adapter_and_head(
        recipe, setup, state.trainable, run_metadata["base"], datasets.label_names
    )
    adapter = export.combine_adapter(setup, state.trainable)
    texts = export.generate_texts(setup, adapter, datasets.tokenizer, prompts, max_new_tokens)
    if jax.process_index() == 0:
        metrics = read_metrics(output / METRICS_FILE)
        run_summary = RunSummary(
            stop_reason, best_step, total_steps, batches.data_wait_s, test_metrics, metrics
        )
        overview = report.make_run_overview(recipe, setup, datasets, run_summary)
        versions = run_metadata["versions"]
        report.write_report(
            output / REPORT_FILE,
            title=f"jlora: {output.name}",
            run_overview=overview,
            settings=report.make_settings_table(recipe, setup, report.collect_versions(versions)),
            metrics=metrics,
            best_step=best_step,
            update_norms=_compute_update_norms(setup, state),
            samples=list(map(report.PromptSample, recipe.report.sample_prompts, base_texts, texts)),
        )
        result = report.make_result_json(setup, run_summary)
        _write_result(output / RESULT_FILE, {**result, "versions": versions})
        output_paths += [output / REPORT_FILE, output / RESULT_FILE]
        for name, value in overview.items():
            console(f"{name}: {value}")
    # Last, because an export may fail where all other steps succeed.
    output_paths += export.write_exports(recipe, setup, state.trainable, datasets.label_names)
    for path in output_paths:
        console(f"Wrote {path}.")
    return TrainResult(
        stop_reason, progress.step, best_step, loop.last_metrics, test_metrics, output_paths, {}
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
        if steps or (output / export.ADAPTER_FILE).exists():
            raise FileExistsError(
                f"{output} has a run already, which was not changed. Continue it with --resume, or "
                f"use another --output."
            )
        for folder in exports:
            if folder.exists():
                raise FileExistsError(
                    f"{folder} exists already and was not changed. Remove it, or use another "
                    f"--output."
                )
    check_writable(output)
    return output


def _build_recipe_mesh(recipe: Recipe, devices: Sequence[Any] | None) -> Mesh:
    """Returns the mesh of a recipe, checked to divide its batches."""
    sizes = {name: size for name, size in recipe.mesh if size is not None}
    mesh = sharding.make_mesh(sizes, devices)
    for batch_size in (recipe.batch.size, recipe.batch.eval_batch_size or recipe.batch.size):
        sharding.check_batch_size(mesh, batch_size)
    return mesh


def _build(
    recipe: Recipe, mesh: Mesh, console: Console, program_cache: ProgramCache | None
) -> tuple[Datasets, Setup, int]:
    """Returns the data, the setup, and the number of steps of a run."""
    folder = hub.resolve_checkpoint_folder(recipe.model.path, recipe.model.revision)
    config = model_from_recipe(recipe, folder).config
    if recipe.data.max_seq_length > config.max_seq_length:
        raise ValueError(
            f"data.max_seq_length={recipe.data.max_seq_length} must be at most "
            f"{config.max_seq_length}, the maximum sequence length of the base."
        )
    batch_size = recipe.batch.size
    load = functools.partial(
        load_datasets,
        recipe,
        folder,
        config.vocab_size,
        local_rows(mesh, batch_size),
        local_rows(mesh, recipe.batch.eval_batch_size or batch_size),
    )
    datasets = load() if program_cache is None else program_cache.get_datasets(recipe, mesh, load)
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
    for name, value in describe_quantized_base(setup).items():
        console(f"{name}: {value}")
    return datasets, setup, steps


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


def _compute_update_norms(setup: Setup, state: TrainState) -> dict[str, Any]:
    """Returns the relative update norms; empty with several processes, which share the weights."""
    if jax.process_count() > 1:
        return {}
    adapter = export.gather_adapter(setup, state.trainable)
    return report.relative_update_norms(setup.frozen["base"], adapter, setup.initial_adapter)


def _write_recipe(path: Path, recipe: Recipe) -> None:
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    path.write_text(text, encoding="utf-8")


def _write_result(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(to_strict_json(result), indent=2) + "\n", encoding="utf-8")
