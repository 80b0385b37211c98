"""Rows of five formats as tokenised examples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tokenizers

from jlora.checkpoints.tensors import listed
from jlora.training.data.corpus import Builder, Corpus, Part, Reading
from jlora.training.data.labels import Labels, collected, numbered
from jlora.training.data.messages import Message, checked
from jlora.training.data.template import ChatTemplate, LossOn, Span
from jlora.training.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import datasets

    Rows = datasets.Dataset | Sequence[Mapping[str, Any]]

# Rows are tokenised so many at a time, over the machine's cores.
_AT_ONCE = 1000


def chat(
    rows: Rows, tokenizer: Tokenizer, reading: Reading, *, loss_on: LossOn = "responses"
) -> Corpus:
    """Chats, of which is learnt what the assistant says.

    Args:
        rows: With a column `messages`, and `tools` if there are any: a list, or one as JSON.
        tokenizer: With a chat template, which writes all special tokens.
        reading: Lengths, and what the columns are called.
        loss_on: "responses", the "last" one alone, or "all" that the template writes.

    Raises:
        ValueError: A message is wrong, or the template cannot tell who says what.
    """
    _refuse_split(reading)
    template = _template(tokenizer, reading)
    builder = Builder(reading)
    for start, columns in _columns(rows, reading, ("messages",), ("tools",)):
        spoken: list[tuple[str, list[Span]]] = []
        for number, messages in enumerate(columns["messages"]):
            where = f"{reading.where}, row {start + number}"
            tools = _tools(columns["tools"][number], where) if "tools" in columns else None
            spans = template.spans(messages, tools=tools, loss_on=loss_on, where=where)
            spoken.append(spans)
        for number, part in enumerate(_spoken(tokenizer, spoken)):
            builder.add(start + number, part)
    return builder.build()


def completion(
    rows: Rows,
    tokenizer: Tokenizer,
    reading: Reading,
    *,
    loss_on: Literal["completion", "all"] = "completion",
) -> Corpus:
    """Prompts and what follows them, which is learnt with the end of the text.

    Prompt and completion are tokenised apart, so that no token lies in both.

    Args:
        rows: With columns `prompt` and `completion`.
        tokenizer: With an eos token.
        reading: Lengths, and what the columns are called.
        loss_on: "completion", or "all" to learn the prompt as well.

    Raises:
        ValueError: A row holds no string, or the tokenizer has no eos token.
    """
    if loss_on not in ("completion", "all"):
        raise ValueError(f"loss_on={loss_on!r} is neither completion nor all. Choose one.")
    _refuse_split(reading)
    end = _eos(tokenizer)
    builder = Builder(reading)
    for start, columns in _columns(rows, reading, ("prompt", "completion")):
        prompts, completions = (
            tokenizer.encode(_strings(columns, name, start, reading))
            for name in ("prompt", "completion")
        )
        for number, (prompt, ids) in enumerate(zip(prompts, completions, strict=True)):
            head = [*tokenizer.before, *prompt]
            builder.add(start + number, _joined(head, [*ids, end], loss_on == "all"))
    return builder.build()


def text(rows: Rows, tokenizer: Tokenizer, reading: Reading) -> Corpus:
    """Texts, of which all tokens are learnt, the one that ends them too.

    Args:
        rows: With a column `text`.
        tokenizer: With an eos token.
        reading: Lengths, and what the column is called.

    Raises:
        ValueError: A row holds no string, or the tokenizer has no eos token.
    """
    end = _eos(tokenizer)
    builder = Builder(reading)
    for start, columns in _columns(rows, reading, ("text",)):
        texts = tokenizer.encode(_strings(columns, "text", start, reading))
        for number, ids in enumerate(texts):
            builder.add(start + number, Part([*tokenizer.before, *ids, end], bool(ids)))
    return builder.build()


def preference(rows: Rows, tokenizer: Tokenizer, reading: Reading) -> Corpus:
    """Pairs of a chosen and a rejected answer to one prompt, of which the answers are learnt.

    Args:
        rows: With columns `prompt`, `chosen` and `rejected`: strings, taken as they are; or lists
            of messages for the chat template, where the answers may repeat the prompt.
        tokenizer: With an eos token, or with a chat template.
        reading: Lengths, and what the columns are called.

    Raises:
        ValueError: A row holds neither, or an answer is no single message of the assistant.
    """
    _refuse_split(reading)
    builder = Builder(reading)
    for start, columns in _columns(rows, reading, ("prompt", "chosen", "rejected")):
        chats = not isinstance(columns["chosen"][0], str)
        read = _answered_chats if chats else _answered_texts
        chosen, rejected = (
            read(columns, name, start, tokenizer, reading) for name in ("chosen", "rejected")
        )
        for number, pair in enumerate(zip(chosen, rejected, strict=True)):
            builder.add(start + number, *pair)
    return builder.build(sequences=2)


def classification(
    rows: Rows,
    tokenizer: Tokenizer,
    reading: Reading,
    *,
    label_names: Sequence[str] | None = None,
) -> Corpus:
    """Texts, or pairs of them, and what each is labelled, with all tokens that the model expects.

    Args:
        rows: With columns `text` and `label`, and `text_pair` if there are pairs. Labels are
            strings, or numbers from 0, which those of a .csv file are if all are digits.
        tokenizer: Of the model.
        reading: Lengths, and what the columns are called.
        label_names: What the labels are called, in their order. When left out: what the table
            says, or the strings sorted, or the numbers. Give those of the training data
            (`corpus.label_names`) for all other data.

    Raises:
        ValueError: A row holds no string, or a label that is none of the names.
    """
    _refuse_split(reading)
    builder = Builder(reading)
    labels = Labels.of(label_names or names_of_labels(rows, reading), reading.where)
    found = _labels(rows, reading, label_names)
    encoder = _cutting(tokenizer, reading)
    for start, columns in _columns(rows, reading, ("text", "label"), ("text_pair",)):
        inputs: list[Any] = _strings(columns, "text", start, reading)
        if "text_pair" in columns:
            pairs = _strings(columns, "text_pair", start, reading)
            inputs = list(zip(inputs, pairs, strict=True))
        for number, made in enumerate(encoder.encode_batch_fast(inputs)):
            label = labels.number(found[start + number], start + number)
            part = Part(made.ids, False, made.type_ids)
            builder.add_labelled(start + number, part, label, truncated=bool(made.overflowing))
    return builder.build(label_names=labels.names)


FORMATS: dict[str, Callable[..., Corpus]] = {
    "chat": chat,
    "completion": completion,
    "text": text,
    "preference": preference,
    "classification": classification,
}


def _columns(
    rows: Rows, reading: Reading, needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """The first row's number and the format's columns, for some rows at a time."""
    there = list(getattr(rows, "column_names", None) or dict.fromkeys(k for r in rows for k in r))
    unknown = sorted(set(reading.columns) - {*needed, *optional})
    if unknown:
        raise ValueError(
            f"columns of {reading.where} names {listed(unknown)}, which the format does not read. "
            f"It reads {listed([*needed, *optional])}."
        )
    names = {name: reading.columns.get(name, name) for name in (*needed, *optional)}
    wanted = dict.fromkeys((*needed, *reading.columns))
    missing = {name: names[name] for name in wanted if names[name] not in there}
    if missing:
        other = next((name for name in there if name not in names.values()), "its name there")
        raise ValueError(
            f"{reading.where} has no column {listed(list(missing.values()))}. It has "
            f"{listed(there, 20)}: say which is which with the source's columns, such as "
            f"`columns: {{{next(iter(missing))}: {other}}}`."
        )
    names = {name: column for name, column in names.items() if column in there}
    for start in range(0, len(rows), _AT_ONCE):
        part: Any = rows[start : start + _AT_ONCE]
        if isinstance(part, Mapping):
            yield start, {name: list(part[column]) for name, column in names.items()}
        else:
            yield start, {n: [row.get(column) for row in part] for n, column in names.items()}


def _strings(columns: dict[str, list[Any]], name: str, start: int, reading: Reading) -> list[str]:
    for number, value in enumerate(columns[name]):
        if not isinstance(value, str):
            raise ValueError(
                f"{reading.where}, row {start + number}: {name}={value!r} is no string. Mend or "
                f"remove the row."
            )
    return columns[name]


def _tools(tools: Any, where: str) -> Any:
    """Schemas of functions, which tables often hold as text: their fields differ too much."""
    if not isinstance(tools, str):
        return tools or None
    try:
        return json.loads(tools) or None
    except ValueError as error:
        raise ValueError(
            f"{where}: tools is no JSON ({error}). Give a list of schemas, or one as JSON."
        ) from error


def _template(tokenizer: Tokenizer, reading: Reading) -> ChatTemplate:
    if tokenizer.template is None:
        raise ValueError(
            f"{reading.where} holds chats, and the tokenizer's folder no chat template. Give one "
            f"(data.chat_template of a recipe), or data of prompts and completions."
        )
    return tokenizer.template


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos is None:
        raise ValueError(
            "The tokenizer names no eos token, so a model would not learn where a text ends. Give "
            "tokenizer_config.json an eos_token."
        )
    return tokenizer.eos


def names_of_labels(rows: Rows, reading: Reading) -> Sequence[str]:
    """What the table says that labels are called, or else the labels that there are."""
    column = reading.columns.get("label", "label")
    names = getattr(getattr(rows, "features", {}).get(column), "names", None)
    return collected(_labels(rows, reading), reading.where) if names is None else names


def _labels(rows: Rows, reading: Reading, names: Sequence[str] | None = None) -> Sequence[Any]:
    """The labels of all rows, to be looked up among the names if those are known."""
    alone = dataclasses.replace(reading, columns={"label": reading.columns.get("label", "label")})
    found = [x for _, part in _columns(rows, alone, ("label",)) for x in part["label"]]
    untyped = getattr(getattr(rows, "info", None), "builder_name", None) == "csv"
    strings = untyped and all(isinstance(label, str) for label in found)
    return numbered(found, names) if strings else found


def _cutting(tokenizer: Tokenizer, reading: Reading) -> tokenizers.Tokenizer:
    """The tokenizer, which cuts the text and leaves the tokens around it if that is asked for."""
    if reading.overlong != "truncate":
        return tokenizer.whole
    encoder = tokenizers.Tokenizer.from_str(tokenizer.whole.to_str())
    encoder.enable_truncation(reading.length)
    return encoder


def _refuse_split(reading: Reading) -> None:
    if reading.overlong == "split":
        raise ValueError(
            "data.overlong=split makes several examples of one, which only plain texts bear. Use "
            "truncate, drop or error."
        )


def _spoken(tokenizer: Tokenizer, spoken: Sequence[tuple[str, list[Span]]]) -> Iterator[Part]:
    """The tokens of texts, learnt where a character of theirs is in a span."""
    for made, (_, spans) in zip(
        tokenizer.plain.encode_batch([text for text, _ in spoken]), spoken, strict=True
    ):
        yield Part(made.ids, within(np.array(made.offsets).reshape(-1, 2), spans))


def within(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Which tokens share a character with a span.

    Args:
        offsets: (tokens, 2), the first character of each and the one after its last.
        spans: From where to where, one after another.
    """
    starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
    # The first span that ends after the token starts is the only one that has to be looked at.
    nearest = np.searchsorted(ends, offsets[:, 0], side="right")
    return np.append(starts, np.iinfo(np.int64).max)[nearest] < offsets[:, 1]


