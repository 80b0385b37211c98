"""The data of a recipe: its sources read, tokenised, and put in an order."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jlora.training.data.batches import Stream
from jlora.training.data.corpus import Corpus, Reading
from jlora.training.data.examples import FORMATS, names_of_labels
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
        reports: What became of each source's rows, by its use and path.
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
    now = None if recipe.data.date is None else datetime.datetime.fromisoformat(recipe.data.date)
    chosen = None
    if template is not None:
        text = Path(template).read_text(encoding="utf-8")
        chosen = ChatTemplate.of(folder, text=text, now=now)
    tokenizer = Tokenizer.of(folder, chosen, now=now)
    labels = _labels(recipe, folder, vocab_size)
    held: dict[str, list[Corpus]] = {"train": [], "validation": [], "test": []}
    reports = {}
    for use, corpora in held.items():
        for source in getattr(recipe.data, use):
            corpora.append(_corpus(recipe, source, tokenizer, vocab_size, labels))
            part = "" if source.split == "train" else f" [{source.split}]"
            reports[f"{use} {source.path}{part}"] = _told(corpora[-1])
    train = held["train"]

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
    validation, test = evaluation(held["validation"]), evaluation(held["test"])
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


def _rows(source: Source) -> Any:
    return rows(
        source.path,
        split=source.split,
        name=source.name,
        revision=source.revision,
        limit=source.limit,
    )


def _reading(recipe: Recipe, source: Source, vocab_size: int) -> Reading:
    return Reading(
        length=recipe.data.length,
        overlong=recipe.data.overlong,
        vocab_size=vocab_size,
        columns=source.columns,
        where=source.path,
    )


def _corpus(
    recipe: Recipe,
    source: Source,
    tokenizer: Tokenizer,
    vocab_size: int,
    labels: Sequence[str] | None,
) -> Corpus:
    options: dict[str, object] = {}
    if source.format == "chat":
        options["loss_on"] = recipe.data.loss_on
    elif source.format == "completion":
        options["loss_on"] = "all" if recipe.data.loss_on == "all" else "completion"
    elif source.format == "classification":
        options["label_names"] = labels
    reading = _reading(recipe, source, vocab_size)
    return FORMATS[source.format](_rows(source), tokenizer, reading, **options)


def _labels(recipe: Recipe, folder: Path, vocab_size: int) -> Sequence[str] | None:
    """What labels are called: as the recipe or the base's own head says, or the training data."""
    if recipe.task != "classification":
        return None
    asked, own = recipe.classification.labels, head_labels(folder)
    if asked and own and list(asked) != own:
        raise ValueError(
            f"classification.labels={list(asked)} are not {own}, which the base's own head gives "
            f"scores to in this order. Leave them out, or give those."
        )
    if asked or own:
        return asked or own
    lists = [
        list(names_of_labels(_rows(source), _reading(recipe, source, vocab_size)))
        for source in recipe.data.train
    ]
    if all(names == lists[0] for names in lists):
        return lists[0]
    found = {name for names in lists for name in names}
    # Numbers in their own order, and not 10 before 2.
    return sorted(found, key=int if all(name.isdigit() for name in found) else None)


def head_labels(folder: Path) -> list[str] | None:
    """What the labels of a base's own head are called, in its order; None where they are not."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = config.get("id2label")
    if not any("ForSequenceClassification" in name for name in config.get("architectures") or ()):
        return None
    if not isinstance(named, dict) or all(str(n).startswith("LABEL_") for n in named.values()):
        return None
    return [str(named[number]) for number in sorted(named, key=int)]


def _told(corpus: Corpus) -> str:
    """What became of the rows: what was left out is said, what did not happen is not."""
    report = corpus.report._asdict()
    first = f"{report.pop('rows'):,} rows, {report.pop('examples'):,} examples"
    tokens, learned = f"{report.pop('tokens'):,} tokens", report.pop("learned")
    if learned:  # Of texts with labels none is.
        tokens += f", {learned:,} of them learned"
    rest = [f"{count:,} {name}" for name, count in report.items() if count]
    return ", ".join([first, tokens, *rest])
