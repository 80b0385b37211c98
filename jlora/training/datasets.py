"""Datasets of a recipe: loading, tokenization, and streams of batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.text_files import name_file_in_errors, read_json
from jlora.models.splash_attention import SPLASH_BLOCK_SIZE
from jlora.training.data.batch_stream import BatchStream
from jlora.training.data.formats import FORMATS, get_label_names
from jlora.training.data.packing import BatchConfig
from jlora.training.data.sources import load_rows
from jlora.training.data.tokenized_dataset import TokenizeConfig, TokenizedDataset
from jlora.training.data.tokenizer import Tokenizer
from jlora.training.prompt_format import PromptFormat
from jlora.training.recipe.sections import Recipe, SourceSection


class Datasets(NamedTuple):
    """Datasets of a run.

    Attributes:
        tokenizer: Tokenizer of the base.
        train: Stream of training batches.
        validation: Stream of batches of an evaluation; None without validation data.
        test: Stream of batches of the test; None without test data.
        label_names: Names of the labels; None unless the task is classification.
        prompt_format: Format of the training data's prompts and answers.
        source_reports: Counts of rows, examples and tokens as text, by split and path.
    """

    tokenizer: Tokenizer
    train: BatchStream
    validation: BatchStream | None
    test: BatchStream | None
    label_names: tuple[str, ...] | None
    prompt_format: PromptFormat
    source_reports: dict[str, str]

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Special tokens with which answers of the training chats end, sorted."""
        return self.prompt_format.end_token_ids


def load_datasets(
    recipe: Recipe, folder: Path, vocab_size: int, local_train_rows: slice, local_eval_rows: slice
) -> Datasets:
    """Returns the datasets of a recipe.

    Args:
        recipe: Recipe of the run.
        folder: Folder of the base, which has the tokenizer.
        vocab_size: Vocabulary size of the model.
        local_train_rows: Rows of a training batch that this process fills.
        local_eval_rows: Rows of an evaluation batch that this process fills.

    Raises:
        FileNotFoundError: A source or the tokenizer does not exist.
        ValueError: A row is malformed; the message names it.
    """
    source = f"the chat template of {recipe.data.chat_template}"
    tokenizer = PromptFormat.from_recipe(recipe, False, ()).load_tokenizer(folder, source)
    labels = _resolve_label_names(recipe, folder, vocab_size)
    splits: dict[str, list[TokenizedDataset]] = {"train": [], "validation": [], "test": []}
    reports = {}
    for split, datasets in splits.items():
        for source in getattr(recipe.data, split):
            with _name_field(f"data.{split}.{len(datasets)}.path", source):
                datasets.append(_tokenize_source(recipe, source, tokenizer, vocab_size, labels))
            part = "" if source.split == "train" else f" [{source.split}]"
            reports[f"{split} {source.path}{part}"] = _format_dataset_report(datasets[-1])

    def make_eval_stream(datasets: list[TokenizedDataset]) -> BatchStream | None:
        if not datasets:
            return None
        return BatchStream(
            datasets,
            make_batch_config(recipe, recipe.batch.eval_batch_size or recipe.batch.size, 1),
            kind=recipe.task,
            shuffle=False,
            pad_token_id=tokenizer.pad_token_id,
            local_slice=local_eval_rows,
        )

    train = BatchStream(
        splits["train"],
        make_batch_config(recipe, recipe.batch.size, recipe.batch.gradient_accumulation_steps),
        kind=recipe.task,
        seed=recipe.seed,
        weights=[source.weight for source in recipe.data.train],
        pad_token_id=tokenizer.pad_token_id,
        local_slice=local_train_rows,
    )
    return Datasets(
        tokenizer=tokenizer,
        train=train,
        validation=make_eval_stream(splits["validation"]),
        test=make_eval_stream(splits["test"]),
        label_names=splits["train"][0].label_names,
        prompt_format=_find_prompt_format(recipe, splits["train"], tokenizer),
        source_reports=reports,
    )


def find_end_token_ids(dataset: TokenizedDataset, tokenizer: Tokenizer) -> set[int]:
    """Returns the special tokens at the ends of the parts of chats that are learned.

    With a loss on the whole chat, a blank may follow.
    """
    learned = np.append(dataset.loss_mask, False)
    starts = np.zeros(len(learned), np.bool_)
    starts[dataset.offsets] = True
    # The first token of a sequence has no loss, so parts of two sequences do not touch.
    ends = np.flatnonzero(learned[:-1] & ~learned[1:])
    blanks = [n for n in np.unique(dataset.tokens[ends]) if not tokenizer.decode([n]).strip()]
    ends = np.where(np.isin(dataset.tokens[ends], blanks) & ~starts[ends], ends - 1, ends)
    added = tokenizer.with_special_tokens.get_added_tokens_decoder()
    special = [token_id for token_id, token in added.items() if token.special]
    return {int(n) for n in np.unique(dataset.tokens[ends]) if n in special}