def _joined(head: list[int], rest: list[int], learn_head: bool = False) -> Part:
    learn = np.ones(len(head) + len(rest), np.bool_)
    learn[: len(head)] = learn_head
    return Part([*head, *rest], learn)


def _answered_texts(
    columns: dict[str, list[Any]], name: str, start: int, tokenizer: Tokenizer, reading: Reading
) -> Iterator[Part]:
    """Prompts with an answer each, tokenised apart."""
    end = _eos(tokenizer)
    prompts = tokenizer.encode(_strings(columns, "prompt", start, reading))
    answers = tokenizer.encode(_strings(columns, name, start, reading))
    for prompt, answer in zip(prompts, answers, strict=True):
        yield _joined([*tokenizer.before, *prompt], [*answer, end])


def _answered_chats(
    columns: dict[str, list[Any]], name: str, start: int, tokenizer: Tokenizer, reading: Reading
) -> Iterator[Part]:
    """Chats with an answer each, which is the last thing said."""
    template = _template(tokenizer, reading)
    spoken = []
    for number, (prompt, answer) in enumerate(zip(columns["prompt"], columns[name], strict=True)):
        where = f"{reading.where}, row {start + number}"
        messages = _answered(prompt, answer, name, where)
        spoken.append(template.spans(messages, loss_on="last", where=where))
    return _spoken(tokenizer, spoken)


def _answered(prompt: Any, answer: Any, name: str, where: str) -> list[Message]:
    """The messages of a prompt and of one answer, which may repeat them."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    asked = checked(prompt, f"{where}, prompt")
    said = checked(answer, f"{where}, {name}")
    if said[: len(asked)] == asked:
        said = said[len(asked) :]
    if [message["role"] for message in said] != ["assistant"]:
        raise ValueError(
            f"{where}: {name} has to be one message of the assistant, after the prompt, and is of "
            f"{[message['role'] for message in said]}. Move what comes before it to the prompt."
        )
    return [*asked, *said]
