"""Rows of five formats as tokenised examples."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import tokenizers

from jlora.checkpoints.safetensors_io import format_names
from jlora.training.data.chat_template import (
    CharSpan,
    ChatTemplate,
    Message,
    TrainOn,
    validate_messages,
)
from jlora.training.data.tokenized_dataset import (
    TokenizeConfig,
    TokenizedDataset,
    TokenizedDatasetBuilder,
    TokenSequence,
)
from jlora.training.data.tokenizer import Tokenizer

# A higher number is no label but an id that came into the wrong column.
MAX_LABELS = 100_000

_NUMBER_PATTERN = re.compile(r"\s*[-+]?[0-9]{1,18}(\.[0-9]*)?\s*")


class LabelEncoder(NamedTuple):
    """Names of labels to their numbers.

    Attributes:
        names: In the order of the model's outputs.
        label2id: Of each name.
        data_name: What errors call the data.
    """

    names: tuple[str, ...]
    label2id: Mapping[str, int]
    data_name: str

    @classmethod
    def from_names(cls, names: Sequence[str], data_name: str) -> LabelEncoder:
        """The labels of those names.

        Raises:
            ValueError: They are not two or more that differ.
        """
        numbers = {name: number for number, name in enumerate(names)}
        if len(numbers) != len(names) or len(names) < 2:
            raise ValueError(
                f"{data_name}: label_names={list(names)} are not two or more names that differ. Give "
                f"every label its own, in the order of the model's outputs."
            )
        return cls(tuple(names), numbers, data_name)

    def encode(self, label: Any, row_index: int) -> int:
        """The number of a row's label, which is a name or a number.

        Raises:
            ValueError: It is neither.
        """
        if isinstance(label, str) and label in self.label2id:
            return self.label2id[label]
        if type(label) is int and 0 <= label < len(self.names):
            return label
        raise ValueError(
            f"{self.data_name}, row {row_index}: label={label!r} is none of {format_names(list(self.names), 20)}, "
            f"nor a number below {len(self.names)}. Mend the row, or name all labels: "
            f"label_names, in a recipe classification.labels."
        )


def infer_label_names(labels: Sequence[Any], data_name: str) -> list[str]:
    """The names that labels have: strings in their order; of numbers, all up to the highest.

    Raises:
        ValueError: They are neither all strings, none of them empty, nor all numbers from 0.
    """
    kind = str if labels and isinstance(labels[0], str) else int
    for row, label in enumerate(labels):
        number = type(label) is int and 0 <= label < MAX_LABELS
        if type(label) is not kind or not (number if kind is int else label):
            raise ValueError(
                f"{data_name}, row {row}: label={label!r}, where labels have to be all strings, none "
                f"empty, or all numbers from 0 and below {MAX_LABELS}. Mend the row."
            )
    if kind is str:
        return sorted(set(labels))
    return [str(number) for number in range(max(labels) + 1)]


def parse_numeric_labels(labels: Sequence[str], label_names: Sequence[str] | None) -> Sequence[Any]:
    """The labels of a table without types: as numbers if all are, unless names say otherwise.

    Empty ones stay as they are, to be told with their row.
    """
    given = {label for label in labels if label}
    if not all(_NUMBER_PATTERN.fullmatch(label) for label in given):
        return labels
    numbers = {label: float(label) if "." in label else int(label) for label in given}
    places = {name: place for place, name in enumerate(label_names or ())}
    if any(places.get(label, number) != number for label, number in numbers.items()):
        return labels
    return [numbers.get(label, label) for label in labels]


if TYPE_CHECKING:
    import datasets

    Rows = datasets.Dataset | Sequence[Mapping[str, Any]]

# Rows are tokenised so many at a time, over the machine's cores.
_TOKENIZE_BATCH_SIZE = 1000


def tokenize_chats(
    rows: Rows, tokenizer: Tokenizer, config: TokenizeConfig, *, train_on: TrainOn = "assistant"
) -> TokenizedDataset:
    """Chats, of which is learnt what the assistant says.

    Args:
        rows: With a column `messages`, and `tools` if there are any: a list, or one as JSON.
        tokenizer: With a chat template, which writes all special tokens.
        config: Lengths, and what the columns are called.
        train_on: "assistant", the "last" one alone, or "all" that the template writes.

    Raises:
        ValueError: A message is wrong, or the template cannot tell who says what.
    """
    _reject_split_truncation(config)
    template = _require_chat_template(tokenizer, config)
    builder = TokenizedDatasetBuilder(config)
    for start, columns in _iter_column_batches(rows, config, ("messages",), ("tools",)):
        spoken: list[tuple[str, list[CharSpan]]] = []
        for number, messages in enumerate(columns["messages"]):
            where = f"{config.data_name}, row {start + number}"
            tools = _parse_tools(columns["tools"][number], where) if "tools" in columns else None
            spans = template.render_with_spans(
                messages, tools=tools, train_on=train_on, location=where
            )
            spoken.append(spans)
        for number, part in enumerate(_tokenize_rendered_chats(tokenizer, spoken)):
            builder.add(start + number, part)
    return builder.build()


def tokenize_completions(
    rows: Rows,
    tokenizer: Tokenizer,
    config: TokenizeConfig,
    *,
    train_on: Literal["completion", "all"] = "completion",
) -> TokenizedDataset:
    """Prompts and what follows them, which is learnt with the end of the text.

    Prompt and completion are tokenised apart, so that no token lies in both.

    Args:
        rows: With columns `prompt` and `tokenize_completions`.
        tokenizer: With an eos token.
        config: Lengths, and what the columns are called.
        train_on: "completion", or "all" to learn the prompt as well.

    Raises:
        ValueError: A row holds no string, or the tokenizer has no eos token.
    """
    if train_on not in ("completion", "all"):
        raise ValueError(f"train_on={train_on!r} is neither completion nor all. Choose one.")
    _reject_split_truncation(config)
    end = _require_eos_token_id(tokenizer)
    builder = TokenizedDatasetBuilder(config)
    for start, columns in _iter_column_batches(rows, config, ("prompt", "completion")):
        prompts, completions = (
            tokenizer.encode(_get_string_column(columns, name, start, config))
            for name in ("prompt", "completion")
        )
        for number, (prompt, ids) in enumerate(zip(prompts, completions, strict=True)):
            head = [*tokenizer.prefix_ids, *prompt]
            builder.add(
                start + number, _join_prompt_and_completion(head, [*ids, end], train_on == "all")
            )
    return builder.build()


def tokenize_texts(rows: Rows, tokenizer: Tokenizer, config: TokenizeConfig) -> TokenizedDataset:
    """Texts, of which all tokens are learnt, the one that ends them too.

    Args:
        rows: With a column `tokenize_texts`.
        tokenizer: With an eos token.
        config: Lengths, and what the column is called.

    Raises:
        ValueError: A row holds no string, or the tokenizer has no eos token.
    """
    end = _require_eos_token_id(tokenizer)
    builder = TokenizedDatasetBuilder(config)
    for start, columns in _iter_column_batches(rows, config, ("text",)):
        texts = tokenizer.encode(_get_string_column(columns, "text", start, config))
        for number, ids in enumerate(texts):
            builder.add(
                start + number, TokenSequence([*tokenizer.prefix_ids, *ids, end], bool(ids))
            )
    return builder.build()


def tokenize_preferences(
    rows: Rows, tokenizer: Tokenizer, config: TokenizeConfig
) -> TokenizedDataset:
    """Pairs of a chosen and a rejected answer to one prompt, of which the answers are learnt.

    Args:
        rows: With columns `prompt`, `chosen` and `rejected`: strings, taken as they are; or lists
            of messages for the chat template, where the answers may repeat the prompt.
        tokenizer: With an eos token, or with a chat template.
        config: Lengths, and what the columns are called.

    Raises:
        ValueError: A row holds neither, or an answer is no single message of the assistant.
    """
    _reject_split_truncation(config)
    builder = TokenizedDatasetBuilder(config)
    for start, columns in _iter_column_batches(rows, config, ("prompt", "chosen", "rejected")):
        chats = not isinstance(columns["chosen"][0], str)
        read = _tokenize_chat_answers if chats else _tokenize_text_answers
        chosen, rejected = (
            read(columns, name, start, tokenizer, config) for name in ("chosen", "rejected")
        )
        for number, pair in enumerate(zip(chosen, rejected, strict=True)):
            builder.add(start + number, *pair)
    return builder.build(sequences_per_example=2)


def tokenize_classification(
    rows: Rows,
    tokenizer: Tokenizer,
    config: TokenizeConfig,
    *,
    label_names: Sequence[str] | None = None,
) -> TokenizedDataset:
    """Texts, or pairs of them, and what each is labelled, with all tokens that the model expects.

    Args:
        rows: With columns `tokenize_texts` and `label`, and `text_pair` if there are pairs. Labels are
            strings, or numbers from 0, which those of a .csv file are if all are digits.
        tokenizer: Of the model.
        config: Lengths, and what the columns are called.
        label_names: What the labels are called, in their order. When left out: what the table
            says, or the strings sorted, or the numbers. Give those of the training data
            (`corpus.label_names`) for all other data.

    Raises:
        ValueError: A row holds no string, or a label that is none of the names.
    """
    _reject_split_truncation(config)
    builder = TokenizedDatasetBuilder(config)
    labels = LabelEncoder.from_names(label_names or get_label_names(rows, config), config.data_name)
    found = _read_label_column(rows, config, label_names)
    encoder = _make_truncating_tokenizer(tokenizer, config)
    for start, columns in _iter_column_batches(rows, config, ("text", "label"), ("text_pair",)):
        inputs: list[Any] = _get_string_column(columns, "text", start, config)
        if "text_pair" in columns:
            pairs = _get_string_column(columns, "text_pair", start, config)
            inputs = list(zip(inputs, pairs, strict=True))
        for number, made in enumerate(encoder.encode_batch_fast(inputs)):
            label = labels.encode(found[start + number], start + number)
            part = TokenSequence(made.ids, False, made.type_ids)
            builder.add_labeled(start + number, part, label, truncated=bool(made.overflowing))
    return builder.build(label_names=labels.names)


FORMATS: dict[str, Callable[..., TokenizedDataset]] = {
    "chat": tokenize_chats,
    "completion": tokenize_completions,
    "text": tokenize_texts,
    "preference": tokenize_preferences,
    "classification": tokenize_classification,
}


def _iter_column_batches(
    rows: Rows, config: TokenizeConfig, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """The first row's number and the format's columns, for some rows at a time."""
    there = list(getattr(rows, "column_names", None) or dict.fromkeys(k for r in rows for k in r))
    unknown = sorted(set(config.columns) - {*required, *optional})
    if unknown:
        raise ValueError(
            f"columns of {config.data_name} names {format_names(unknown)}, which the format does not read. "
            f"It reads {format_names([*required, *optional])}."
        )
    names = {name: config.columns.get(name, name) for name in (*required, *optional)}
    wanted = dict.fromkeys((*required, *config.columns))
    missing = {name: names[name] for name in wanted if names[name] not in there}
    if missing:
        other = next((name for name in there if name not in names.values()), "its name there")
        raise ValueError(
            f"{config.data_name} has no column {format_names(list(missing.values()))}. It has "
            f"{format_names(there, 20)}: say which is which with the source's columns, such as "
            f"`columns: {{{next(iter(missing))}: {other}}}`."
        )
    names = {name: column for name, column in names.items() if column in there}
    for start in range(0, len(rows), _TOKENIZE_BATCH_SIZE):
        part: Any = rows[start : start + _TOKENIZE_BATCH_SIZE]
        if isinstance(part, Mapping):
            yield start, {name: list(part[column]) for name, column in names.items()}
        else:
            yield start, {n: [row.get(column) for row in part] for n, column in names.items()}


def _get_string_column(
    columns: dict[str, list[Any]], column_name: str, first_row: int, config: TokenizeConfig
) -> list[str]:
    for number, value in enumerate(columns[column_name]):
        if not isinstance(value, str):
            raise ValueError(
                f"{config.data_name}, row {first_row + number}: {column_name}={value!r} is no string. Mend or "
                f"remove the row."
            )
    return columns[column_name]


def _parse_tools(tools: Any, location: str) -> Any:
    """Schemas of functions, which tables often hold as text: their fields differ too much."""
    if not isinstance(tools, str):
        return tools or None
    try:
        return json.loads(tools) or None
    except ValueError as error:
        raise ValueError(
            f"{location}: tools is no JSON ({error}). Give a list of schemas, or one as JSON."
        ) from error


def _require_chat_template(tokenizer: Tokenizer, config: TokenizeConfig) -> ChatTemplate:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{config.data_name} holds chats, and the tokenizer's folder no chat template. Give one "
            f"(data.chat_template of a recipe), or data of prompts and completions."
        )
    return tokenizer.chat_template


def _require_eos_token_id(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer names no eos token, so a model would not learn where a text ends. Give "
            "tokenizer_config.json an eos_token."
        )
    return tokenizer.eos_token_id


def get_label_names(rows: Rows, config: TokenizeConfig) -> Sequence[str]:
    """What the table says that labels are called, or else the labels that there are."""
    column = config.columns.get("label", "label")
    names = getattr(getattr(rows, "features", {}).get(column), "names", None)
    return (
        infer_label_names(_read_label_column(rows, config), config.data_name)
        if names is None
        else names
    )


def _read_label_column(
    rows: Rows, config: TokenizeConfig, label_names: Sequence[str] | None = None
) -> Sequence[Any]:
    """The labels of all rows, to be looked up among the names if those are known."""
    alone = dataclasses.replace(config, columns={"label": config.columns.get("label", "label")})
    found = [x for _, part in _iter_column_batches(rows, alone, ("label",)) for x in part["label"]]
    untyped = getattr(getattr(rows, "info", None), "builder_name", None) == "csv"
    strings = untyped and all(isinstance(label, str) for label in found)
    return parse_numeric_labels(found, label_names) if strings else found


def _make_truncating_tokenizer(
    tokenizer: Tokenizer, config: TokenizeConfig
) -> tokenizers.Tokenizer:
    """The tokenizer, which cuts the text and leaves the tokens around it if that is asked for."""
    if config.truncation != "truncate":
        return tokenizer.with_special_tokens
    encoder = tokenizers.Tokenizer.from_str(tokenizer.with_special_tokens.to_str())
    encoder.enable_truncation(config.max_seq_length)
    return encoder


def _reject_split_truncation(config: TokenizeConfig) -> None:
    if config.truncation == "split":
        raise ValueError(
            "data.truncation=split makes several examples of one, which only plain texts bear. Use "
            "truncate, drop or error."
        )


def _tokenize_rendered_chats(
    tokenizer: Tokenizer, rendered_chats: Sequence[tuple[str, list[CharSpan]]]
) -> Iterator[TokenSequence]:
    """The tokens of texts, learnt where a character of theirs is in a span."""
    for made, (_, spans) in zip(
        tokenizer.without_special_tokens.encode_batch([text for text, _ in rendered_chats]),
        rendered_chats,
        strict=True,
    ):
        yield TokenSequence(made.ids, tokens_in_spans(np.array(made.offsets).reshape(-1, 2), spans))


def tokens_in_spans(offsets: np.ndarray, spans: Sequence[CharSpan]) -> np.ndarray:
    """Which tokens share a character with a span.

    Args:
        offsets: (tokens, 2), the first character of each and the one after its last.
        spans: From where to where, one after another.
    """
    starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
    # The first span that ends after the token starts is the only one that has to be looked at.
    nearest = np.searchsorted(ends, offsets[:, 0], side="right")
    return np.append(starts, np.iinfo(np.int64).max)[nearest] < offsets[:, 1]


def _join_prompt_and_completion(
    prompt_ids: list[int], completion_ids: list[int], train_on_prompt: bool = False
) -> TokenSequence:
    learn = np.ones(len(prompt_ids) + len(completion_ids), np.bool_)
    learn[: len(prompt_ids)] = train_on_prompt
    return TokenSequence([*prompt_ids, *completion_ids], learn)


def _tokenize_text_answers(
    columns: dict[str, list[Any]],
    column_name: str,
    first_row: int,
    tokenizer: Tokenizer,
    config: TokenizeConfig,
) -> Iterator[TokenSequence]:
    """Prompts with an answer each, tokenised apart."""
    end = _require_eos_token_id(tokenizer)
    prompts = tokenizer.encode(_get_string_column(columns, "prompt", first_row, config))
    answers = tokenizer.encode(_get_string_column(columns, column_name, first_row, config))
    for prompt, answer in zip(prompts, answers, strict=True):
        yield _join_prompt_and_completion([*tokenizer.prefix_ids, *prompt], [*answer, end])


def _tokenize_chat_answers(
    columns: dict[str, list[Any]],
    column_name: str,
    first_row: int,
    tokenizer: Tokenizer,
    config: TokenizeConfig,
) -> Iterator[TokenSequence]:
    """Chats with an answer each, which is the last thing said."""
    template = _require_chat_template(tokenizer, config)
    spoken = []
    for number, (prompt, answer) in enumerate(
        zip(columns["prompt"], columns[column_name], strict=True)
    ):
        where = f"{config.data_name}, row {first_row + number}"
        messages = _join_prompt_and_answer(prompt, answer, column_name, where)
        spoken.append(template.render_with_spans(messages, train_on="last", location=where))
    return _tokenize_rendered_chats(tokenizer, spoken)


def _join_prompt_and_answer(
    prompt: Any, answer: Any, column_name: str, location: str
) -> list[Message]:
    """The messages of a prompt and of one answer, which may repeat them."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    asked = validate_messages(prompt, f"{location}, prompt")
    said = validate_messages(answer, f"{location}, {column_name}")
    if said[: len(asked)] == asked:
        said = said[len(asked) :]
    if [message["role"] for message in said] != ["assistant"]:
        raise ValueError(
            f"{location}: {column_name} has to be one message of the assistant, after the prompt, and is of "
            f"{[message['role'] for message in said]}. Move what comes before it to the prompt."
        )
    return [*asked, *said]
