"""Tokenization of the five data formats: chat, completion, text, preference, classification."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import tokenizers

from jlora.checkpoints.safetensors_io import format_names
from jlora.checkpoints.text_files import name_file_in_errors
from jlora.training.data.chat_template import (
    CharSpan,
    ChatTemplate,
    Message,
    TrainOn,
    abbreviate_repr,
    list_texts,
    validate_messages,
)
from jlora.training.data.readers import find_other_separator
from jlora.training.data.tokenized_dataset import (
    TokenizeConfig,
    TokenizedDataset,
    TokenizedDatasetBuilder,
    TokenSequence,
)
from jlora.training.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import datasets

    Rows = datasets.Dataset | Sequence[Mapping[str, Any]]

# Rows tokenized at a time, over the machine's cores.
_TOKENIZE_BATCH_SIZE = 1000

_SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")

_MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")

# Columns that other libraries put into the prompt.
_PROMPT_COLUMNS = (
    *_SYSTEM_COLUMNS,
    "history",
    "tools",
    "functions",
    "documents",
    "chat_template_kwargs",
    *_MEDIA_COLUMNS,
)

# A higher number is an id in the wrong column, not a label.
MAX_LABELS = 100_000

# Values of a column, or their JSON, that say nothing.
_EMPTY_VALUES = (None, "", [], {}, "[]", "{}", "null")

_NUMBER_PATTERN = re.compile(r"\s*[-+]?[0-9]{1,18}(\.[0-9]*)?\s*")


class LabelEncoder(NamedTuple):
    """Mapping from label names to class ids.

    Attributes:
        names: Label names, in the order of the model's outputs.
        label2id: Class id of each name.
        data_name: Name of the data in errors.
        has_ids: True if the type of the labels says that numbers are class ids.
    """

    names: tuple[str, ...]
    label2id: Mapping[str, int]
    data_name: str
    has_ids: bool = False

    @classmethod
    def from_names(cls, names: Sequence[str], data_name: str) -> LabelEncoder:
        """Returns the encoder of these names.

        Raises:
            ValueError: If there are fewer than two names, or duplicates.
        """
        label2id = {name: number for number, name in enumerate(names)}
        if len(label2id) != len(names) or len(names) < 2:
            raise ValueError(
                f"{data_name}: label_names={list(names)} must be at least two distinct names, in "
                f"the order of the model's outputs."
            )
        return cls(tuple(names), label2id, data_name)

    def encode(self, label: Any, row_index: int) -> int:
        """Returns the class id of a row's label, which is a name, an id, or a boolean for 0 or 1.

        Raises:
            ValueError: If the label is neither, or an id of one class and the name of another.
        """
        if isinstance(label, str) and label in self.label2id:
            return self.label2id[label]
        if isinstance(label, int) and 0 <= label < len(self.names):
            named = {self.label2id.get(text, label) for text in (str(label), str(label).lower())}
            if named != {label} and not self.has_ids:
                raise ValueError(
                    f"{self.data_name}, row {row_index}: label={label!r} is the id of the class "
                    f"{self.names[label]!r}, but also the name of another class in {self.names}. "
                    f"Write labels as strings, or list the names in the order of their numbers."
                )
            return int(label)
        raise ValueError(
            f"{self.data_name}, row {row_index}: label={label!r} must be one of "
            f"{format_names(list(self.names), 20)}, or an int below {len(self.names)}. Correct the "
            f"row, or list all labels in label_names (classification.labels of a recipe)."
        )


def infer_label_names(labels: Sequence[Any], data_name: str) -> list[str]:
    """Returns the sorted label names; for int labels, all numbers up to the highest.

    Those of booleans are "false" and "true".

    Raises:
        ValueError: If the labels are neither all nonempty strings, nor all ints from 0, nor all
            booleans, or two strings differ in blanks alone.
    """
    kind = type(labels[0]) if labels and isinstance(labels[0], str | bool) else int
    for row, label in enumerate(labels):
        if type(label) is not kind or not (
            label if isinstance(label, str) else 0 <= label < MAX_LABELS
        ):
            raise ValueError(
                f"{data_name}, row {row}: label={label!r}, but labels must be all nonempty "
                f"strings, all ints from 0 to {MAX_LABELS - 1}, or all booleans. Correct the row."
            )
    if kind is str:
        first: dict[str, str] = {}
        for row, label in enumerate(labels):
            other = first.setdefault(label.strip(), label)
            if other != label:
                raise ValueError(
                    f"{data_name}, row {row}: label={label!r} differs from the label {other!r} in "
                    f"blanks alone. Write one class in one way; or, if they are two, list both in "
                    f"label_names (classification.labels of a recipe)."
                )
        return sorted(set(labels))
    if kind is bool:
        return ["false", "true"]
    return [str(number) for number in range(max(labels) + 1)]


def parse_numeric_labels(
    labels: Sequence[str], label_names: Sequence[str] | None, data_name: str
) -> Sequence[Any]:
    """Returns the labels of an untyped table: numbers if all are numeric, otherwise strings.

    Strings also remain where `label_names` assigns a numeric name to another class id. Empty labels
    remain, so that a later error names their row.

    Raises:
        ValueError: Two labels are one number, such as 01 and 1, which may be one class or two.
    """
    texts = dict.fromkeys(label for label in labels if label)
    if not all(_NUMBER_PATTERN.fullmatch(label) for label in texts):
        return labels
    numbers = {label: float(label) if "." in label else int(label) for label in texts}
    class_ids = {name: class_id for class_id, name in enumerate(label_names or ())}
    if any(class_ids.get(label, number) != number for label, number in numbers.items()):
        return labels
    first_texts: dict[float, str] = {}
    for row, label in enumerate(labels):
        other = first_texts.setdefault(numbers[label], label) if label else label
        if other.strip() != label.strip():
            raise ValueError(
                f"{data_name}, row {row}: label={label!r} is the same number as the label "
                f"{other!r}. Write one class in one way; or, if they are two, list the names of "
                f"both in label_names (classification.labels of a recipe)."
            )
    return [numbers.get(label, label) for label in labels]


def tokenize_chats(
    rows: Rows, tokenizer: Tokenizer, config: TokenizeConfig, *, train_on: TrainOn = "assistant"
) -> TokenizedDataset:
    """Tokenizes chats, with a loss on the assistant's turns.

    Args:
        rows: Rows with a column `messages`, or several that `columns` joins to it, and optionally
            `tools`, a list or its JSON text, and `system`, the text of a first system message.
        tokenizer: Tokenizer with a chat template, which writes all special tokens.
        config: Lengths and column names.
        train_on: "assistant" for all assistant turns, "last" for the last one, or "all" for the
            complete text.

    Raises:
        ValueError: If a message is invalid, the template does not separate the turns, or a row has
            a value that would change the prompt and is not read: a `history`, `images`, another
            variable of the template, or tools for a template without them.

    Example:
        >>> import tokenizers
        >>> from jlora.training import data
        >>> vocab = {"</s>": 0, "low": 1, "rank": 2, "high": 3}
        >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
        >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> turns = "{% for m in messages %}{{ m.content }} {% endfor %}"
        >>> tokenizer = data.Tokenizer(words, words, (), None, 0, 0, data.ChatTemplate(turns), "")
        >>> config = data.TokenizeConfig(max_seq_length=8)
        >>> chat = [{"role": "user", "content": "low"}, {"role": "assistant", "content": "rank"}]
        >>> dataset = data.tokenize_chats([{"messages": chat}], tokenizer, config)
        >>> dataset.tokens.tolist(), dataset.loss_mask.tolist()
        ([1, 2], [False, True])
    """
    _reject_split_truncation(config)
    template = _require_chat_template(tokenizer, config)
    builder = TokenizedDatasetBuilder(config)
    optional, refused = ("tools", "system"), _list_prompt_columns(template)
    if len(_list_columns(config, "messages")) > 1:  # Prompts and answers, as in KTO.
        refused += ("label",)
    for start, columns in _iter_column_batches(rows, config, ("messages",), optional, refused):
        rendered: list[tuple[str, list[CharSpan]]] = []
        for number, messages in enumerate(columns["messages"]):
            location = f"{config.data_name}, row {start + number}"
            tools = _read_tools(columns, number, template, location)
            if "system" in columns and columns["system"][number]:
                messages = _add_system_message(columns["system"][number], messages, location)
            rendered.append(
                template.render_with_spans(
                    messages, tools=tools, train_on=train_on, location=location
                )
            )
        for number, sequence in enumerate(_tokenize_rendered_chats(tokenizer, rendered)):
            builder.add(start + number, sequence)
    return builder.build(is_chat=True)


def tokenize_completions(
    rows: Rows,
    tokenizer: Tokenizer,
    config: TokenizeConfig,
    *,
    train_on: Literal["completion", "all"] = "completion",
) -> TokenizedDataset:
    """Tokenizes prompts and completions, with a loss on the completion and its eos token.

    Prompt and completion are tokenized separately, so that no token spans both. Special tokens that
    the texts have already, as those that were rendered before, are not added again.

    Args:
        rows: Rows with columns `prompt` and `completion`.
        tokenizer: Tokenizer with an eos token.
        config: Lengths and column names.
        train_on: "completion", or "all" to train on the prompt as well.

    Raises:
        ValueError: If a cell is not a string, the tokenizer has no eos token, or a row has a
            value that would change the prompt and is not read, such as `system` or `history`, or
            a `label` of false, as answers that are not to be learned.

    Example:
        >>> import tokenizers
        >>> from jlora.training import data
        >>> vocab = {"</s>": 0, "low": 1, "rank": 2, "high": 3}
        >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
        >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> tokenizer = data.Tokenizer(words, words, (), None, 0, 0, None, "")
        >>> config = data.TokenizeConfig(max_seq_length=8)
        >>> rows = [{"prompt": "low", "completion": "rank"}]
        >>> dataset = data.tokenize_completions(rows, tokenizer, config)
        >>> dataset.tokens.tolist(), dataset.loss_mask.tolist()
        ([1, 2, 0], [False, True, True])
    """
    if train_on not in ("completion", "all"):
        raise ValueError(f"train_on={train_on!r} must be completion or all.")
    _reject_split_truncation(config)
    builder = TokenizedDatasetBuilder(config)
    required = ("prompt", "completion")
    refused = (*_PROMPT_COLUMNS, "label")
    for start, columns in _iter_column_batches(rows, config, required, (), refused):
        cells = [cell for name in required for cell in columns[name]]
        if any(isinstance(cell, Sequence) and not isinstance(cell, str) for cell in cells):
            joined = [c for name in required for c in _list_columns(config, name)]
            raise ValueError(
                f"{config.data_name}: the completions are messages, not strings. Use format: chat, "
                f"`columns: {{messages: [{format_names(joined)}]}}` and data.train_on=last, with "
                f"messages in all of these columns."
            )
        texts = _tokenize_answers(columns, "completion", start, tokenizer, config)
        for number, (prompt, completion) in enumerate(texts):
            builder.add(
                start + number,
                _join_prompt_and_completion(prompt, completion, train_on == "all"),
            )
    return builder.build()


def tokenize_texts(rows: Rows, tokenizer: Tokenizer, config: TokenizeConfig) -> TokenizedDataset:
    """Tokenizes plain texts, with a loss on all tokens and the eos token.

    Special tokens that a text has already are not added again.

    Args:
        rows: Rows with a column `text`.
        tokenizer: Tokenizer with an eos token.
        config: Lengths and column names.

    Raises:
        ValueError: If a cell is not a string, or the tokenizer has no eos token.

    Example:
        >>> import tokenizers
        >>> from jlora.training import data
        >>> vocab = {"</s>": 0, "low": 1, "rank": 2, "high": 3}
        >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
        >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> tokenizer = data.Tokenizer(words, words, (), None, 0, 0, None, "")
        >>> config = data.TokenizeConfig(max_seq_length=8)
        >>> dataset = data.tokenize_texts([{"text": "low rank"}], tokenizer, config)
        >>> dataset.tokens.tolist(), dataset.loss_mask.tolist()
        ([1, 2, 0], [False, True, True])
    """
    builder = TokenizedDatasetBuilder(config)
    for start, columns in _iter_column_batches(rows, config, ("text",)):
        texts = tokenizer.encode(_get_string_column(columns, "text", start, config))
        for number, ids in enumerate(texts):
            sequence = tokenizer.add_eos(tokenizer.add_prefix(ids))
            builder.add(start + number, TokenSequence(sequence, bool(ids)))
    return builder.build()


def tokenize_preferences(
    rows: Rows, tokenizer: Tokenizer, config: TokenizeConfig
) -> TokenizedDataset:
    """Tokenizes pairs of a chosen and a rejected answer to one prompt, with a loss on the answers.

    Args:
        rows: Rows with columns `prompt`, `chosen` and `rejected`: strings, used unchanged; or
            lists of messages for the chat template, where the answers may repeat the prompt, and
            then optionally `tools`, as for chats.
        tokenizer: Tokenizer with an eos token for strings, with a chat template for messages.
        config: Lengths and column names.

    Raises:
        ValueError: If a cell is neither, an answer is not a single assistant message, or a row has
            a value that would change the prompt and is not read, such as `system` or `history`.

    Example:
        >>> import tokenizers
        >>> from jlora.training import data
        >>> vocab = {"</s>": 0, "low": 1, "rank": 2, "high": 3}
        >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
        >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> tokenizer = data.Tokenizer(words, words, (), None, 0, 0, None, "")
        >>> config = data.TokenizeConfig(max_seq_length=8)
        >>> rows = [{"prompt": "rank", "chosen": "low", "rejected": "high"}]
        >>> dataset = data.tokenize_preferences(rows, tokenizer, config)
        >>> dataset.tokens.tolist(), dataset.sequences_per_example
        ([2, 1, 0, 2, 3, 0], 2)
    """
    _reject_split_truncation(config)
    builder = TokenizedDatasetBuilder(config)
    required = ("prompt", "chosen", "rejected")
    is_chat = _has_messages(rows, config)
    template = _require_chat_template(tokenizer, config) if is_chat else None
    optional, refused = (("tools",) if is_chat else ()), _list_prompt_columns(template)
    for start, columns in _iter_column_batches(rows, config, required, optional, refused):
        tokenize = _tokenize_chat_answers if is_chat else _tokenize_text_answers
        chosen, rejected = (
            tokenize(columns, name, start, tokenizer, config) for name in ("chosen", "rejected")
        )
        for number, pair in enumerate(zip(chosen, rejected, strict=True)):
            builder.add(start + number, *pair)
    return builder.build(sequences_per_example=2, is_chat=is_chat)


def tokenize_classification(
    rows: Rows,
    tokenizer: Tokenizer,
    config: TokenizeConfig,
    *,
    label_names: Sequence[str] | None = None,
) -> TokenizedDataset:
    """Tokenizes labeled texts or pairs of texts, with the special tokens of the model.

    Args:
        rows: Rows with columns `text` and `label`, and `text_pair` for pairs. Labels are strings,
            ints from 0, or booleans; numeric labels of a .csv file count as ints.
        tokenizer: Tokenizer of the model.
        config: Lengths and column names.
        label_names: Label names in the order of the class ids; None: those of the table's
            features, or the sorted strings, or the numbers. Give those of the training data
            (`dataset.label_names`) for validation and test data.

    Raises:
        ValueError: If a text is not a string, or a label is not one of the names.

    Example:
        >>> import tokenizers
        >>> from jlora.training import data
        >>> vocab = {"</s>": 0, "low": 1, "rank": 2, "high": 3}
        >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
        >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> tokenizer = data.Tokenizer(words, words, (), None, 0, 0, None, "")
        >>> config = data.TokenizeConfig(max_seq_length=8)
        >>> rows = [{"text": "low", "label": "no"}, {"text": "high", "label": "yes"}]
        >>> dataset = data.tokenize_classification(rows, tokenizer, config)
        >>> dataset.labels.tolist(), dataset.label_names
        ([0, 1], ('no', 'yes'))
    """
    _reject_split_truncation(config)
    builder = TokenizedDatasetBuilder(config)
    labels = LabelEncoder.from_names(label_names or get_label_names(rows, config), config.data_name)
    labels = labels._replace(has_ids=_get_feature_names(rows, config) is not None)
    label_column = _read_label_column(rows, config, label_names)
    encoder = _make_truncating_tokenizer(tokenizer, config)
    for start, columns in _iter_column_batches(rows, config, ("text", "label"), ("text_pair",)):
        inputs: list[Any] = _get_string_column(columns, "text", start, config)
        if "text_pair" in columns:
            pairs = _get_string_column(columns, "text_pair", start, config)
            inputs = list(zip(inputs, pairs, strict=True))
        with name_file_in_errors(tokenizer.source):
            encodings = encoder.encode_batch(inputs)
        for number, encoding in enumerate(encodings):
            label = labels.encode(label_column[start + number], start + number)
            added = _find_doubled_tokens(encoding)
            ids, types = (np.delete(x, added) for x in (encoding.ids, encoding.type_ids))
            sequence = TokenSequence(ids, False, types.tolist())
            builder.add_labeled(
                start + number, sequence, label, truncated=bool(encoding.overflowing)
            )
    return builder.build(label_names=labels.names)


FORMATS: dict[str, Callable[..., TokenizedDataset]] = {
    "chat": tokenize_chats,
    "completion": tokenize_completions,
    "text": tokenize_texts,
    "preference": tokenize_preferences,
    "classification": tokenize_classification,
}


_REQUIRED_COLUMNS = {
    "chat": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
}


def _iter_column_batches(
    rows: Rows,
    config: TokenizeConfig,
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
    refused: tuple[str, ...] = (),
) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Yields the number of the first row and the format's columns, for some rows at a time.

    Raises:
        ValueError: A column is missing, or a refused one, which `columns` does not map, has values.
    """
    present = list(getattr(rows, "column_names", None) or dict.fromkeys(k for r in rows for k in r))
    unknown = sorted(set(config.columns) - {*required, *optional})
    if unknown:
        raise ValueError(
            f"columns of {config.data_name} contains {format_names(unknown)}, which the format "
            f"does not have. Expected names of {format_names([*required, *optional])}."
        )
    names = {name: _list_columns(config, name) for name in (*required, *optional)}
    expected = dict.fromkeys((*required, *config.columns))
    missing = {
        name: [column for column in names[name] if column not in present] for name in expected
    }
    missing = {name: columns for name, columns in missing.items() if columns}
    if missing:
        absent = [column for columns in missing.values() for column in columns]
        raise ValueError(
            f"{config.data_name} has no column {format_names(absent)}, only "
            f"{format_names(present, 20)}. {_advise_columns(next(iter(missing)), names, present)}"
        )
    names = {name: columns for name, columns in names.items() if set(columns) <= set(present)}
    used = {column for columns in names.values() for column in columns}
    refused = tuple(column for column in refused if column in present and column not in used)
    nested = {column for column in (*used, *refused) if _has_struct_type(rows, column)}
    for start in range(0, len(rows), _TOKENIZE_BATCH_SIZE):
        part: Any = rows[start : start + _TOKENIZE_BATCH_SIZE]

        def read(column: str, part: Any = part) -> list[Any]:
            if isinstance(part, Mapping):
                values = list(part[column])
            else:
                values = [row.get(column) for row in part]
            return [_drop_filled_nulls(v) for v in values] if column in nested else values

        for column in refused:
            _reject_values(column, read(column), start, names, config)
        yield (
            start,
            {
                name: read(columns[0])
                if len(columns) == 1
                else (_join_messages if name == "messages" else _join_columns)(
                    {column: read(column) for column in columns}, start, config
                )
                for name, columns in names.items()
            },
        )


