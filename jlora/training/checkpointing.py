"""Checkpoints of a run, through Orbax: written in the background, atomic, and verified.

A checkpoint has the training state and metadata of the run. The metadata includes a SHA-256 of
every array, which is compared when the array is restored. A thread does the hashing and writing, so
that a run waits for the copy to the host only.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from jlora._mesh import fetch_global
from jlora._tree import PyTree
from jlora.checkpoints.output_lock import (
    acquire_output_lock,
    is_output_locked,
    release_output_lock,
)
from jlora.checkpoints.safetensors_io import PARTIAL_SUFFIX, format_names
from jlora.training.callbacks import Callback, Request
from jlora.training.recipe.sections import TrainingSection
from jlora.training.runtime import ProcessMaximum

if TYPE_CHECKING:
    from jlora.training.loop import TrainLoop

CHECKPOINT_FORMAT = 1

_STATE_ITEM, _METADATA_ITEM = "state", "run_metadata"


class RestoredCheckpoint(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        step: Step of the checkpoint.
        state: Saved state, with the shardings of the target.
        metadata: Saved metadata.
    """

    step: int
    state: PyTree
    metadata: dict[str, Any]


class _NonFiniteStateError(ValueError):
    """A state with NaN or infinities, which no run can continue from."""


class CheckpointManager:
    """Manager of the checkpoints in one folder.

    The latest checkpoint is the complete one with the highest step; no file points to it. From its
    first save to `close`, a manager holds the lock of the folder; reading needs none.

    Example:
        >>> import tempfile
        >>> import jax, numpy as np
        >>> from jlora.training import CheckpointManager
        >>> state = {"a": jax.device_put(np.arange(3.0, dtype=np.float32))}
        >>> checkpoints = CheckpointManager(tempfile.mkdtemp(), save_total_limit=2)
        >>> checkpoints.save(7, state, {"note": "first"})
        >>> restored = checkpoints.restore(state)
        >>> restored.step, restored.state["a"].tolist(), restored.metadata["note"]
        (7, [0.0, 1.0, 2.0], 'first')
        >>> checkpoints.close()
    """

    def __init__(self, folder: str | os.PathLike[str], *, save_total_limit: int) -> None:
        """Opens the folder and removes the remains of interrupted saves, unless it is locked.

        Args:
            folder: Folder of checkpoints, which is created if it does not exist.
            save_total_limit: Number of latest checkpoints to keep, in addition to the best one.

        Raises:
            OSError: The folder is not writable.
        """
        self.folder = Path(folder).absolute()
        check_writable(self.folder)
        self._lock_path: Path | None = None
        if not is_output_locked(self.folder):
            _remove_partial_checkpoints(self.folder)
        self._preservation_policy = _KeepLastAndBestPolicy(save_total_limit)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._preservation_policy,
            enable_async_checkpointing=False,  # The thread below also hashes.
        )
        self._orbax_manager = ocp.CheckpointManager(self.folder, options=options)
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "jlora-saving")
        # The step that is being written, and its future.
        self._pending_write: tuple[int, concurrent.futures.Future[None]] | None = None
        self._started_steps = set(self._orbax_manager.all_steps())

    def all_steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in order."""
        if self._pending_write is not None:
            self._pending_write[1].exception()  # Waits; `wait_until_finished` raises it.
        return sorted(self._orbax_manager.all_steps())

    def save(
        self, step: int, state: PyTree, metadata: Mapping[str, Any], best_step: int | None = None
    ) -> None:
        """Starts to write a checkpoint and returns once its arrays are copied to the host.

        Args:
            step: Step of the checkpoint; it must not have one yet.
            state: Tree of arrays.
            metadata: Values of JSON by name.
            best_step: Step of the best checkpoint so far, possibly this one, which is kept; None
                without evaluations.

        Raises:
            OutputInUseError: Another manager has saved to the folder and is not closed.
            OSError: An earlier checkpoint could not be written.
            ValueError: The step or a later one has a checkpoint already, or the earlier state was
                not finite.
        """
        if step in self._started_steps:
            raise ValueError(
                f"{self.folder} has a checkpoint of step {step} already, which was not changed."
            )
        self.wait_until_finished()
        if self._started_steps and step < max(self._started_steps):
            raise ValueError(
                f"{self.folder} has a checkpoint of step {max(self._started_steps)}, and one of "
                f"step {step} would be older. Save to another folder."
            )
        if self._lock_path is None and jax.process_index() == 0:
            self._lock_path = acquire_output_lock(self.folder, owner=self)
        # Copies: views would change with the caller's arrays and keep buffers of the next step.
        arrays = {
            name: np.array(fetch_global(array))
            for name, array in _flatten_state_by_keystr(state).items()
        }
        self._started_steps.add(step)
        self._pending_write = (
            step,
            self._executor.submit(self._write_checkpoint, step, arrays, dict(metadata), best_step),
        )

    def _write_checkpoint(
        self,
        step: int,
        arrays: dict[str, np.ndarray],
        metadata: dict[str, Any],
        best_step: int | None,
    ) -> None:
        if name := _find_nonfinite(arrays):
            raise _NonFiniteStateError(
                f"The state of step {step} is not saved: {name} is NaN or infinite. Earlier "
                f"checkpoints in {self.folder} are intact. Resume from them with a lower "
                f"optimizer.learning_rate (allow_changes=True, or --allow-changes)."
            )
        hashes = {name: _sha256(array) for name, array in arrays.items()}
        metadata = {"format": CHECKPOINT_FORMAT, "sha256": hashes, **metadata}
        metadata["checksum"] = _compute_checksum(metadata)
        args = ocp.args.Composite(
            **{
                _STATE_ITEM: ocp.args.PyTreeSave(arrays),
                _METADATA_ITEM: ocp.args.JsonSave(metadata),
            }
        )
        self._preservation_policy.best_step = best_step
        self._orbax_manager.save(step, args=args)

    def wait_until_finished(self) -> None:
        """Waits until the last checkpoint is written.

        Raises:
            OSError: It could not be written. Earlier checkpoints are intact.
            ValueError: Its state was not finite, and was not written.
        """
        pending, self._pending_write = self._pending_write, None
        if pending is None:
            return
        step, future = pending
        try:
            future.result()
        except _NonFiniteStateError:
            self._started_steps.discard(step)
            raise
        except Exception as error:
            self._started_steps.discard(step)  # It may be retried.
            raise OSError(
                f"The checkpoint could not be written to {self.folder}: "
                f"{str(error).partition(chr(10))[0]}. Earlier ones are intact. Free disk space or "
                f"fix the permissions, then resume."
            ) from error

    def close(self) -> None:
        """Waits for the last checkpoint and closes the manager.

        Raises:
            OSError: The last checkpoint could not be written.
        """
        try:
            self.wait_until_finished()
        finally:
            self._executor.shutdown()
            self._orbax_manager.close()
            if self._lock_path is not None:
                release_output_lock(self._lock_path)
                self._lock_path = None

    def load_metadata(self, step: int) -> dict[str, Any]:
        """Returns the metadata of a checkpoint.

        Args:
            step: Step of the checkpoint.

        Raises:
            ValueError: The metadata is damaged, or a later release wrote it.
        """
        try:
            args = ocp.args.Composite(**{_METADATA_ITEM: ocp.args.JsonRestore()})
            metadata = self._orbax_manager.restore(step, args=args)[_METADATA_ITEM]
        except Exception as error:
            _reraise_unless_damage(error)
            raise ValueError(self._format_damage_message(step, _METADATA_ITEM, error)) from error
        version = metadata.get("format") if isinstance(metadata, dict) else None
        if not isinstance(version, int) or version > CHECKPOINT_FORMAT:
            raise ValueError(
                f"Step {step} in {self.folder} has format {version!r}; this release reads formats "
                f"up to {CHECKPOINT_FORMAT}. Use the release that wrote it."
            )
        checksum = metadata.pop("checksum", None)
        if checksum != _compute_checksum(metadata):
            cause = "the values differ from those saved"
            raise ValueError(self._format_damage_message(step, _METADATA_ITEM, cause))
        return metadata

    def restore(self, target: PyTree, step: int | None = None) -> RestoredCheckpoint:
        """Returns the latest checkpoint, or that of a step.

        Args:
            target: State of the same structure, whose shardings the restored arrays get.
            step: Step of the checkpoint; None: the latest.

        Raises:
            FileNotFoundError: There is no such checkpoint.
            ValueError: The checkpoint is damaged, is not finite, or has another structure. The
                message names the arrays that are missing, additional, or of another shape or dtype.
        """
        steps = self.all_steps()
        if not steps or (step is not None and step not in steps):
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            existing = f"; existing steps are {steps}" if steps else ""
            raise FileNotFoundError(f"{self.folder} has no {wanted}{existing}.")
        step = steps[-1] if step is None else step
        metadata = self.load_metadata(step)
        hashes = metadata["sha256"]
        targets = _flatten_state_by_keystr(target)
        missing = [f"lacks {name}" for name in targets if name not in hashes]
        additional = [f"has {name} in addition" for name in hashes if name not in targets]
        if missing or additional:
            raise ValueError(
                f"Step {step} in {self.folder} has another adapter, optimizer or task: it "
                f"{format_names([*missing, *additional])}. Resume with the recipe that wrote it."
            )
        arrays = self._restore_arrays(step, targets)
        mismatches = [
            f"{name} is {array.dtype}{array.shape}, expected {to.dtype}{to.shape}"
            for name, to in targets.items()
            if ((array := arrays[name]).shape, array.dtype) != (to.shape, to.dtype)
        ]
        if mismatches:
            raise ValueError(
                f"Step {step} in {self.folder} does not fit: {format_names(mismatches)}. Resume "
                f"with the recipe that wrote it."
            )
        for name, array in arrays.items():
            if _sha256(array) != hashes[name]:
                raise ValueError(
                    self._format_damage_message(step, name, "the values differ from those saved")
                )
        if name := _find_nonfinite(arrays):
            raise ValueError(self._format_damage_message(step, name, "it has NaN or infinities"))
        leaves, treedef = jax.tree.flatten(target)
        placed = [
            _place_restored_array(arrays[name], to)
            for name, to in zip(targets, leaves, strict=True)
        ]
        return RestoredCheckpoint(step, jax.tree.unflatten(treedef, placed), metadata)

    def _restore_arrays(self, step: int, target_arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Returns the arrays of a checkpoint; an error names the one that cannot be read."""
        try:
            return self._restore_named_arrays(step, list(target_arrays))
        except Exception as error:
            _reraise_unless_damage(error)
            for name in target_arrays:
                try:
                    self._restore_named_arrays(step, [name])
                except Exception:
                    raise ValueError(self._format_damage_message(step, name, error)) from error
            raise ValueError(self._format_damage_message(step, _STATE_ITEM, error)) from error

    def _restore_named_arrays(self, step: int, names: list[str]) -> dict[str, np.ndarray]:
        item = dict.fromkeys(names, 0)
        restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        restored = self._orbax_manager.restore(step, args=ocp.args.Composite(**{_STATE_ITEM: args}))
        arrays = dict(restored[_STATE_ITEM])
        for name in names:
            if not isinstance(arrays[name], np.ndarray):
                raise ValueError(f"it is no array but {type(arrays[name]).__name__}")
        return arrays

    def _format_damage_message(self, step: int, item: str, cause: Any) -> str:
        others = [other for other in self.all_steps() if other != step]
        remedy = "Start the run again"
        if others:
            remedy = f"Remove {self.folder / str(step)} to resume from step {others[-1]}"
        reason = str(cause).partition("\n")[0][:200]
        return f"Step {step} in {self.folder} is damaged at {item}: {reason}. {remedy}."


