"""The stream of batches, which goes on anywhere from two numbers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

from jlora.training.data import arrays
from jlora.training.data.corpus import Corpus
from jlora.training.data.order import Batching, Pair, Plan, Planned, epoch_plan, exact_weights

Kind = Literal["language", "preference", "classification"]


class Position(NamedTuple):
    """How far a stream went: all that a checkpoint has to keep of it.

    Attributes:
        epoch: Which it is in, from 0.
        batch: The number of its next batch in it.
    """

    epoch: int = 0
    batch: int = 0


START = Position()


class Batch(NamedTuple):
    """The rows of one step, of one process.

    Attributes:
        arrays: With the leading axes (accumulate, rows).
        ids: For every row, in the same order, the source and number of its examples. They tell
            where a bad loss came from, and are not for devices.
    """

    arrays: arrays.Language | arrays.Classes
    ids: tuple[tuple[Pair, ...], ...]


class Stream:
    """Batches without end, each a function of the data, the options, the seed and its position.

    A stream that starts at any position gives what one that came there gives. Every process makes
    the same plan and fills its own rows of it.

    Attributes:
        fingerprint: Of everything that batches depend on, the number of processes aside. A run
            that goes on with another one would see some examples twice and others never.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        batching: Batching,
        *,
        kind: Kind = "language",
        seed: int = 0,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        pad: int = 0,
        mine: slice = slice(None),
    ) -> None:
        """Looks at the data and plans the first epoch.

        Args:
            corpora: The sources, all of one kind.
            batching: The shape of batches.
            kind: What is learnt: to write, to prefer, or to tell labels.
            seed: Of all shuffles.
            weights: How often each source is gone through in an epoch; once when left out.
            shuffle: Whether to. Evaluation goes without.
            pad: The token of places without one.
            mine: Which of the rows this process fills; all when left out.

        Raises:
            ValueError: The data is not of that kind, an example is longer than a row, the weights
                leave no example for an epoch.
        """
        _check_kind(corpora, kind)
        if kind != "language":
            batching = dataclasses.replace(batching, packing=False)
        exact = exact_weights(weights, len(corpora))
        sizes = [corpus.examples for corpus in corpora]
        # Where no source has an example for the first epoch, that has no batch; where one has, it
        # has one for every epoch.
        if all(weight * size < 1 for weight, size in zip(exact, sizes, strict=True)):
            raise ValueError(
                f"The sources' weights={list(weights or ())} take none of their {sizes} examples "
                f"in the first epoch, which has no batch then. Give one source a greater weight: "
                f"times its examples it has to be 1 or more."
            )
        self.batching = batching
        self._corpora = corpora
        self._kind = kind
        self._pad = pad
        self.mine = mine
        lengths = [corpus.lengths() for corpus in corpora]
        # An epoch is planned ahead while the one before is still asked for.
        self._plan = functools.lru_cache(maxsize=2)(
            lambda epoch: epoch_plan(
                lengths, batching, seed=seed, epoch=epoch, weights=weights, shuffle=shuffle
            )
        )
        what = [kind, batching, seed, exact, shuffle, pad, *(c.fingerprint for c in corpora)]
        self.fingerprint = hashlib.sha256(repr(what).encode()).hexdigest()
        self._plan(0)

    def plan(self, epoch: int) -> Plan:
        """Which examples make which batch of an epoch."""
        return self._plan(epoch)

    def steps(self, epochs: int) -> int:
        """How many batches so many epochs have."""
        return sum(len(self._plan(epoch)) for epoch in range(epochs))

    def batches(
        self, position: Position = START, *, epochs: int | None = None
    ) -> Iterator[tuple[Position, Batch]]:
        """The batches from a position on, each with the position after it.

        Args:
            position: Where to go on.
            epochs: Where to stop: after so many epochs from the first; never when None.

        Raises:
            ValueError: There is no such position.
        """
        epoch, first = position
        if epoch < 0 or not 0 <= first <= len(self._plan(epoch)):
            raise ValueError(
                f"{position} is none of this data: its epoch has {len(self._plan(max(epoch, 0)))} "
                f"batches. Go on with the data and options that it comes from."
            )
        return self._from(epoch, first, epochs)

    def _from(self, epoch: int, first: int, epochs: int | None) -> Iterator[tuple[Position, Batch]]:
        while epochs is None or epoch < epochs:
            plan = self._plan(epoch)
            for number in range(first, len(plan)):
                last = number + 1 == len(plan)
                after = Position(epoch + 1, 0) if last else Position(epoch, number + 1)
                yield after, self._batch(plan[number])
            epoch, first = epoch + 1, 0

    def _batch(self, planned: Planned) -> Batch:
        """The batch planned, in so far as it is this process's."""
        size = self.batching.rows
        ids = tuple(
            row
            for start in range(0, len(planned.rows), size)
            for row in planned.rows[start : start + size][self.mine]
        )
        fill = arrays.classes if self._kind == "classification" else arrays.language
        made = fill(self._corpora, planned.length, ids, self._pad)
        shape = (self.batching.accumulate, -1)
        return Batch(type(made)(*(a.reshape(*shape, *a.shape[1:]) for a in made)), ids)


def _check_kind(corpora: Sequence[Corpus], kind: Kind) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} is none of {', '.join(get_args(Kind))}. Choose one.")
    for number, corpus in enumerate(corpora):
        found = "preference" if corpus.sequences == 2 else "language"
        found = "classification" if corpus.labels is not None else found
        if found != kind:
            raise ValueError(
                f"kind={kind!r}, and source {number} is for {found}. Read it in another format, or "
                f"say kind={found!r}."
            )
    names = {corpus.label_names for corpus in corpora}
    if len(names) > 1:
        raise ValueError(
            f"The sources call their labels differently: {sorted(names, key=repr)}. Name them for "
            f"all: label_names, in a recipe classification.labels."
        )