def _has_messages(rows: Rows, config: TokenizeConfig) -> bool:
    """Returns whether the answers of preferences are messages, by the first that is not null."""
    column = _list_columns(config, "chosen")[0]
    table: Any = rows
    answers = (row.get(column) for row in table)
    return not isinstance(next((each for each in answers if each is not None), ""), str)


def _list_prompt_columns(template: ChatTemplate | None) -> tuple[str, ...]:
    """Returns the columns that would change a prompt: those of other libraries, and variables."""
    variables = set() if template is None else template.input_variables
    return (*_PROMPT_COLUMNS, *sorted(variables - {"messages", *_PROMPT_COLUMNS}))


def _reject_values(
    column: str,
    values: Sequence[Any],
    first_row: int,
    names: Mapping[str, list[str]],
    config: TokenizeConfig,
) -> None:
    """Raises if a column that belongs to the prompt, but would be ignored, is not empty."""

    def is_lost(value: Any) -> bool:
        if column == "label":
            return str(value).lower() == "false"
        is_plain = value is None or isinstance(value, str | list | dict)
        return not (is_plain and value in _EMPTY_VALUES)

    row = next((i for i, value in enumerate(values) if is_lost(value)), None)
    if row is None:
        return
    if column == "label":
        raise ValueError(
            f"{config.data_name}, row {first_row + row}: label={values[row]!r} marks an answer "
            f"that is not to be learned (KTO), but this format learns all answers. Remove such "
            f"rows, or pair them with good answers (format: preference)."
        )
    if column in _SYSTEM_COLUMNS:
        if "prompt" in names:
            prompt = format_names([column, *names["prompt"]])
            mend = (
                f"Join texts by `columns: {{prompt: [{prompt}]}}`; of messages, write it as the "
                f"first of the prompt"
            )
        else:
            mend = f"Map it by `columns: {{system: {column}}}`"
    elif column == "history":
        mend = "Write its turns into the prompt, or as messages before the others (format: chat)"
    elif column in ("tools", "functions"):
        mend = (
            "Write it into the prompt, or, of messages, as the column tools with entries such as "
            '{"type": "function", "function": {...}}'
        )
    elif column == "documents":
        mend = "Write their text into the prompt or a message"
    elif column in _MEDIA_COLUMNS:
        mend = "A language model does not read it: use rows without it"
    else:
        mend = (
            "Set such variables for all rows, by `{% set NAME = ... %}` in a template "
            "(data.chat_template) or by ChatTemplate.variables"
        )
    raise ValueError(
        f"{config.data_name}, row {first_row + row}: the column {column} would change the prompt, "
        f"but this format does not read it. {mend}, or remove the column."
    )


