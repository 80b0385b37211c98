"""The data of a recipe: its sources read, tokenised, and put in an order."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jlora.training.data.batch_stream import BatchStream
from jlora.training.data.chat_template import ChatTemplate
from jlora.training.data.formats import FORMATS, get_label_names
from jlora.training.data.packing import BatchConfig
from jlora.training.data.sources import load_rows
from jlora.training.data.tokenized_dataset import TokenizeConfig, TokenizedDataset
from jlora.training.data.tokenizer import Tokenizer
from jlora.training.recipe.sections import Recipe, SourceSection


class Datasets(NamedTuple):
    """What a run learns from and is measured on.

    Attributes:
        tokenizer: Of the base.
        train: The stream of training batches.
        validation: That of an evaluation, if there is one.
        test: That of the test, if there is one.
        label_names: What they are called, for classification.
        source_reports: What became of each source's rows, by its use and path.
    """

    tokenizer: Tokenizer
    train: BatchStream
    validation: BatchStream | None
    test: BatchStream | None
    label_names: tuple[str, ...] | None
    source_reports: dict[str, str]


def load_datasets(
    recipe: Recipe, folder: Path, vocab_size: int, local_train_rows: slice, local_eval_rows: slice
) -> Datasets:
    """The recipe's data.

    Args:
        recipe: The whole of it.
        folder: Of the base, which has the tokenizer.
        vocab_size: Of the model.
        local_train_rows: Which rows of a training batch this process fills.
        local_eval_rows: Which rows of an evaluation's.

    Raises:
        FileNotFoundError: A source or the tokenizer is not there.
        ValueError: A row is wrong; it is named.
    """
    template = recipe.data.chat_template
    now = (
        None
        if recipe.data.chat_template_date is None
        else datetime.datetime.fromisoformat(recipe.data.chat_template_date)
    )
    chosen = None
    if template is not None:
        text = Path(template).read_text(encoding="utf-8")
        chosen = ChatTemplate.from_folder(folder, text=text, now=now)
    tokenizer = Tokenizer.from_folder(folder, chosen, now=now)
    labels = _resolve_label_names(recipe, folder, vocab_size)
    held: dict[str, list[TokenizedDataset]] = {"train": [], "validation": [], "test": []}
    reports = {}
    for use, corpora in held.items():
        for source in getattr(recipe.data, use):
            corpora.append(_tokenize_source(recipe, source, tokenizer, vocab_size, labels))
            part = "" if source.split == "train" else f" [{source.split}]"
            reports[f"{use} {source.path}{part}"] = _format_dataset_report(corpora[-1])
    train = held["train"]

    def evaluation(corpora: list[TokenizedDataset]) -> BatchStream | None:
        if not corpora:
            return None
        shape = make_batch_config(recipe, recipe.batch.eval_batch_size or recipe.batch.size, 1)
        kind, pad = recipe.task, tokenizer.pad_token_id
        return BatchStream(
            corpora, shape, kind=kind, shuffle=False, pad_token_id=pad, local_slice=local_eval_rows
        )

    stream = BatchStream(
        train,
        make_batch_config(recipe, recipe.batch.size, recipe.batch.gradient_accumulation_steps),
        kind=recipe.task,
        seed=recipe.seed,
        weights=[source.weight for source in recipe.data.train],
        pad_token_id=tokenizer.pad_token_id,
        local_slice=local_train_rows,
    )
    validation, test = evaluation(held["validation"]), evaluation(held["test"])
    return Datasets(tokenizer, stream, validation, test, train[0].label_names, reports)


def make_batch_config(recipe: Recipe, batch_size: int, accumulation_steps: int) -> BatchConfig:
    """The shape of a recipe's batches."""
    data = recipe.data
    packing = data.packing and recipe.task == "language"
    buckets = None
    if not packing:
        buckets = tuple(
            sorted(
                {
                    *(data.buckets or _default_bucket_lengths(data.max_seq_length)),
                    data.max_seq_length,
                }
            )
        )
    return BatchConfig(
        batch_size=batch_size,
        seq_length=data.max_seq_length,
        gradient_accumulation_steps=accumulation_steps,
        packing=packing,
        buckets=buckets,
    )


def _default_bucket_lengths(max_length: int) -> Sequence[int]:
    """Powers of two from 32 on, below a length."""
    return [2**n for n in range(5, max_length.bit_length()) if 2**n < max_length]


def _load_source_rows(source: SourceSection) -> Any:
    return load_rows(
        source.path,
        split=source.split,
        name=source.name,
        revision=source.revision,
        max_examples=source.max_examples,
    )


def _make_tokenize_config(recipe: Recipe, source: SourceSection, vocab_size: int) -> TokenizeConfig:
    return TokenizeConfig(
        max_seq_length=recipe.data.max_seq_length,
        truncation=recipe.data.truncation,
        vocab_size=vocab_size,
        columns=source.columns,
        data_name=source.path,
    )


def _tokenize_source(
    recipe: Recipe,
    source: SourceSection,
    tokenizer: Tokenizer,
    vocab_size: int,
    label_names: Sequence[str] | None,
) -> TokenizedDataset:
    options: dict[str, object] = {}
    if source.format == "chat":
        options["train_on"] = recipe.data.train_on
    elif source.format == "completion":
        options["train_on"] = "all" if recipe.data.train_on == "all" else "completion"
    elif source.format == "classification":
        options["label_names"] = label_names
    reading = _make_tokenize_config(recipe, source, vocab_size)
    return FORMATS[source.format](_load_source_rows(source), tokenizer, reading, **options)


def _resolve_label_names(recipe: Recipe, folder: Path, vocab_size: int) -> Sequence[str] | None:
    """What labels are called: as the recipe or the base's own head says, or the training data."""
    if recipe.task != "classification":
        return None
    asked, own = recipe.classification.labels, read_head_labels(folder)
    if asked and own and list(asked) != own:
        raise ValueError(
            f"classification.labels={list(asked)} are not {own}, which the base's own head gives "
            f"scores to in this order. Leave them out, or give those."
        )
    if asked or own:
        return asked or own
    lists = [
        list(
            get_label_names(
                _load_source_rows(source), _make_tokenize_config(recipe, source, vocab_size)
            )
        )
        for source in recipe.data.train
    ]
    if all(names == lists[0] for names in lists):
        return lists[0]
    found = {name for names in lists for name in names}
    # Numbers in their own order, and not 10 before 2.
    return sorted(found, key=int if all(name.isdigit() for name in found) else None)


def read_head_labels(folder: Path) -> list[str] | None:
    """What the labels of a base's own head are called, in its order; None where they are not."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = config.get("id2label")
    if not any("ForSequenceClassification" in name for name in config.get("architectures") or ()):
        return None
    if not isinstance(named, dict) or all(str(n).startswith("LABEL_") for n in named.values()):
        return None
    return [str(named[number]) for number in sorted(named, key=int)]


def _format_dataset_report(dataset: TokenizedDataset) -> str:
    """What became of the rows: what was left out is said, what did not happen is not."""
    report = dataset.stats._asdict()
    first = f"{report.pop('rows'):,} rows, {report.pop('examples'):,} examples"
    tokens, learned = f"{report.pop('tokens'):,} tokens", report.pop("loss_tokens")
    if learned:  # Of texts with labels none is.
        tokens += f", {learned:,} of them learned"
    rest = [f"{count:,} {name.replace('_', ' ')}" for name, count in report.items() if count]
    return ", ".join([first, tokens, *rest])