def _reraise_unless_damage(error: Exception) -> None:
    """Reraises an error of the machine: the advice for a damaged checkpoint is to remove it."""
    if isinstance(error, (MemoryError, PermissionError)):
        raise error
    if "PERMISSION_DENIED" in str(error):  # TensorStore's, which is a ValueError.
        raise PermissionError(str(error)) from error


class _KeepLastAndBestPolicy:
    """Preservation policy of Orbax that keeps the last checkpoints and the best one.

    Orbax's own policy for the best checkpoint loses the scores when the process ends.
    """

    def __init__(self, save_total_limit: int) -> None:
        self.save_total_limit = save_total_limit
        self.best_step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns whether to keep each checkpoint; Orbax calls it."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        preserved = {*sorted(steps)[-self.save_total_limit :], self.best_step}
        return [step in preserved for step in steps]


class CheckpointSaver(Callback):
    """Callback that saves checkpoints: periodically, on request, and at the end of the run."""

    def __init__(
        self,
        checkpoints: CheckpointManager,
        run_metadata: Mapping[str, Any],
        options: TrainingSection,
        mesh: Mesh,
    ) -> None:
        """Prepares the saves.

        Args:
            checkpoints: Manager that writes the checkpoints.
            run_metadata: Metadata that is written to every checkpoint.
            options: Section `training` of the recipe.
            mesh: Mesh of the run, whose processes save together.
        """
        self._checkpoints, self._run_metadata = checkpoints, run_metadata
        self._options = options
        self._agreement = ProcessMaximum(mesh)
        self._last_saved_step: int | None = None
        self._last_save_time = time.monotonic()

    def on_train_start(self, loop: TrainLoop) -> None:
        """Starts the timer."""
        self._last_saved_step = loop.progress.step or None
        self._last_save_time = time.monotonic()

    def request(self, loop: TrainLoop, ends_epoch: bool) -> Request | None:
        """Returns `SAVE` when a checkpoint is due."""
        steps, minutes = self._options.save_steps, self._options.save_interval_minutes
        is_due = steps is not None and loop.progress.step % steps == 0
        if minutes is not None:
            elapsed = time.monotonic() - self._last_save_time
            is_due |= bool(self._agreement.update(int(elapsed >= 60 * minutes)))
        return Request.SAVE if is_due else None

    def on_save(self, loop: TrainLoop) -> None:
        """Starts to write a checkpoint, unless the step has one.

        Raises:
            OSError: The previous checkpoint could not be written, and the recipe does not allow it.
        """
        step, best_step = loop.progress.step, loop.progress.best_step
        if step == self._last_saved_step:
            return
        self._wait_until_finished()
        metadata = {**self._run_metadata, "progress": loop.progress.to_dict()}
        self._checkpoints.save(step, loop.state, metadata, best_step)
        self._last_saved_step, self._last_save_time = step, time.monotonic()
        self._agreement.reset()

    def on_train_end(self, loop: TrainLoop) -> None:
        """Waits for the last checkpoint.

        Raises:
            OSError: It could not be written, and the recipe does not allow it.
        """
        self._wait_until_finished()

    def close(self) -> None:
        """Waits for the last checkpoint; warns if it could not be written."""
        try:
            self._checkpoints.wait_until_finished()
        except OSError as error:
            warnings.warn(str(error), stacklevel=2)

    def _wait_until_finished(self) -> None:
        """Waits for the last checkpoint; warns or raises if it could not be written."""
        try:
            self._checkpoints.wait_until_finished()
        except OSError as error:
            self._last_saved_step = None
            if self._options.on_save_error == "raise":
                raise
            warnings.warn(str(error), stacklevel=2)