def _add_system_message(text: Any, messages: Any, location: str) -> list[Message]:
    """Returns the messages after a system message, which they may begin with already."""
    if not isinstance(text, str):
        raise ValueError(f"{location}: system={text!r} must be a string. Correct the row.")
    messages = validate_messages(messages, location)
    if messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": text}, *messages]
    if "".join(list_texts(messages[0]["content"])) != text:
        raise ValueError(
            f"{location} has the column system and a first message of the {messages[0]['role']} "
            f"with another text. Keep one of them."
        )
    return messages


def _join_texts(message: Message) -> Message:
    """Returns a message whose content is one text."""
    return {**message, "content": "".join(list_texts(message.get("content")))}


def _list_columns(config: TokenizeConfig, name: str) -> list[str]:
    """Returns the columns of the data behind a name of the format."""
    columns = config.columns.get(name, name)
    return [columns] if isinstance(columns, str) else list(columns)


def _join_columns(
    columns: dict[str, list[Any]], first_row: int, config: TokenizeConfig
) -> list[str]:
    """Returns the texts of several columns, joined by a blank line."""
    for name, values in columns.items():
        for number, value in enumerate(values):
            if value is not None and not isinstance(value, str):
                raise ValueError(
                    f"{config.data_name}, row {first_row + number}: {name}="
                    f"{abbreviate_repr(value)} must be a string to be joined with other columns. "
                    f"Correct or remove the row; a text before messages is their first message, of "
                    f"the role system."
                )
    return ["\n\n".join(filter(None, texts)) for texts in zip(*columns.values(), strict=True)]


