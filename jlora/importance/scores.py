"""How much each weight matters: scores as one thing that prints, adds up, and is kept in files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.interpreter.usage import WeightAxes
from jlora.interpreter.weight import AxisSizes, get_axis_sizes

_IMPORTANCE_FORMAT = "jlora importance"


class WeightScore(NamedTuple):
    """One weight.

    Attributes:
        shape: Of the weight.
        axes: What each of its axes does.
        scores: How much each of its matrices matters, (*batch): one number where it is no stack.
        spectrum: (*batch, directions): what one rank more is worth, falling; None where a method
            knows nothing of single ranks.
    """

    shape: tuple[int, ...]
    axes: WeightAxes
    scores: np.ndarray
    spectrum: np.ndarray | None = None

    @property
    def axis_sizes(self) -> AxisSizes:
        return get_axis_sizes(self.shape, self.axes)

    @property
    def score(self) -> float:
        """The mean over its matrices."""
        return float(np.mean(self.scores))

    @property
    def total(self) -> float:
        """The sum over its matrices, so that a stack counts as its layers apart do."""
        return float(np.sum(self.scores))

    @property
    def max_rank(self) -> int:
        """That of its matrices, or how many directions were measured if those are fewer."""
        _, inputs, outputs = self.axis_sizes
        own = min(math.prod(inputs), math.prod(outputs))
        return own if self.spectrum is None else min(own, self.spectrum.shape[-1])


@dataclasses.dataclass(frozen=True)
class Importance:
    """How much each weight matters; `print` shows it as a table, the most important first.

    What was measured on some batches and on others adds up: `first + second` is what would have
    been measured on all of them.

    Attributes:
        method: How it was measured: the name of one of the methods.
        weights: By path.
        count: On how many batches (examples, for Fisher); 0 where no data was needed.
        power: Of which power of the scores the means are taken; None where they do not add up.

    Raises:
        ValueError: For scores that are no numbers, negative, or of other shapes than the weights.
    """

    method: str
    weights: Mapping[str, WeightScore]
    count: int = 0
    power: int | None = None

    def __post_init__(self) -> None:
        for path, one in self.weights.items():
            _check_weight_score(path, one)

    def __add__(self, other: Importance) -> Importance:
        """What the batches of both say.

        Raises:
            TypeError: For anything but an `Importance`.
            ValueError: When they are of different methods or weights, or do not add up.
        """
        if not isinstance(other, Importance):
            raise TypeError(f"{type(other).__name__} is no Importance, which alone can be added.")
        if self.power is None or (self.method, self.power) != (other.method, other.power):
            raise ValueError(
                f"method={self.method!r} and {other.method!r} do not add up. Means over batches of "
                f"one method do; of activations add the moments, and of weights there is one."
            )
        mine, theirs = ({p: (s.shape, s.axes) for p, s in i.weights.items()} for i in (self, other))
        if mine != theirs:
            odd = sorted(set(mine) ^ set(theirs)) or sorted(p for p in mine if mine[p] != theirs[p])
            raise ValueError(
                f"The two were measured on different weights, such as {odd[0]!r}. Add what was "
                f"measured with one model and one select."
            )
        count, power = self.count + other.count, self.power
        added = {
            path: one._replace(
                scores=(
                    (
                        self.count * one.scores**power
                        + other.count * other.weights[path].scores ** power
                    )
                    / count
                )
                ** (1 / power)
            )
            for path, one in self.weights.items()
        }
        return dataclasses.replace(self, weights=added, count=count)

    def __str__(self) -> str:
        total = sum(one.total for one in self.weights.values())
        header = ("weight", "shape", self.method, "share", "lowest", "highest")
        ordered = sorted(self.weights.items(), key=lambda item: (-item[1].score, item[0]))
        cells = [header, *(_format_importance_row(path, one, total) for path, one in ordered)]
        if not any(row[-1] for row in cells[1:]):  # There are no stacks.
            cells = [row[:-2] for row in cells]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [_align_importance_row(row, widths) for row in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(f"{len(self.weights)} weights{self._format_count()}.")
        return "\n".join(lines)

    def _format_count(self) -> str:
        unit = "example" if self.method == "fisher" else "batch"
        plural = {"example": "examples", "batch": "batches"}[unit]
        return (
            f", measured on {self.count} {unit if self.count == 1 else plural}"
            if self.count
            else ""
        )

    def to_json(self) -> str:
        """The whole as a text that `from_json` reads."""
        weights = {
            path: {
                "shape": list(one.shape),
                "axes": [list(group) for group in one.axes],
                "scores": one.scores.tolist(),
                "spectrum": None if one.spectrum is None else one.spectrum.tolist(),
            }
            for path, one in self.weights.items()
        }
        head = {
            "format": _IMPORTANCE_FORMAT,
            "method": self.method,
            "count": self.count,
            "power": self.power,
        }
        return json.dumps({**head, "weights": weights})

    @classmethod
    def from_json(cls, text: str) -> Importance:
        """What `to_json` wrote.

        Raises:
            ValueError: For any other text.
        """
        try:
            raw = json.loads(text)
            if raw["format"] != _IMPORTANCE_FORMAT:
                raise ValueError(f"its format is {raw['format']!r}")
            weights = {
                str(path): _parse_weight_score(facts) for path, facts in raw["weights"].items()
            }
            count, power = int(raw["count"]), raw["power"]
            return cls(str(raw["method"]), weights, count, power and int(power))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"The text is nothing that Importance.to_json wrote ({error!r}). Measure anew."
            ) from error

    def plot(self, path: str | Path) -> None:
        """Writes a picture, PNG or SVG by the file's ending: a bar for each weight's share, the
        most important first.

        Raises:
            ImportError: Without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "Importance.plot needs matplotlib. Install it with: pip install 'jlora[train]'"
            ) from error
        ordered = sorted(self.weights.items(), key=lambda item: (item[1].score, item[0]))
        figure = Figure(figsize=(8, 1 + 0.22 * len(ordered)), layout="constrained")
        axis = figure.subplots()
        axis.barh([name for name, _ in ordered], [one.score for _, one in ordered])
        axis.set_xlabel(self.method.replace("_", " "))
        axis.margins(y=0.01)
        figure.savefig(path)


