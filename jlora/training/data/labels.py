"""What the labels of a classification are called, and the number of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jlora.checkpoints.tensors import listed

# A higher number is no label but an id that came into the wrong column.
MOST_LABELS = 100_000
_NUMBER = re.compile(r"\s*[-+]?[0-9]{1,18}(\.[0-9]*)?\s*")


class Labels(NamedTuple):
    """Names of labels to their numbers.

    Attributes:
        names: In the order of the model's outputs.
        numbers: Of each name.
        where: What errors call the data.
    """

    names: tuple[str, ...]
    numbers: Mapping[str, int]
    where: str

    @classmethod
    def of(cls, names: Sequence[str], where: str) -> Labels:
        """The labels of those names.

        Raises:
            ValueError: They are not two or more that differ.
        """
        numbers = {name: number for number, name in enumerate(names)}
        if len(numbers) != len(names) or len(names) < 2:
            raise ValueError(
                f"{where}: label_names={list(names)} are not two or more names that differ. Give "
                f"every label its own, in the order of the model's outputs."
            )
        return cls(tuple(names), numbers, where)

    def number(self, label: Any, row: int) -> int:
        """The number of a row's label, which is a name or a number.

        Raises:
            ValueError: It is neither.
        """
        if isinstance(label, str) and label in self.numbers:
            return self.numbers[label]
        if type(label) is int and 0 <= label < len(self.names):
            return label
        raise ValueError(
            f"{self.where}, row {row}: label={label!r} is none of {listed(list(self.names), 20)}, "
            f"nor a number below {len(self.names)}. Mend the row, or name all labels: "
            f"label_names, in a recipe classification.labels."
        )


def collected(found: Sequence[Any], where: str) -> list[str]:
    """The names that labels have: strings in their order; of numbers, all up to the highest.

    Raises:
        ValueError: They are neither all strings, none of them empty, nor all numbers from 0.
    """
    kind = str if found and isinstance(found[0], str) else int
    for row, label in enumerate(found):
        number = type(label) is int and 0 <= label < MOST_LABELS
        if type(label) is not kind or not (number if kind is int else label):
            raise ValueError(
                f"{where}, row {row}: label={label!r}, where labels have to be all strings, none "
                f"empty, or all numbers from 0 and below {MOST_LABELS}. Mend the row."
            )
    if kind is str:
        return sorted(set(found))
    return [str(number) for number in range(max(found) + 1)]


def numbered(found: Sequence[str], names: Sequence[str] | None) -> Sequence[Any]:
    """The labels of a table without types: as numbers if all are, unless names say otherwise.

    Empty ones stay as they are, to be told with their row.
    """
    given = {label for label in found if label}
    if not all(_NUMBER.fullmatch(label) for label in given):
        return found
    numbers = {label: float(label) if "." in label else int(label) for label in given}
    places = {name: place for place, name in enumerate(names or ())}
    if any(places.get(label, number) != number for label, number in numbers.items()):
        return found
    return [numbers.get(label, label) for label in found]