def _join_messages(
    columns: dict[str, list[Any]], first_row: int, config: TokenizeConfig
) -> list[list[Message]]:
    """Returns the messages of several columns, such as a prompt and its completion, as chats."""
    joined: list[list[Message]] = [[] for _ in next(iter(columns.values()))]
    for name, values in columns.items():
        for number, messages in enumerate(values):
            location = f"{config.data_name}, row {first_row + number}, {name}"
            joined[number] += validate_messages(messages, location)
    return joined


# Columns that data of questions and answers often has; the first in the order of a prompt.
_QUESTION_COLUMNS = ("instruction", "context", "question", "query", "problem", "prompt", "input")

_ANSWER_COLUMNS = ("response", "answer", "output", "completion", "solution")

_CHAT_COLUMNS = ("conversations", "conversation", "dialogue", "dialog", "chat", "turns")

# Columns of pairs of texts in data with labels.
_PAIR_COLUMNS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_A", "sentence_B"),
    ("question", "sentence"),
    ("question", "context"),
    ("query", "passage"),
)


def _advise_columns(missing: str, names: Mapping[str, list[str]], present: list[str]) -> str:
    """Returns advice for data that lacks a column of the format.

    Columns that belong to the prompt are all in it.
    """
    separator = find_other_separator(present)
    if separator is not None:
        return (
            f"The names seem to be separated by {separator!r}: save the file as CSV with commas, "
            f"and with quotes around texts that contain commas."
        )
    asked = [name for name in (*_SYSTEM_COLUMNS, *_QUESTION_COLUMNS) if name in present]
    answers = [name for name in _ANSWER_COLUMNS if name in present]
    prompt = {"prompt": asked}
    if "chosen" in names and "chosen" not in present and "rejected" not in present:
        if answers and "label" in present:
            return (
                "These are single answers with a label (KTO), not pairs: write two answers to one "
                "prompt into the columns chosen and rejected. Or learn the good ones alone: remove "
                "the rows whose label is false, and use format: completion."
            )
    elif missing == "prompt" and "chosen" in names:
        if asked:
            return f"Map the names with the source's columns: use {_format_columns(prompt)}."
        return (
            "Here the answers contain their prompt: write it into a column prompt, as the messages "
            "that both begin with, or, of strings, the text up to the answer, and cut it off both."
        )
    if (
        missing in ("messages", "prompt", "completion")
        and answers
        and set(asked) & {*_QUESTION_COLUMNS}
    ):
        kind = "the columns of Alpaca" if {"instruction", "output"} <= set(present) else ""
        columns = _format_columns({**prompt, "completion": answers[:1]})
        use = [] if "completion" in names and columns and not kind else ["format: completion"]
        if kind or columns:
            kind = kind or "questions and answers"
            return f"These are {kind}: use {' and '.join([*use, *filter(None, [columns])])}."
    chats = [name for name in _CHAT_COLUMNS if name in present]
    if missing == "messages" and chats:
        system = [name for name in _SYSTEM_COLUMNS if name in present]
        columns = _format_columns({"messages": chats[:1], "system": system[:1]})
        return f"Map the names with the source's columns: {columns}."
    pair = next((pair for pair in _PAIR_COLUMNS if set(pair) <= set(present)), None)
    if missing == "text" and "label" in names and pair:
        columns = _format_columns({"text": pair[:1], "text_pair": pair[1:]})
        return f"These are pairs of texts: use {columns}."
    for name, required in _REQUIRED_COLUMNS.items():
        if missing not in required and set(required) <= set(present):
            return f"Use format: {name}."
    used = {column for columns in names.values() for column in columns}
    other = next((column for column in present if column not in used), "NAME")
    return f"Map the names with the source's columns, such as `columns: {{{missing}: {other}}}`."