def _find_prompt_format(
    recipe: Recipe, datasets: Sequence[TokenizedDataset], tokenizer: Tokenizer
) -> PromptFormat:
    """Returns the format of prompts: messages if any source has some."""
    chats = [dataset for dataset in datasets if dataset.is_chat]
    ends = set[int]().union(*(find_end_token_ids(chat, tokenizer) for chat in chats))
    found = PromptFormat.from_recipe(recipe, bool(chats), tuple(sorted(ends)))
    template = tokenizer.chat_template
    if template is None or not template.depends_on_date:
        return found._replace(chat_template_date=None)  # Another day's run writes the same file.
    return found


def make_batch_config(recipe: Recipe, batch_size: int, accumulation_steps: int) -> BatchConfig:
    """Returns the shape of a recipe's batches."""
    data = recipe.data
    packing = recipe.packs_rows
    buckets = None
    if not packing:
        shortest = SPLASH_BLOCK_SIZE if recipe.model.attention_implementation == "splash" else 32
        lengths = data.buckets or _default_bucket_lengths(shortest, data.max_seq_length)
        buckets = tuple(sorted({*lengths, data.max_seq_length}))
    return BatchConfig(
        batch_size=batch_size,
        seq_length=data.max_seq_length,
        gradient_accumulation_steps=accumulation_steps,
        packing=packing,
        buckets=buckets,
    )


def _default_bucket_lengths(shortest: int, max_length: int) -> Sequence[int]:
    """Returns a power of two and the further ones that are below a length."""
    powers = range(shortest.bit_length() - 1, max_length.bit_length())
    return [2**n for n in powers if 2**n < max_length]


@contextlib.contextmanager
def _name_field(field: str, source: SourceSection) -> Iterator[None]:
    """Puts the field of a source before the errors about its files."""
    try:
        yield
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"{field}={source.path!r}: {error}") from error


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
    config = _make_tokenize_config(recipe, source, vocab_size)
    return FORMATS[source.format](_load_source_rows(source), tokenizer, config, **options)


def _resolve_label_names(recipe: Recipe, folder: Path, vocab_size: int) -> Sequence[str] | None:
    """Returns the names of the labels: from the recipe, the base's own head, or the training data.

    None unless the task is classification.
    """
    if recipe.task != "classification":
        return None
    labels, head_labels = recipe.classification.labels, read_head_labels(folder)
    if labels and head_labels and list(labels) != head_labels:
        raise ValueError(
            f"classification.labels={list(labels)} must be {head_labels}, the labels of the base's "
            f"head in its order. Change them, or leave them out."
        )
    if labels or head_labels:
        return labels or head_labels
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
    union = {name for names in lists for name in names}
    if all(name.isdecimal() for name in union):  # Numbers by value, so that 2 comes before 10.
        return sorted(union, key=lambda name: (int(name), name))
    return sorted(union)


def read_head_labels(folder: Path) -> list[str] | None:
    """Returns the label names of a base's own head in its order; None without head or names."""
    path = folder / "config.json"
    config = read_json(path)
    labels = config.get("id2label")
    with name_file_in_errors(path):
        architectures = config.get("architectures") or ()
        if not any("ForSequenceClassification" in name for name in architectures):
            return None
        if not isinstance(labels, dict) or all(
            str(name).startswith("LABEL_") for name in labels.values()
        ):
            return None
        return [str(labels[number]) for number in sorted(labels, key=int)]


def _format_dataset_report(dataset: TokenizedDataset) -> str:
    """Returns the counts of rows, examples and tokens; counts of zero are left out."""
    counts = dataset.stats._asdict()
    examples = f"{counts.pop('rows'):,} rows, {counts.pop('examples'):,} examples"
    tokens, loss_tokens = f"{counts.pop('tokens'):,} tokens", counts.pop("loss_tokens")
    if loss_tokens:  # Classification has none.
        tokens += f", {loss_tokens:,} of them in the loss"
    rest = [f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count]
    return ", ".join([examples, tokens, *rest])
