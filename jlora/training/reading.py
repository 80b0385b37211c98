"""The data of a recipe: its sources read, tokenised, and put in an order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jlora.training.data.batches import Stream
from jlora.training.data.corpus import Corpus, Reading
from jlora.training.data.examples import FORMATS
from jlora.training.data.order import Batching
from jlora.training.data.sources import rows
from jlora.training.data.template import ChatTemplate
from jlora.training.data.tokenizer import Tokenizer
from jlora.training.recipe.sections import Recipe, Source


class Datasets(NamedTuple):
    """What a run learns from and is measured on.

    Attributes:
        tokenizer: Of the base.
        train: The stream of training batches.
        validation: That of an evaluation, if there is one.
        test: That of the test, if there is one.
        labels: What they are called, for classification.
        reports: What became of each source's rows, by its path.
    """

    tokenizer: Tokenizer
    train: Stream
    validation: Stream | None
    test: Stream | None
    labels: tuple[str, ...] | None
    reports: dict[str, str]


def read(recipe: Recipe, folder: Path, vocab_size: int, mine: slice, evaluated: slice) -> Datasets:
    """The recipe's data.

    Args:
        recipe: The whole of it.
        folder: Of the base, which has the tokenizer.
        vocab_size: Of the model.
        mine: Which rows of a training batch this process fills.
        evaluated: Which rows of an evaluation's.

    Raises:
        FileNotFoundError: A source or the tokenizer is not there.
        ValueError: A row is wrong; it is named.
    """
    template = recipe.data.chat_template
    chosen = None if template is None else ChatTemplate.of(folder, text=Path(template).read_text())
    tokenizer = Tokenizer.of(folder, chosen)
    labels = recipe.classification.labels
    train: list[Corpus] = []
    reports = {}
    for source in recipe.data.train:
        names = train[0].label_names if train else labels
        train.append(_corpus(recipe, source, tokenizer, vocab_size, names))
        reports[source.path] = _told(train[-1])
    held: dict[str, list[Corpus]] = {"validation": [], "test": []}
    for name, corpora in held.items():
        for source in getattr(recipe.data, name):
            made = _corpus(recipe, source, tokenizer, vocab_size, train[0].label_names)
            corpora.append(made)
            reports[source.path] = _told(made)

    def evaluation(corpora: list[Corpus]) -> Stream | None:
        if not corpora:
            return None
        shape = batching(recipe, recipe.batch.evaluation_rows or recipe.batch.rows, 1)
        kind, pad = recipe.task, tokenizer.pad
        return Stream(corpora, shape, kind=kind, shuffle=False, pad=pad, mine=evaluated)

    stream = Stream(
        train,
        batching(recipe, recipe.batch.rows, recipe.batch.accumulate),
        kind=recipe.task,
        seed=recipe.seed,
        weights=[source.weight for source in recipe.data.train],
        pad=tokenizer.pad,
        mine=mine,
    )
    validation, test = map(evaluation, held.values())
    return Datasets(tokenizer, stream, validation, test, train[0].label_names, reports)


def batching(recipe: Recipe, rows: int, accumulate: int) -> Batching:
    """The shape of a recipe's batches."""
    data = recipe.data
    packing = data.packing and recipe.task == "language"
    buckets = None
    if not packing:
        buckets = tuple(sorted({*(data.buckets or _powers(data.length)), data.length}))
    return Batching(
        rows=rows, length=data.length, accumulate=accumulate, packing=packing, buckets=buckets
    )


def _powers(length: int) -> Sequence[int]:
    """Powers of two from 32 on, below a length."""
    return [2**n for n in range(5, length.bit_length()) if 2**n < length]


def _corpus(
    recipe: Recipe,
    source: Source,
    tokenizer: Tokenizer,
    vocab_size: int,
    labels: Sequence[str] | None,
) -> Corpus:
    found = rows(
        source.path,
        split=source.split,
        name=source.name,
        revision=source.revision,
        limit=source.limit,
    )
    reading = Reading(
        length=recipe.data.length,
        overlong=recipe.data.overlong,
        vocab_size=vocab_size,
        columns=source.columns,
        where=source.path,
    )
    options: dict[str, object] = {}
    if source.format == "chat":
        options["loss_on"] = recipe.data.loss_on
    elif source.format == "completion":
        options["loss_on"] = "all" if recipe.data.loss_on == "all" else "completion"
    elif source.format == "classification":
        options["label_names"] = labels
    return FORMATS[source.format](found, tokenizer, reading, **options)


def _told(corpus: Corpus) -> str:
    """What became of the rows: what was left out is said, what did not happen is not."""
    report = corpus.report._asdict()
    first = f"{report.pop('rows'):,} rows, {report.pop('examples'):,} examples"
    tokens, learned = f"{report.pop('tokens'):,} tokens", report.pop("learned")
    if learned:  # Of texts with labels none is.
        tokens += f", {learned:,} of them learned"
    rest = [f"{count:,} {name}" for name, count in report.items() if count]
    return ", ".join([first, tokens, *rest])