def _format_columns(columns: Mapping[str, Sequence[str]]) -> str:
    """Returns `columns` as a recipe writes it; empty if every name is that of the format."""
    fields = [
        f"{name}: {found[0] if len(found) == 1 else f'[{format_names(list(found), 20)}]'}"
        for name, found in columns.items()
        if found and list(found) != [name]
    ]
    return f"`columns: {{{', '.join(fields)}}}`" if fields else ""


def _has_struct_type(rows: Rows, column: str) -> bool:
    """Returns whether a column of a table has a type of nested fields, rather than JSON."""
    schema = getattr(getattr(rows, "data", None), "schema", None)
    return schema is not None and pa.types.is_nested(schema.field(column).type)


def _drop_filled_nulls(value: Any, keep: tuple[str, ...] = ("content",)) -> Any:
    """Returns a value of nested fields without nulls.

    Such a type has one set of fields, and null where a value lacks one, as every call of a tool
    lacks the arguments of the others. Nulls of the data look the same, so that only
    the content of a message is kept; JSON keeps all of them.
    """
    if isinstance(value, Mapping):
        items = value.items()
        return {k: _drop_filled_nulls(v, ()) for k, v in items if v is not None or k in keep}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_drop_filled_nulls(item, keep) for item in value]
    return value


def _get_string_column(
    columns: dict[str, list[Any]], column_name: str, first_row: int, config: TokenizeConfig
) -> list[str]:
    for number, value in enumerate(columns[column_name]):
        if not isinstance(value, str):
            is_list = isinstance(value, Sequence)
            mend = "Use strings in all columns, or messages in all" if is_list else "Correct"
            raise ValueError(
                f"{config.data_name}, row {first_row + number}: {column_name}="
                f"{abbreviate_repr(value)} must be a string. {mend}, or remove the row."
            )
    return columns[column_name]