def _check_weight_score(path: str, weight_score: WeightScore) -> None:
    batch = weight_score.axis_sizes.batch
    arrays = {"scores": (weight_score.scores, batch), "spectrum": (weight_score.spectrum, batch)}
    for name, (array, shape) in arrays.items():
        if array is None:
            continue
        if array.shape[: len(batch)] != shape or array.ndim != len(batch) + (name == "spectrum"):
            raise ValueError(
                f"The {name} of {path!r} have shape {array.shape}, and its batch axes {shape}."
            )
        if not np.isfinite(array).all() or (array < 0).any():
            raise ValueError(
                f"The {name} of {path!r} hold NaN, infinite or negative numbers, which rank "
                f"nothing. Look for NaN in the batches and the weights."
            )
    if weight_score.spectrum is not None and (np.diff(weight_score.spectrum, axis=-1) > 0).any():
        raise ValueError(f"The spectrum of {path!r} rises; give the largest numbers first.")


def _parse_weight_score(data: Mapping[str, Any]) -> WeightScore:
    shape = tuple(int(length) for length in data["shape"])
    axes = WeightAxes(*(tuple(int(axis) for axis in group) for group in data["axes"]))
    if sorted(axis for group in axes for axis in group) != list(range(len(shape))):
        raise ValueError(f"axes={axes} are not those of a weight of shape {shape}")
    scores = np.asarray(data["scores"], np.float64)
    spectrum = data["spectrum"]
    return WeightScore(
        shape, axes, scores, None if spectrum is None else np.asarray(spectrum, np.float64)
    )


def _format_importance_row(path: str, weight_score: WeightScore, total: float) -> tuple[str, ...]:
    stacked = weight_score.scores.size > 1
    return (
        path,
        "x".join(map(str, weight_score.shape)),
        f"{weight_score.score:.4g}",
        f"{weight_score.total / total:.1%}" if total else "-",
        f"{weight_score.scores.min():.4g}" if stacked else "",
        f"{weight_score.scores.max():.4g}" if stacked else "",
    )


def _align_importance_row(row: tuple[str, ...], widths: list[int]) -> str:
    """Texts to the left, numbers to the right."""
    texts = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join([*texts, *numbers]).rstrip()
