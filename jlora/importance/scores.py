"""Importance scores of weights: a result that prints as a table, adds up, and is saved as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.text_files import parse_json
from jlora.interpreter.terms import WeightAxes
from jlora.interpreter.weight import AxisSizes

_IMPORTANCE_FORMAT = "jlora importance"


class WeightScore(NamedTuple):
    """Importance of one weight.

    Attributes:
        shape: Shape of the weight.
        axes: Roles of its axes.
        scores: Importance of each of its matrices, (*batch): a scalar for a weight without batch
            axes.
        spectrum: Value of each further rank, (*batch, directions), descending. None: the method
            does not measure single ranks.

    Example:
        >>> import numpy as np
        >>> from jlora.importance import WeightScore
        >>> from jlora.adapters import WeightAxes
        >>> stack = WeightScore((2, 6, 5), WeightAxes((0,), (1,), (2,)), np.array([1.0, 3.0]))
        >>> stack.score, stack.total, stack.max_rank
        (2.0, 4.0, 5)
    """

    shape: tuple[int, ...]
    axes: WeightAxes
    scores: np.ndarray
    spectrum: np.ndarray | None = None

    @property
    def axis_sizes(self) -> AxisSizes:
        return self.axes.sizes(self.shape)

    @property
    def score(self) -> float:
        """Mean over the weight's matrices."""
        return float(np.mean(self.scores))

    @property
    def total(self) -> float:
        """Sum over the weight's matrices, so that a stack counts as its separate layers would."""
        return float(np.sum(self.scores))

    @property
    def max_rank(self) -> int:
        """Rank of the weight's matrices, or the number of measured directions if lower."""
        _, inputs, outputs = self.axis_sizes
        rank = min(math.prod(inputs), math.prod(outputs))
        return rank if self.spectrum is None else min(rank, self.spectrum.shape[-1])


@dataclasses.dataclass(frozen=True)
class Importance:
    """Importance of all measured weights; `print` shows a table, the most important weight first.

    Results on different batches add up: `first + second` is the result on all of their batches.

    Attributes:
        method: Name of the method.
        weights: Scores by path.
        count: Number of batches (for Fisher, of examples); 0 for methods without data.
        power: Power of the scores whose means over batches are taken. None: results do not add up.

    Raises:
        ValueError: Scores are negative or not finite, or do not have the weights' shapes.

    Example:
        >>> import numpy as np
        >>> from jlora.importance import Importance, WeightScore
        >>> from jlora.adapters import WeightAxes
        >>> axes = WeightAxes((), (0,), (1,))
        >>> weights = {"w": WeightScore((6, 5), axes, np.array(2.0))}
        >>> print(Importance("gradient_norm", weights, count=3, power=2))
        weight  shape  gradient_norm   share
        ------  -----  -------------  ------
        w       6x5                2  100.0%
        1 weight, measured on 3 batches.
    """

    method: str
    weights: Mapping[str, WeightScore]
    count: int = 0
    power: int | None = None

    def __post_init__(self) -> None:
        for path, weight_score in self.weights.items():
            _check_weight_score(path, weight_score)

    def __add__(self, other: Importance) -> Importance:
        """Returns the result on the batches of both.

        Raises:
            TypeError: `other` is not an `Importance`.
            ValueError: The two have different methods or weights, or do not add up.
        """
        if not isinstance(other, Importance):
            raise TypeError(
                f"An Importance can only be added to an Importance, got {type(other).__name__}."
            )
        if self.power is None or (self.method, self.power) != (other.method, other.power):
            raise ValueError(
                f"method={self.method!r} and {other.method!r} do not add up. Means over batches of "
                f"one gradient method do; for activation, add the moments instead; methods "
                f"without data have a single result."
            )
        layouts, other_layouts = (
            {path: (s.shape, s.axes) for path, s in importance.weights.items()}
            for importance in (self, other)
        )
        if layouts != other_layouts:
            differing = sorted(set(layouts) ^ set(other_layouts)) or sorted(
                path for path in layouts if layouts[path] != other_layouts[path]
            )
            raise ValueError(
                f"The two were measured on different weights, such as {differing[0]!r}. Add "
                f"results of one model and one select."
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
        count = len(self.weights)
        lines.append(f"{count} {'weight' if count == 1 else 'weights'}{self._format_count()}.")
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
        """Returns the result as JSON text, which `from_json` reads."""
        weights = {
            path: {
                "shape": list(one.shape),
                "axes": [list(group) for group in one.axes],
                "scores": one.scores.tolist(),
                "spectrum": None if one.spectrum is None else one.spectrum.tolist(),
            }
            for path, one in self.weights.items()
        }
        header = {
            "format": _IMPORTANCE_FORMAT,
            "method": self.method,
            "count": self.count,
            "power": self.power,
        }
        return json.dumps({**header, "weights": weights})

    @classmethod
    def from_json(cls, text: str) -> Importance:
        """Reads the text of `to_json`.

        Raises:
            ValueError: The text is not from `to_json`.
        """
        try:
            raw = parse_json(text, "it")
            if raw["format"] != _IMPORTANCE_FORMAT:
                raise ValueError(f"its format is {raw['format']!r}")
            weights = {
                str(path): _parse_weight_score(data) for path, data in raw["weights"].items()
            }
            count, power = int(raw["count"]), raw["power"]
            return cls(str(raw["method"]), weights, count, power and int(power))
        except Exception as error:  # Any value of a damaged file.
            raise ValueError(
                f"The text must be from Importance.to_json ({error!r}). Measure again."
            ) from error

    def plot(self, path: str | Path) -> None:
        """Writes a bar chart of the scores, the most important weight first.

        Args:
            path: Image file, PNG or SVG by its suffix.

        Raises:
            ImportError: matplotlib is not installed.
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
    arrays = {"scores": weight_score.scores, "spectrum": weight_score.spectrum}
    for name, array in arrays.items():
        if array is None:
            continue
        if array.shape[: len(batch)] != batch or array.ndim != len(batch) + (name == "spectrum"):
            raise ValueError(
                f"The {name} of {path!r} must have the batch axes {batch}, got shape {array.shape}."
            )
        if not np.isfinite(array).all() or (array < 0).any():
            raise ValueError(
                f"The {name} of {path!r} hold NaN, infinite or negative values, which cannot be "
                f"ranked. Look for NaN in the batches and the weights."
            )
    if weight_score.spectrum is not None and (np.diff(weight_score.spectrum, axis=-1) > 0).any():
        raise ValueError(f"The spectrum of {path!r} must be in descending order, but rises.")


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
    is_stack = weight_score.scores.size > 1
    return (
        path,
        "x".join(map(str, weight_score.shape)),
        f"{weight_score.score:.4g}",
        f"{weight_score.total / total:.1%}" if total else "-",
        f"{weight_score.scores.min():.4g}" if is_stack else "",
        f"{weight_score.scores.max():.4g}" if is_stack else "",
    )


def _align_importance_row(row: tuple[str, ...], widths: list[int]) -> str:
    """Aligns text to the left and numbers to the right."""
    texts = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join([*texts, *numbers]).rstrip()