def _read_tools(
    columns: Mapping[str, list[Any]], row: int, template: ChatTemplate, location: str
) -> Any:
    """Returns a row's tool schemas, which tables often store as JSON text, as their fields differ.

    The list is JSON, or each of its schemas.

    Raises:
        ValueError: They are not a list of schemas, or the template does not read tools.
    """
    tools = columns["tools"][row] if "tools" in columns else None
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        if isinstance(tools, Sequence):
            tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{location}: tools is not valid JSON ({error}). Use a list of schemas, or its JSON."
        ) from error
    is_list = isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)
    if tools and not is_list:
        raise ValueError(
            f"{location}: tools={abbreviate_repr(tools)} must be a list of schemas such as "
            f'{{"type": "function", "function": {{...}}}}, or its JSON.'
        )
    if tools and "tools" not in template.undeclared_variables:
        raise ValueError(
            f"{location} has tools, but {template.source} does not read them, so that the prompt "
            f"would lack them. Use a template that writes tools (data.chat_template), write them "
            f"into a system message, or remove the column."
        )
    return tools or None


def _require_chat_template(tokenizer: Tokenizer, config: TokenizeConfig) -> ChatTemplate:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{config.data_name} contains chats, but the tokenizer's folder has no chat template. "
            f"Give one (data.chat_template of a recipe), or use prompts and completions."
        )
    return tokenizer.chat_template


