"""Checkpoints of a run, through Orbax: written in the background, whole or not at all, and checked.

A checkpoint holds the training state and facts about the run. The facts have a SHA-256 of every
array, which is compared when it is restored. Hashing and writing are done by a thread, so that a
run waits only for the copy to the host.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from jlora._sharding import fetch_global
from jlora._tree import PyTree
from jlora.checkpoints.safetensors_io import format_names

CHECKPOINT_FORMAT = 1

_STATE_ITEM, _METADATA_ITEM = "state", "facts"


class RestoredCheckpoint(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        step: Its number.
        state: With the values of the file, placed as the example is.
        metadata: What was saved beside it.
    """

    step: int
    state: PyTree
    metadata: dict[str, Any]


class CheckpointManager:
    """The checkpoints in one folder.

    Which one is the latest is told by those that are there whole; nothing points to it.
    """

    def __init__(self, folder: str | os.PathLike[str], *, save_total_limit: int) -> None:
        """Opens the folder, and clears away what an interrupted save left.

        Args:
            folder: Made if it is not there.
            save_total_limit: How many checkpoints stay, beside the best one.

        Raises:
            OSError: Nothing can be written there.
        """
        self.folder = Path(folder).absolute()
        check_writable(self.folder)
        _remove_partial_checkpoints(self.folder)
        self._preservation_policy = _KeepLastAndBestPolicy(save_total_limit)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._preservation_policy,
            enable_async_checkpointing=False,  # The thread here does more than Orbax's would.
        )
        self._orbax_manager = ocp.CheckpointManager(self.folder, options=options)
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "jlora-saving")
        # The step that is being written, and by what.
        self._pending_write: tuple[int, concurrent.futures.Future[None]] | None = None
        self._started_steps = set(self._orbax_manager.all_steps())

    def all_steps(self) -> list[int]:
        """The steps that have a whole checkpoint, in order."""
        with contextlib.suppress(Exception):  # It is raised where it is asked for.
            if self._pending_write is not None:
                self._pending_write[1].exception()
        return sorted(self._orbax_manager.all_steps())

    def save(
        self, step: int, state: PyTree, metadata: Mapping[str, Any], best_step: int | None = None
    ) -> None:
        """Begins to write a checkpoint, and returns as soon as its arrays were copied to the host.

        Args:
            step: Its number; there must be none of it yet.
            state: A tree of arrays.
            metadata: What JSON can hold.
            best_step: The step of the best checkpoint so far, which may be this one. It stays.

        Raises:
            OSError: An earlier checkpoint could not be written.
            ValueError: There is one of that step.
        """
        if step in self._started_steps:
            raise ValueError(f"{self.folder} has a checkpoint of step {step}, which is left alone.")
        self.wait_until_finished()
        self._started_steps.add(step)
        # Views would follow what the caller writes, and keep buffers that the next step could use.
        arrays = {
            name: np.array(fetch_global(array))
            for name, array in _flatten_state_by_keystr(state).items()
        }
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
        hashes = {name: _sha256(array) for name, array in arrays.items()}
        args = ocp.args.Composite(
            **{
                _STATE_ITEM: ocp.args.PyTreeSave(arrays),
                _METADATA_ITEM: ocp.args.JsonSave(
                    {"format": CHECKPOINT_FORMAT, "sha256": hashes, **metadata}
                ),
            }
        )
        self._preservation_policy.best_step = best_step
        self._orbax_manager.save(step, args=args)

    def wait_until_finished(self) -> None:
        """Returns when everything is written.

        Raises:
            OSError: Something could not be.
        """
        writing, self._pending_write = self._pending_write, None
        if writing is None:
            return
        step, future = writing
        try:
            future.result()
        except Exception as error:
            self._started_steps.discard(step)  # It may be tried again.
            raise OSError(
                f"The checkpoint could not be written to {self.folder}: "
                f"{str(error).partition(chr(10))[0]}. Earlier ones are whole. Make room or mend "
                f"the rights, then resume."
            ) from error

    def close(self) -> None:
        """Waits, and closes the folder.

        Raises:
            OSError: Something could not be written.
        """
        try:
            self.wait_until_finished()
        finally:
            self._executor.shutdown()
            self._orbax_manager.close()

    def load_metadata(self, step: int) -> dict[str, Any]:
        """What was saved beside the state.

        Raises:
            ValueError: It cannot be read, or is of a later release.
        """
        try:
            args = ocp.args.Composite(**{_METADATA_ITEM: ocp.args.JsonRestore()})
            facts = self._orbax_manager.restore(step, args=args)[_METADATA_ITEM]
        except Exception as error:
            raise ValueError(self._format_damage_message(step, _METADATA_ITEM, error)) from error
        found = facts.get("format") if isinstance(facts, dict) else None
        if not isinstance(found, int) or found > CHECKPOINT_FORMAT:
            raise ValueError(
                f"Step {step} in {self.folder} was made by format {found!r}, and this release "
                f"reads up to {CHECKPOINT_FORMAT}. Use the release that wrote it."
            )
        return facts

    def restore(self, target: PyTree, step: int | None = None) -> RestoredCheckpoint:
        """The latest checkpoint, or that of a step.

        Args:
            target: A state of the same structure, whose shardings the arrays get.
            step: Its number; the latest when left out.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, or of another structure. Everything that is missing, left
                over, or of another shape or dtype is named.
        """
        steps = self.all_steps()
        if not steps or (step is not None and step not in steps):
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            there = f"; there are {steps}" if steps else ""
            raise FileNotFoundError(f"{self.folder} holds no {wanted}{there}.")
        step = steps[-1] if step is None else step
        facts = self.load_metadata(step)
        hashes = facts["sha256"]
        wanted = _flatten_state_by_keystr(target)
        lacks = [f"lacks {name}" for name in wanted if name not in hashes]
        has = [f"has {name} besides" for name in hashes if name not in wanted]
        if lacks or has:
            raise ValueError(
                f"Step {step} in {self.folder} is of another adapter, optimizer or task: it "
                f"{format_names([*lacks, *has])}. Resume with the recipe that it was made by."
            )
        found = self._restore_arrays(step, wanted)
        wrong = [
            f"{name} is {array.dtype}{array.shape} instead of {to.dtype}{to.shape}"
            for name, to in wanted.items()
            if ((array := found[name]).shape, array.dtype) != (to.shape, to.dtype)
        ]
        if wrong:
            raise ValueError(
                f"Step {step} in {self.folder} does not fit: {format_names(wrong)}. Resume with the "
                f"recipe that it was made by."
            )
        for name, array in found.items():
            if _sha256(array) != hashes[name]:
                raise ValueError(
                    self._format_damage_message(step, name, "its numbers are not those saved")
                )
        leaves, treedef = jax.tree.flatten(target)
        placed = [
            _place_restored_array(found[name], to) for name, to in zip(wanted, leaves, strict=True)
        ]
        return RestoredCheckpoint(step, jax.tree.unflatten(treedef, placed), facts)

    def _restore_arrays(self, step: int, target_arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The arrays of a checkpoint, and the name of the one that cannot be read."""
        try:
            return self._restore_named_arrays(step, list(target_arrays))
        except Exception as error:
            for name in target_arrays:
                try:
                    self._restore_named_arrays(step, [name])
                except Exception:
                    raise ValueError(self._format_damage_message(step, name, error)) from error
            raise ValueError(self._format_damage_message(step, _STATE_ITEM, error)) from error

    def _restore_named_arrays(self, step: int, names: list[str]) -> dict[str, np.ndarray]:
        item = dict.fromkeys(names, 0)
        kinds = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        args = ocp.args.PyTreeRestore(item, restore_args=kinds, partial_restore=True)
        restored = self._orbax_manager.restore(step, args=ocp.args.Composite(**{_STATE_ITEM: args}))
        return dict(restored[_STATE_ITEM])

    def _format_damage_message(self, step: int, item: str, cause: Any) -> str:
        others = [other for other in self.all_steps() if other != step]
        mend = f"Remove {self.folder / str(step)}, and a resumed run goes on from step {others[-1]}"
        mend = mend if others else "Begin anew"
        reason = str(cause).partition("\n")[0][:200]
        return f"Step {step} in {self.folder} is damaged at {item}: {reason}. {mend}."


class _KeepLastAndBestPolicy:
    """Which checkpoints stay: the last ones, and the best one.

    Orbax's own policy for the best forgets the scores with the process.
    """

    def __init__(self, save_total_limit: int) -> None:
        self.save_total_limit = save_total_limit
        self.best_step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """As Orbax asks for it."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.save_total_limit :], self.best_step}
        return [step in kept for step in steps]


def check_writable(folder: Path) -> None:
    """Makes a folder, and writes and removes a file in it: better now than at the first save.

    Raises:
        OSError: It cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{uuid.uuid4().hex}"
        with probe.open("wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        raise OSError(
            error.errno,
            f"Nothing can be written to {folder} ({error.strerror}). Choose another output, or "
            f"mend its rights or space",
        ) from error


def _remove_partial_checkpoints(folder: Path) -> None:
    """Removes what interrupted saves left.

    Orbax's own clearing goes on beside the run, and a short run ends before it.
    """
    if jax.process_index() == 0:
        for left in folder.glob(f"*{ocp.path.atomicity_types.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(left)


def _flatten_state_by_keystr(state: PyTree) -> dict[str, Any]:
    """The arrays of a state by their places in it."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): array for path, array in flat}


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _place_restored_array(array: np.ndarray, target: Any) -> Any:
    sharding = target.sharding
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
