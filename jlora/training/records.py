"""What a run measures, written down as it goes: a line of JSON each, and TensorBoard's files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

METRICS = "metrics.jsonl"
Values = Mapping[str, float]


class Recorder(Protocol):
    """Where measurements go. Anything with these two methods can be given to `train`."""

    def record(self, step: int, values: Values) -> None:
        """Takes what was measured at a step."""
        ...

    def close(self) -> None:
        """Writes what is left."""
        ...


class JsonLines:
    """metrics.jsonl: a line `{"step": ..., ...}` for every step and evaluation."""

    def __init__(self, path: str | os.PathLike[str], *, after: int = 0) -> None:
        """Opens the file.

        Args:
            path: Of the file.
            after: The last step that counts: lines of later ones, which an interrupted run wrote
                and a resumed one writes again, are taken out.
        """
        path = Path(path)
        kept = [line for line in read_lines(path) if line["step"] <= after]
        # Written beside the old file and moved into its place, so that being killed loses nothing.
        temporary = path.with_suffix(".tmp")
        self._file = temporary.open("w", encoding="utf-8")
        for line in kept:
            self._write(line)
        temporary.replace(path)

    def record(self, step: int, values: Values) -> None:
        """Writes a line."""
        self._write({"step": step, **values})

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(plain(line)) + "\n")
        self._file.flush()


def plain(value: Any) -> Any:
    """The value as JSON has it, which has no NaN: a reader should not need Python's."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """Event files that TensorBoard draws."""

    def __init__(self, folder: str | os.PathLike[str], *, after: int = 0) -> None:
        """Opens a file in the folder; a resumed run's hides what an earlier one wrote `after`."""
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(os.fspath(folder), purge_step=after + 1)

    def record(self, step: int, values: Values) -> None:
        """Adds a point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


def recorders_of(output: Path, *, tensorboard: bool, after: int) -> list[JsonLines | TensorBoard]:
    """Those that write into a run's folder, from the first process alone.

    Args:
        output: The folder.
        tensorboard: Whether TensorBoard's files are wanted too.
        after: The last step that counts of what is there.
    """
    if jax.process_index() > 0:
        return []
    found: list[JsonLines | TensorBoard] = [JsonLines(output / METRICS, after=after)]
    if tensorboard:
        found.append(TensorBoard(output / "tensorboard", after=after))
    return found


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none if it is not there. A last one cut short is left out."""
    if not Path(path).is_file():
        return []
    found = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break  # A run was killed while it wrote.
        found.append({key: float(v) if key != "step" else int(v) for key, v in line.items()})
    return found


def record_all(recorders: Iterable[Recorder], step: int, values: Values) -> None:
    """Tells every recorder."""
    for recorder in recorders:
        recorder.record(step, values)