def get_label_names(rows: Rows, config: TokenizeConfig) -> Sequence[str]:
    """Returns the label names of the table's features, or else those of its labels."""
    names = _get_feature_names(rows, config)
    return (
        infer_label_names(_read_label_column(rows, config), config.data_name)
        if names is None
        else names
    )


def _get_feature_names(rows: Rows, config: TokenizeConfig) -> Sequence[str] | None:
    """Returns the label names of the table's features, or None."""
    column = _list_columns(config, "label")[0]
    return getattr(getattr(rows, "features", {}).get(column), "names", None)


def _read_label_column(
    rows: Rows, config: TokenizeConfig, label_names: Sequence[str] | None = None
) -> Sequence[Any]:
    """Returns the labels of all rows; those of an untyped table as numbers if all are numeric."""
    config = dataclasses.replace(config, columns={"label": config.columns.get("label", "label")})
    batches = _iter_column_batches(rows, config, ("label",))
    labels = [label for _, columns in batches for label in columns["label"]]
    untyped = getattr(getattr(rows, "info", None), "builder_name", None) == "csv"
    strings = untyped and all(isinstance(label, str) for label in labels)
    return parse_numeric_labels(labels, label_names, config.data_name) if strings else labels


def _find_doubled_tokens(encoding: tokenizers.Encoding) -> list[int]:
    """Returns the places of special tokens that were added beside an equal one of the text."""
    ids, texts = encoding.ids, encoding.sequence_ids
    places = [place for place, text in enumerate(texts) if text is not None]
    if not places:
        return []
    first, last = places[0], places[-1]
    # The prefix and suffix are those of the whole text, or of both texts of a pair.
    before, after = ids[:first], ids[last + 1 :]
    doubled = []
    if before and ids[first : first + len(before)] == before:
        doubled += range(first)
    if after and ids[last + 1 - len(after) : last + 1] == after and last >= first:
        doubled += range(last + 1, len(ids))
    return doubled


def _make_truncating_tokenizer(
    tokenizer: Tokenizer, config: TokenizeConfig
) -> tokenizers.Tokenizer:
    """Returns the tokenizer, which truncates texts, not special tokens, if the config asks it."""
    if config.truncation != "truncate":
        return tokenizer.with_special_tokens
    encoder = tokenizers.Tokenizer.from_str(tokenizer.with_special_tokens.to_str())
    encoder.enable_truncation(config.max_seq_length)
    return encoder