def check_writable(folder: Path) -> None:
    """Creates a folder, and writes and removes a file in it.

    Errors appear before training rather than at the first save.

    Args:
        folder: Folder to check.

    Raises:
        OSError: The folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A name of this process, which `remove_partial_outputs` removes if it is killed.
        probe = folder / f".probe-{os.getpid()}-{threading.get_ident()}{PARTIAL_SUFFIX}"
        try:
            with probe.open("wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"The folder {folder} is not writable ({error.strerror}). Use another output, fix its "
            f"permissions, or free disk space",
        ) from error


def _remove_partial_checkpoints(folder: Path) -> None:
    """Removes the remains of interrupted saves.

    Orbax removes them in the background, and a short run ends before that is done.
    """
    if jax.process_index() == 0:
        for partial in folder.glob(f"*{ocp.path.atomicity_types.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(partial)


def _flatten_state_by_keystr(state: PyTree) -> dict[str, Any]:
    """Returns the arrays of a state by their key paths."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): array for path, array in flat}


def _find_nonfinite(arrays: Mapping[str, np.ndarray]) -> str | None:
    """Returns the name of the first array with NaN or infinities; None if there is none."""
    for name, array in arrays.items():
        # Of numbers that NumPy does not have (bfloat16), a wider type.
        is_float = jax.numpy.issubdtype(array.dtype, jax.numpy.inexact)
        wide = array.astype(np.float32) if is_float and array.dtype.kind == "V" else array
        if is_float and not np.isfinite(wide).all():
            return name
    return None


def _compute_checksum(metadata: Mapping[str, Any]) -> str:
    """Returns a SHA-256 of metadata, which is the same after it was written and read as JSON."""
    text = json.dumps(json.loads(json.dumps(metadata)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _place_restored_array(array: np.ndarray, target: Any) -> Any:
    sharding = target.sharding
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