def _reject_split_truncation(config: TokenizeConfig) -> None:
    if config.truncation == "split":
        raise ValueError(
            "data.truncation=split makes several examples of a row, which is possible only for "
            "plain text. Use truncate, drop or error."
        )


def _tokenize_rendered_chats(
    tokenizer: Tokenizer, rendered_chats: Sequence[tuple[str, list[CharSpan]]]
) -> Iterator[TokenSequence]:
    """Yields the tokens of texts, with a loss on those that overlap a span."""
    texts = [text for text, _ in rendered_chats]
    with name_file_in_errors(tokenizer.source):
        encodings = tokenizer.without_special_tokens.encode_batch(texts)
    for encoding, (_, spans) in zip(encodings, rendered_chats, strict=True):
        offsets = np.array(encoding.offsets).reshape(-1, 2)
        yield TokenSequence(encoding.ids, tokens_in_spans(offsets, spans))


def tokens_in_spans(offsets: np.ndarray, spans: Sequence[CharSpan]) -> np.ndarray:
    """Returns a mask of the tokens that share a character with a span.

    Args:
        offsets: (tokens, 2), first character of each token and the one after its last.
        spans: Spans in increasing order, without overlap.
    """
    starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
    # Only the first span that ends after the token's start can overlap it.
    nearest = np.searchsorted(ends, offsets[:, 0], side="right")
    return np.append(starts, np.iinfo(np.int64).max)[nearest] < offsets[:, 1]


def _join_prompt_and_completion(
    prompt_ids: list[int], completion_ids: list[int], train_on_prompt: bool = False
) -> TokenSequence:
    loss_mask = np.ones(len(prompt_ids) + len(completion_ids), np.bool_)
    loss_mask[: len(prompt_ids)] = train_on_prompt
    return TokenSequence([*prompt_ids, *completion_ids], loss_mask)


def _tokenize_text_answers(
    columns: dict[str, list[Any]],
    column_name: str,
    first_row: int,
    tokenizer: Tokenizer,
    config: TokenizeConfig,
) -> Iterator[TokenSequence]:
    """Yields prompts with an answer each, tokenized separately."""
    for prompt, answer in _tokenize_answers(columns, column_name, first_row, tokenizer, config):
        yield _join_prompt_and_completion(prompt, answer)


def _tokenize_answers(
    columns: dict[str, list[Any]],
    column_name: str,
    first_row: int,
    tokenizer: Tokenizer,
    config: TokenizeConfig,
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the tokens of prompts and of their answers, with the special tokens around both."""
    prompts = _get_string_column(columns, "prompt", first_row, config)
    answers = _get_string_column(columns, column_name, first_row, config)
    continued = tokenizer.encode_continuations(answers)
    alone = tokenizer.encode([answer for p, answer in zip(prompts, answers, strict=True) if not p])
    remaining = iter(alone)  # Of answers that begin a text.
    encoded = tokenizer.encode(prompts)
    for text, prompt, ids in zip(prompts, encoded, continued, strict=True):
        answer = ids if text else next(remaining)
        yield tokenizer.add_prefix(prompt), tokenizer.add_eos(answer)


def _tokenize_chat_answers(
    columns: dict[str, list[Any]],
    column_name: str,
    first_row: int,
    tokenizer: Tokenizer,
    config: TokenizeConfig,
) -> Iterator[TokenSequence]:
    """Returns chats with an answer each as the last message."""
    template = _require_chat_template(tokenizer, config)
    rendered = []
    for number, (prompt, answer) in enumerate(
        zip(columns["prompt"], columns[column_name], strict=True)
    ):
        location = f"{config.data_name}, row {first_row + number}"
        messages = _join_prompt_and_answer(prompt, answer, column_name, location)
        tools = _read_tools(columns, number, template, location)
        rendered.append(
            template.render_with_spans(messages, tools=tools, train_on="last", location=location)
        )
    return _tokenize_rendered_chats(tokenizer, rendered)


def _join_prompt_and_answer(
    prompt: Any, answer: Any, column_name: str, location: str
) -> list[Message]:
    """Returns the messages of a prompt and of one answer, which may repeat the prompt."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = validate_messages(prompt, f"{location}, prompt")
    answer = validate_messages(answer, f"{location}, {column_name}")
    if [_join_texts(message) for message in answer[: len(prompt)]] == [
        _join_texts(message) for message in prompt
    ]:
        answer = answer[len(prompt) :]
    roles = [message["role"] for message in answer]
    if roles != ["assistant"]:
        raise ValueError(
            f"{location}: {column_name} must be one assistant message after the prompt, got roles "
            f"{roles}. Move earlier messages to the prompt."
        )
    return [*prompt, *answer]
