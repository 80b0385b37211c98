"""Tokenization of rows: tokens, loss masks, labels, and errors for invalid rows."""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import re
import shutil
from typing import Any

import datasets
import numpy as np
import pytest
import tokenizers

from jlora.training.data import formats, sources
from jlora.training.data.chat_template import ChatTemplate
from jlora.training.data.tokenized_dataset import TokenizeConfig, TokenizedDataset
from jlora.training.data.tokenizer import Tokenizer

HERE = pathlib.Path(__file__).parent
CASES = json.loads((HERE / "chat.json").read_text("utf-8"))["cases"]
TINY = Tokenizer.from_folder(HERE / "tiny")
BOS, EOS = 0, 1
READING = TokenizeConfig(max_seq_length=400, data_name="train.jsonl")
TEXTS = ["Größe, naïve café", "日本語 and 🙂🙂", "def answer():\n    return  1\n", "a"]


def with_template(name: str) -> Tokenizer:
    text = (HERE / "templates" / f"{name}.jinja").read_text()
    variables = {"bos_token": "<s>", "date_string": "01 Feb 2026"}
    return Tokenizer.from_folder(HERE / "tiny", ChatTemplate(text, variables))


def pieces(corpus: TokenizedDataset, index: int) -> tuple[list[int], list[int]]:
    tokens, learn = corpus.get_sequence(index)
    return tokens.tolist(), tokens[learn].tolist()


def ids(text: str) -> list[int]:
    return TINY.without_special_tokens.encode(text).ids


def said(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(texts)
    ]


# Tokenizers


def test_tokenizer_ignores_truncation_of_file(tmp_path: pathlib.Path) -> None:
    shutil.copytree(HERE / "tiny", tmp_path, dirs_exist_ok=True)
    cutting = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    cutting.enable_truncation(3)
    cutting.enable_padding(length=50)
    cutting.save(str(tmp_path / "tokenizer.json"))
    made = Tokenizer.from_folder(tmp_path)
    for text in TEXTS:
        assert made.encode([text]) == [ids(text)]
        assert made.with_special_tokens.encode(text).ids == [BOS, *ids(text)]


def test_tokenizer_special_tokens_of_folder(tmp_path: pathlib.Path) -> None:
    assert (TINY.prefix_ids, TINY.bos_token_id, TINY.eos_token_id, TINY.pad_token_id) == (
        (BOS,),
        BOS,
        EOS,
        2,
    )
    assert TINY.chat_template is not None
    assert TINY.vocab_size == TINY.without_special_tokens.get_vocab_size()
    shutil.copytree(HERE / "tiny", tmp_path, dirs_exist_ok=True)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"add_bos_token": false}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 1], "bos_token_id": 0}')
    made = Tokenizer.from_folder(tmp_path)
    assert (
        made.prefix_ids,
        made.bos_token_id,
        made.eos_token_id,
        made.pad_token_id,
        made.chat_template,
    ) == ((), 0, 7, 0, None)
    assert made.fingerprint != TINY.fingerprint
    config.write_text('{"eos_token": "<nothing>"}')
    with pytest.raises(
        ValueError, match="eos_token='<nothing>'.* is not a token of tokenizer.json"
    ):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: .*Copy it again from its source"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing"):
        Tokenizer.from_folder(tmp_path)


def test_tokenizer_that_fails_names_its_file(tmp_path: pathlib.Path) -> None:
    # The library gives up a regular expression that takes too many steps.
    encoder(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    file.write_text(json.dumps({**content, "pre_tokenizer": {**pattern, "invert": False}}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = "a" * 200 + "X"
    reading = TokenizeConfig(max_seq_length=400)
    for encode in (
        lambda: tokenizer.encode([text]),
        lambda: tokenizer.encode_continuations([text]),
        lambda: formats.tokenize_texts([{"text": text}], tokenizer, reading),
        lambda: formats.tokenize_classification(
            [{"text": text, "label": 0}, {"text": "b", "label": 1}], tokenizer, reading
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(str(file))):
            encode()


def test_tokenizer_fingerprint_covers_template() -> None:
    made = [
        TINY,
        Tokenizer.from_folder(HERE / "tiny"),
        with_template("llama3"),
        with_template("plain"),
    ]
    prints = [tokenizer.fingerprint for tokenizer in made]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_tokenizer_fingerprint_dated_template(
    tmp_path: pathlib.Path,
) -> None:
    shutil.copytree(HERE / "tiny", tmp_path, dirs_exist_ok=True)
    days = [datetime.datetime(2026, 2, day) for day in (1, 2)]
    for template in (None, TINY.chat_template):
        undated = [Tokenizer.from_folder(tmp_path, template, now=now) for now in (None, *days)]
        assert {tokenizer.fingerprint for tokenizer in undated} == {TINY.fingerprint}
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}")
    for template in (None, ChatTemplate.from_folder(tmp_path)):
        dated = [
            Tokenizer.from_folder(tmp_path, template, now=now) for now in (*days, None, days[0])
        ]
        prints = [tokenizer.fingerprint for tokenizer in dated]
        assert prints[0] == prints[3]
        assert len(set(prints)) == 3
        assert dated[1].chat_template is not None
        assert dated[1].chat_template.render(said("Hi")) == "02 Feb 2026"
    kept = Tokenizer.from_folder(tmp_path, ChatTemplate.from_folder(tmp_path, now=days[1]))
    assert kept.fingerprint == prints[1]


# Chats


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["template"])
def test_tokenize_chats_match_transformers(case: dict[str, Any]) -> None:
    row = {"messages": case["messages"], "tools": json.dumps(case["tools"])}
    corpus = formats.tokenize_chats([row], with_template(case["template"]), READING)
    tokens, learn = corpus.get_sequence(0)
    assert tokens.tolist() == case["tokens"]
    if "mask" in case:
        assert learn.tolist() == [bool(x) for x in case["mask"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["template"])
def test_tokenize_chats_mask_matches_characters(case: dict[str, Any]) -> None:
    """Compares with a search through all characters, with tokens of partial characters."""
    tokenizer = with_template(case["template"])
    assert tokenizer.chat_template is not None
    text, spans = tokenizer.chat_template.render_with_spans(case["messages"], tools=case["tools"])
    spoken = {place for start, end in spans for place in range(start, end)}
    made = tokenizer.without_special_tokens.encode(text)
    want = [bool(spoken & set(range(*offsets))) for offsets in made.offsets]
    row = {"messages": case["messages"], "tools": case["tools"]}
    tokens, learn = formats.tokenize_chats([row], tokenizer, READING).get_sequence(0)
    assert tokens.tolist() == made.ids
    assert learn.tolist() == want
    assert any(want)


def test_tokenize_chats_blanks_are_in_loss() -> None:
    # Byte-level tokenizers trim blanks from offsets by default.
    rows = [{"messages": said("Hi", "if:\n        x =    1  ")}]
    _, learnt = pieces(formats.tokenize_chats(rows, with_template("chatml"), READING), 0)
    assert TINY.decode(learnt) == "if:\n        x =    1  <|im_end|>"


@pytest.mark.parametrize(("train_on", "learnt"), [("assistant", "bd"), ("last", "d")])
def test_tokenize_chats_train_on_selects_turns(train_on: Any, learnt: str) -> None:
    rows = [{"messages": said("a", "b", "c", "d")}]
    for name in ("chatml", "generation"):
        corpus = formats.tokenize_chats(rows, with_template(name), READING, train_on=train_on)
        assert TINY.decode(pieces(corpus, 0)[1]).replace("<|im_end|>", "") == learnt
    everything = formats.tokenize_chats(rows, TINY, READING, train_on="all")
    assert everything.get_sequence(0)[1].tolist() == [False] + [True] * (
        everything.stats.tokens - 1
    )


def test_tokens_in_spans_match_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        cuts = np.sort(rng.choice(40, 8, replace=False))
        spans = list(zip(cuts[::2].tolist(), cuts[1::2].tolist(), strict=True))
        starts = np.sort(rng.integers(0, 40, 20))
        offsets = np.stack([starts, starts + rng.integers(1, 5, 20)], axis=1)
        want = [any(a < end and start < b for a, b in spans) for start, end in offsets]
        assert formats.tokens_in_spans(offsets, spans).tolist() == want
    assert formats.tokens_in_spans(offsets, []).tolist() == [False] * 20


# The other formats


def test_tokenize_completions_bos_and_eos() -> None:
    rows = [{"prompt": text, "completion": f"{text}!"} for text in TEXTS]
    corpus = formats.tokenize_completions(rows, TINY, READING)
    for number, text in enumerate(TEXTS):
        answer = [*ids(f"{text}!"), EOS]
        assert pieces(corpus, number) == ([BOS, *ids(text), *answer], answer)
    everything = formats.tokenize_completions(rows, TINY, READING, train_on="all")
    assert everything.loss_mask.sum() == len(everything.tokens) - len(TEXTS)


def test_tokenize_completions_split_at_prompt() -> None:
    rows = [{"prompt": "ans", "completion": "wers"}]
    whole = ids("answers")
    tokens, _ = pieces(formats.tokenize_completions(rows, TINY, READING), 0)
    assert tokens == [BOS, *ids("ans"), *ids("wers"), EOS] != [BOS, *whole, EOS]


def test_tokenize_texts_all_tokens_in_loss() -> None:
    corpus = formats.tokenize_texts([{"text": text} for text in [*TEXTS, ""]], TINY, READING)
    for number, text in enumerate(TEXTS):
        assert pieces(corpus, number) == ([BOS, *ids(text), EOS], [*ids(text), EOS])
    assert corpus.num_examples == 4
    assert corpus.stats.without_loss_tokens == 1


def test_tokenize_preferences_share_prompt() -> None:
    chats = [
        {"prompt": said("a"), "chosen": said("a", "yes"), "rejected": said("", "no!")[1:]},
        {"prompt": said("a", "b", "c"), "chosen": said("", "d")[1:], "rejected": said("", "")[1:]},
    ]
    strings = [{"prompt": "a", "chosen": " yes", "rejected": " no!"}]
    asked = [{"prompt": "a", "chosen": said("a", "yes"), "rejected": said("a", "no!")}]
    corpus = formats.tokenize_preferences(chats, TINY, READING)
    assert (corpus.sequences_per_example, corpus.num_examples, len(corpus.offsets)) == (2, 2, 5)
    sizes = np.diff(corpus.offsets).reshape(-1, 2)
    assert corpus.example_lengths().tolist() == sizes.max(axis=1).tolist()
    answers = ["yes<|im_end|>", "no!<|im_end|>", "d<|im_end|>", "<|im_end|>"]
    assert [TINY.decode(pieces(corpus, i)[1]) for i in range(4)] == answers
    for first, second in ((0, 1), (2, 3)):
        tokens, learnt = zip(pieces(corpus, first), pieces(corpus, second), strict=True)
        prompts = [t[: -len(rest) - 1] for t, rest in zip(tokens, learnt, strict=True)]
        assert prompts[0] == prompts[1]
    texts = formats.tokenize_preferences(strings, TINY, READING)
    assert pieces(texts, 0) == ([BOS, *ids("a"), *ids(" yes"), EOS], [*ids(" yes"), EOS])
    assert pieces(texts, 1) == ([BOS, *ids("a"), *ids(" no!"), EOS], [*ids(" no!"), EOS])
    assert pieces(formats.tokenize_preferences(asked, TINY, READING), 0) == pieces(corpus, 0)


def encoder(folder: pathlib.Path) -> Tokenizer:
    """Words, with tokens around texts and between pairs as BERT has them."""
    words = {word: number for number, word in enumerate(["[CLS]", "[SEP]", "[UNK]", *"abcdefg"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
    )
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)


def test_tokenize_classification_special_tokens(tmp_path: pathlib.Path) -> None:
    tokenizer = encoder(tmp_path)
    rows = [{"text": "a b", "label": "good"}, {"text": "c", "label": "bad"}]
    corpus = formats.tokenize_classification(rows, tokenizer, READING)
    assert corpus.tokens.tolist() == [0, 3, 4, 1, 0, 5, 1]
    assert corpus.labels is not None
    assert corpus.labels.tolist() == [1, 0]
    assert (corpus.label_names, corpus.token_type_ids) == (("bad", "good"), None)
    assert not corpus.loss_mask.any()
    pairs = [row | {"text_pair": "d e f"} for row in rows]
    corpus = formats.tokenize_classification(
        pairs, tokenizer, READING, label_names=["good", "bad", "so"]
    )
    assert corpus.labels is not None
    assert corpus.token_type_ids is not None
    assert corpus.labels.tolist() == [0, 1]
    assert corpus.tokens[:8].tolist() == [0, 3, 4, 1, 6, 7, 8, 1]
    assert corpus.token_type_ids[:8].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_tokenize_classification_truncates_text(tmp_path: pathlib.Path) -> None:
    rows = [{"text": "a b c d e", "label": 0}, {"text": "a b", "label": 2}]
    reading = TokenizeConfig(max_seq_length=4, truncation="truncate")
    corpus = formats.tokenize_classification(rows, encoder(tmp_path), reading)
    assert corpus.tokens.tolist() == [0, 3, 4, 1, 0, 3, 4, 1]
    assert corpus.stats.truncated == 1
    assert corpus.label_names == ("0", "1", "2")
    dropped = formats.tokenize_classification(
        rows, encoder(tmp_path), TokenizeConfig(max_seq_length=4, truncation="drop")
    )
    assert dropped.labels is not None
    assert (dropped.labels.tolist(), dropped.stats.dropped) == ([2], 1)


def test_label_names_of_table_features(tmp_path: pathlib.Path) -> None:
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}).cast_column(
        "label", datasets.ClassLabel(names=["zero", "one", "two"])
    )
    corpus = formats.tokenize_classification(table, encoder(tmp_path), READING)
    assert corpus.label_names == ("zero", "one", "two")
    assert corpus.labels is not None
    assert corpus.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (
            ["a", "b", "c"],
            ["a", "b"],
            r"train.jsonl, row 2: label='c' must be one of a, b, or an int",
        ),
        (["a", 1], None, "row 1: label=1, but labels must be all nonempty strings"),
        ([0, -1], None, "row 1: label=-1, but labels"),
        ([0, 10**9], None, "row 1: label=1000000000, but labels"),
        ([0, True], None, "row 1: label=True, but labels"),
        ([0, None], None, "row 1: label=None, but labels"),
        ([0.5], None, r"row 0: label=0\.5, but labels"),
        (["a", ""], None, "row 1: label='', but labels must be all nonempty strings"),
        (
            ["a", "b"],
            ["a", "c"],
            "list all labels in label_names .classification.labels of a recipe",
        ),
        ([0, 2], ["a", "b"], "row 1: label=2 must be one of a, b, or an int below 2"),
        (["a", "a"], None, r"label_names=\['a'\] must be at least two distinct names"),
        (["a", "b", " a"], None, "row 2: label=' a' differs from the label 'a' in blanks alone"),
        (["a", "b"], ["a", "b", "a"], "must be at least two distinct names"),
    ],
)
def test_labels_invalid_raise(
    labels: list[Any], names: Any, message: str, tmp_path: pathlib.Path
) -> None:
    rows = [{"text": "a", "label": label} for label in labels]
    with pytest.raises(ValueError, match=message):
        formats.tokenize_classification(rows, encoder(tmp_path), READING, label_names=names)


def test_boolean_labels_are_false_and_true(tmp_path: pathlib.Path) -> None:
    tokenizer = encoder(tmp_path)
    rows = [{"text": "a", "label": label} for label in (True, False, True)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for given in (rows, sources.load_rows(tmp_path / "a.jsonl")):
        for names in (None, ["false", "true"], ["False", "True"], ["bad", "good"]):
            corpus = formats.tokenize_classification(given, tokenizer, READING, label_names=names)
            assert corpus.labels is not None
            assert corpus.labels.tolist() == [1, 0, 1]
            assert corpus.label_names == tuple(names or ("false", "true"))
        for names in (["true", "false"], ["True", "False"]):
            with pytest.raises(ValueError, match="row 0: label=True is the id of the class '[fF]a"):
                formats.tokenize_classification(given, tokenizer, READING, label_names=names)
    rows[1]["label"] = 0
    with pytest.raises(ValueError, match="row 1: label=0, but labels must be .* or all booleans"):
        formats.tokenize_classification(rows, tokenizer, READING)


def test_id_that_names_another_class_raises(tmp_path: pathlib.Path) -> None:
    tokenizer = encoder(tmp_path)
    rows = [{"text": "a", "label": label} for label in (1, 0)]
    for names in (["1", "0"], ["1", "2", "3"]):
        with pytest.raises(
            ValueError, match="row 0: label=1 is the id of the class '[02]', but al"
        ):
            formats.tokenize_classification(rows, tokenizer, READING, label_names=names)
    # The type of this table says that they are ids.
    stars = datasets.Dataset.from_list(rows).cast_column(
        "label", datasets.ClassLabel(names=["1", "2", "3"])
    )
    for names in (None, ["1", "2", "3"]):
        corpus = formats.tokenize_classification(stars, tokenizer, READING, label_names=names)
        assert corpus.labels is not None
        assert (corpus.labels.tolist(), corpus.label_names) == ([1, 0], ("1", "2", "3"))


def test_csv_labels_numeric_become_ints(tmp_path: pathlib.Path) -> None:
    tokenizer = encoder(tmp_path)
    tables = {
        # Of numbers all up to the highest, in their own order.
        "10 2 0": ([10, 2, 0], tuple(map(str, range(11)))),
        " 1 +2 03": ([1, 2, 3], ("0", "1", "2", "3")),
        "None a NA": ([1, 2, 0], ("NA", "None", "a")),
        "True False True": ([1, 0, 1], ("False", "True")),
        "1 b 1": ([0, 1, 0], ("1", "b")),
    }
    for cells, want in tables.items():
        file = tmp_path / "a.csv"
        file.write_text("text,label\n" + "".join(f"a,{cell}\n" for cell in cells.split()))
        corpus = formats.tokenize_classification(sources.load_rows(file), tokenizer, READING)
        assert corpus.labels is not None
        assert (corpus.labels.tolist(), corpus.label_names) == want
    file.write_text("text,label\na,1\na,0\na,1\n")
    for names, numbers in ((["bad", "good"], [1, 0, 1]), (["1", "0"], [0, 1, 0])):
        corpus = formats.tokenize_classification(
            sources.load_rows(file), tokenizer, READING, label_names=names
        )
        assert corpus.labels is not None
        assert corpus.labels.tolist() == numbers


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["1", "", "0"], "row 1: label='', but labels"),
        (["", "1", "0"], "row 0: label='', but labels"),
        (["0", "-1"], "row 1: label=-1, but labels"),
        (["0.0", "1.5"], r"row 0: label=0\.0, but labels"),
    ],
)
def test_csv_labels_invalid_raise(cells: list[str], message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"a,{cell}\n" for cell in cells))
    with pytest.raises(ValueError, match=message):
        formats.tokenize_classification(
            sources.load_rows(tmp_path / "a.csv"), encoder(tmp_path), READING
        )


def test_csv_labels_of_one_number_raise(tmp_path: pathlib.Path) -> None:
    """The labels 01 and 1 may be one class, or two."""
    file, tokenizer = tmp_path / "a.csv", encoder(tmp_path)
    message = "is the same number as the label"
    for cells, row in (("01 1 0", 1), ("1 0 +1", 2), ("0 1 1.0", 2)):
        file.write_text("text,label\n" + "".join(f"a,{cell}\n" for cell in cells.split()))
        with pytest.raises(ValueError, match=f"row {row}: label=.* {message}"):
            formats.tokenize_classification(sources.load_rows(file), tokenizer, READING)
    file.write_text("text,label\na,01\na,1\na,0\n")
    names = ["0", "1", "01"]
    corpus = formats.tokenize_classification(
        sources.load_rows(file), tokenizer, READING, label_names=names
    )
    assert corpus.labels is not None
    assert corpus.labels.tolist() == [2, 1, 0]
    file.write_text("text,label\na, 1\na,1\na,0\n")  # Blanks do not count.
    corpus = formats.tokenize_classification(sources.load_rows(file), tokenizer, READING)
    assert corpus.labels is not None
    assert corpus.labels.tolist() == [1, 1, 0]


def test_csv_labels_numeric_names_stay_text(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,1\na,9\n")
    reading = TokenizeConfig(max_seq_length=400, data_name="a.csv")
    with pytest.raises(ValueError, match="a.csv, row 1: label='9' must be one of 1, 2, b"):
        formats.tokenize_classification(
            sources.load_rows(tmp_path / "a.csv"),
            encoder(tmp_path),
            reading,
            label_names=["1", "2", "b"],
        )


def test_json_labels_of_digits_stay_text(tmp_path: pathlib.Path) -> None:
    lines = [json.dumps({"text": "a", "label": label}) for label in ("2", "1")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = formats.tokenize_classification(
        sources.load_rows(tmp_path / "a.jsonl"), encoder(tmp_path), READING
    )
    assert corpus.label_names == ("1", "2")


# Special tokens and blanks


@pytest.mark.parametrize("truncation", ["error", "truncate"])
def test_tokenize_adds_no_special_token_twice(truncation: Any) -> None:
    reading = TokenizeConfig(max_seq_length=400, truncation=truncation)
    plain = {"text": "Hello", "prompt": "Q", "completion": "A", "chosen": "A", "rejected": "B"}
    plain["label"] = "no"
    rendered = {**plain, "text": "<s>Hello</s>", "prompt": "<s>Q", "completion": "A</s>"}
    rendered |= {"chosen": "A</s>", "rejected": "B</s>"}
    for name in ("text", "completion", "preference"):
        want, got = (formats.FORMATS[name]([row], TINY, reading) for row in (plain, rendered))
        assert got.fingerprint == want.fingerprint, name
    # The end of a turn in a rendered chat is followed by a line break.
    broken = formats.tokenize_texts([{"text": "Hello</s>\n"}], TINY, reading)
    assert TINY.decode(broken.tokens.tolist()) == "<s>Hello</s>\n"
    within = formats.tokenize_texts([{"text": "Hel</s>lo"}], TINY, reading)
    assert TINY.decode(within.tokens.tolist()) == "<s>Hel</s>lo</s>"
    rows = [{**plain, "label": label} for label in ("no", "yes")]
    twice = [{**row, "text": "<s>Hello"} for row in rows]
    want, got = (formats.tokenize_classification(r, TINY, reading) for r in (rows, twice))
    assert got.tokens.tolist() == want.tokens.tolist()


def sentencepiece(folder: pathlib.Path, scheme: str) -> Tokenizer:
    """A tokenizer that writes a blank before a text, as those of Llama 2 and Mistral."""
    characters = ["<unk>", "<s>", "</s>", "\u2581", *"ABCQabcq\n.:1"]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {text: number for number, text in enumerate(characters)}, [], unk_token="<unk>"
        )
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("answer", ["Ab", " Ab", "\n\nAb", ".a", "1", ""])
def test_tokenize_completions_invents_no_blank(
    tmp_path: pathlib.Path, scheme: str, answer: str
) -> None:
    tokenizer = sentencepiece(tmp_path, scheme)
    rows = [{"prompt": "Q", "completion": answer}, {"prompt": "", "completion": "Ab"}]
    dataset = formats.tokenize_completions(rows, tokenizer, READING)
    decoder = tokenizer.with_special_tokens
    text = decoder.decode(dataset.get_sequence(0)[0].tolist(), skip_special_tokens=True)
    assert text == f"Q{answer}"
    # A completion without a prompt begins a text.
    begun = tokenizer.encode(["Ab"])[0]
    assert dataset.get_sequence(1)[0].tolist() == [*begun, tokenizer.eos_token_id]


def test_tokenizer_prefix_of_any_alphabet(tmp_path: pathlib.Path) -> None:
    # A tokenizer of DNA has no token for the letter a.
    vocab = {text: number for number, text in enumerate(["<s>", "</s>", *"ACGT"])}
    for post in (
        tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        tokenizers.processors.BertProcessing(("</s>", 1), ("<s>", 0)),
    ):
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
        made.add_special_tokens(["<s>", "</s>"])
        made.post_processor = post
        made.save(str(tmp_path / "tokenizer.json"))
        assert Tokenizer.from_folder(tmp_path).prefix_ids == (0,)


# Rows and columns


def test_tokenize_joins_columns() -> None:
    reading = TokenizeConfig(
        max_seq_length=400, columns={"prompt": ["instruction", "input"], "completion": "output"}
    )
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say.", "input": "", "output": "x"},
        {"instruction": "Say.", "input": None, "output": "y"},
    ]
    joined = [("Add.\n\n1 and 2", "3"), ("Say.", "x"), ("Say.", "y")]
    want = [{"prompt": prompt, "completion": completion} for prompt, completion in joined]
    for given in (rows, datasets.Dataset.from_list(rows)):
        got = formats.tokenize_completions(given, TINY, reading)
        assert got.fingerprint == formats.tokenize_completions(want, TINY, READING).fingerprint
    with pytest.raises(ValueError, match=r"row 0: input=3 must be a string to be joined"):
        formats.tokenize_completions([{**rows[0], "input": 3}], TINY, reading)
    with pytest.raises(ValueError, match=r"input=\[.{1,60} must be .* their first message, of the"):
        formats.tokenize_completions([{**rows[0], "input": said("a", "b")}], TINY, reading)


ALPACA = {"instruction": "Add.", "input": "1", "output": "3"}


@pytest.mark.parametrize(
    ("form", "row", "advice"),
    [
        ("chat", ALPACA, r"columns of Alpaca: .*`columns: {prompt: \[instruction, input\], compl"),
        ("completion", {"instruction": "a", "output": "b"}, "{prompt: instruction, completion: ou"),
        ("chat", {"conversations": []}, "`columns: {messages: conversations}`"),
        ("chat", {"text": "a"}, "Use format: text."),
        ("completion", {"text": "a"}, "Use format: text."),
        ("text", {"messages": said("a")}, "Use format: chat."),
        ("chat", {"prompt": "a", "completion": "b"}, "Use format: completion."),
        ("chat", {"text": "a", "label": 1}, "Use format: classification."),
        (
            "chat",
            {"query": "a", "response": "b"},
            "format: completion and `columns: {prompt: query, ",
        ),
        (
            "chat",
            {"prompt": "a", "answer": "b"},
            "format: completion and `columns: {completion: ans",
        ),
        ("completion", {"question": "a", "answer": "b"}, "use `columns: {prompt: question, compl"),
        ("chat", {**ALPACA, "system": "s"}, r"`columns: {prompt: \[system, instruction, input\],"),
        (
            "completion",
            {**ALPACA, "system_prompt": "s"},
            r"use format: completion and `columns: {prompt: \[system_prompt, instruction, input\],",
        ),
        (
            "chat",
            {"instruction": "a", "input": "b", "response": "c"},
            r"format: completion and `columns: {prompt: \[instruction, input\], completion: resp",
        ),
        (
            "completion",
            {"instruction": "a", "context": "b", "response": "c", "category": "d"},
            r"use `columns: {prompt: \[instruction, context\], completion: response}`",
        ),
        (
            "chat",
            {"context": "a", "question": "b", "answer": "c"},
            r"{prompt: \[context, question\], completion: answer}",
        ),
        (
            "chat",
            {"system_prompt": "a", "question": "b", "response": "c"},
            r"{prompt: \[system_prompt, question\], completion: response}",
        ),
        ("chat", {"id": 1, "conversation": []}, "`columns: {messages: conversation}`"),
        (
            "chat",
            {"conversations": [], "system_prompt": "s"},
            "`columns: {messages: conversations, system: system_prompt}`",
        ),
        (
            "preference",
            {"prompt": "a", "completion": "b", "label": False},
            "with a label .KTO., not pairs: .* remove the rows whose label is false, and use fo",
        ),
        (
            "preference",
            {"system": "s", "question": "a", "chosen": "b", "rejected": "c"},
            r"use `columns: {prompt: \[system, question\]}`",
        ),
        (
            "classification",
            {"premise": "a", "hypothesis": "b", "label": 1},
            "pairs of texts: use `columns: {text: premise, text_pair: hypothesis}`",
        ),
        ("completion", {"prompt;completion": "a;b"}, "seem to be separated by ';': save the file"),
        (
            "preference",
            {"chosen": "a", "rejected": "b"},
            "write it into a column prompt, as the me",
        ),
    ],
)
def test_tokenize_advises_the_format(form: str, row: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        formats.FORMATS[form]([row], with_template("chatml"), READING)


def test_tokenize_chats_system_column(tmp_path: pathlib.Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    want = [[system, *said("a", "b")], said("a", "b"), [system, *said("a", "b")]]
    rows = [
        {"conversations": turns, "system": "Be brief.", "tools": "[]"},
        {"conversations": turns, "system": ""},
        {
            "conversations": [{"from": "system", "value": "Be brief."}, *turns],
            "system": "Be brief.",
        },
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = dataclasses.replace(READING, columns={"messages": "conversations"})
    expected = formats.tokenize_chats([{"messages": m} for m in want], TINY, READING)
    for given in (rows, sources.load_rows(tmp_path / "a.jsonl")):
        corpus = formats.tokenize_chats(given, TINY, reading)
        assert corpus.fingerprint == expected.fingerprint
    rows[2]["system"] = "Be long."
    with pytest.raises(
        ValueError, match="row 2 has the column system and a first message of the s"
    ):
        formats.tokenize_chats(rows, TINY, reading)


@pytest.mark.parametrize(
    ("form", "column", "value", "message"),
    [
        ("chat", "history", [["a", "b"]], "row 1: the column history would change .* as messages"),
        ("chat", "system_prompt", "s", "Map it by `columns: {system: system_prompt}`"),
        ("chat", "documents", [{"text": "a"}], "documents would change .* into the prompt or a me"),
        ("chat", "functions", [{"name": "f"}], "as the column tools with entries such as"),
        ("chat", "images", ["a.png"], "A language model does not read it"),
        ("chat", "greeting", "s", "the column greeting would change the prompt, .* `{% set NAME"),
        ("completion", "system_message", "s", r"`columns: {prompt: \[system_message, prompt\]}`"),
        ("completion", "tools", [{"name": "f"}], "tools would change .* Write it into the prompt"),
        ("completion", "images", ["a.png"], "A language model does not read it"),
        ("preference", "system_prompt", "s", r"`columns: {prompt: \[system_prompt, prompt\]}`"),
        ("preference", "tools", [{"name": "f"}], "tools would change the prompt"),
        ("chat", "chat_template_kwargs", {"x": 1}, r"by `{% set NAME = ... %}` in a template"),
        ("completion", "system", "s", r"`columns: {prompt: \[system, prompt\]}`"),
        ("completion", "history", [["a", "b"]], "history would change the prompt, but"),
        ("preference", "system", "s", "of messages, write it as the first of the prompt"),
        ("preference", "chat_template_kwargs", {"x": 1}, "chat_template_kwargs would change"),
    ],
)
def test_columns_of_prompt_are_not_ignored(
    form: str, column: str, value: Any, message: str, tmp_path: pathlib.Path
) -> None:
    row = {
        "chat": {"messages": said("a", "b")},
        "completion": {"prompt": "a", "completion": "b"},
        "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    }[form]
    template = TINY.chat_template
    assert template is not None
    greeted = dataclasses.replace(template, text=template.text + "{{ greeting }}")
    tokenizer = TINY._replace(chat_template=greeted)
    tokenize, empty = formats.FORMATS[form], {column: type(value)()}
    (tmp_path / "a.jsonl").write_text(json.dumps(row | empty) + "\n" + json.dumps(row | empty))
    want = tokenize([row, row], tokenizer, READING).fingerprint
    for given in ([row, row | empty], sources.load_rows(tmp_path / "a.jsonl")):
        assert tokenize(given, tokenizer, READING).fingerprint == want
    (tmp_path / "a.jsonl").write_text(
        json.dumps(row | empty) + "\n" + json.dumps(row | {column: value})
    )
    for given in ([row, row | {column: value}], sources.load_rows(tmp_path / "a.jsonl")):
        with pytest.raises(ValueError, match=message):
            tokenize(given, tokenizer, READING)


def test_columns_of_structs_without_values_pass() -> None:
    """Such a type has null for the fields of other rows."""
    row = {"messages": said("a", "b"), "chat_template_kwargs": {}}
    other = {**row, "chat_template_kwargs": {"thinking": True}}
    table = datasets.Dataset.from_list([row, other])
    assert table[0]["chat_template_kwargs"] == {"thinking": None}
    with pytest.raises(ValueError, match="row 1: the column chat_template_kwargs would change"):
        formats.tokenize_chats(table, TINY, READING)
    seen = {**row, "images": np.zeros(2)}
    with pytest.raises(ValueError, match="row 0: the column images would change the prompt"):
        formats.tokenize_chats([seen], TINY, READING)


def test_advised_columns_lead_to_a_run() -> None:
    """What the advice names is in the prompt, in its order."""
    row = {"system_prompt": "s", "input": "c", "instruction": "a", "context": "b", "output": "d"}
    columns = {"prompt": ["system_prompt", "instruction", "context", "input"]}
    with pytest.raises(ValueError, match=r"prompt: \[system_prompt, instruction, context, input\]"):
        formats.tokenize_completions([row], TINY, READING)
    reading = dataclasses.replace(READING, columns={**columns, "completion": "output"})
    got = formats.tokenize_completions([row], TINY, reading)
    want = [{"prompt": "s\n\na\n\nb\n\nc", "completion": "d"}]
    assert got.fingerprint == formats.tokenize_completions(want, TINY, READING).fingerprint


@pytest.mark.parametrize("label", [False, "False", "false"])
def test_answers_labeled_false_are_not_learned(label: Any) -> None:
    row = {"prompt": "a", "completion": "b", "label": True}
    want = formats.tokenize_completions([{"prompt": "a", "completion": "b"}], TINY, READING)
    assert formats.tokenize_completions([row], TINY, READING).fingerprint == want.fingerprint
    with pytest.raises(ValueError, match=r"row 1: label=.* not to be learned .KTO."):
        formats.tokenize_completions([row, {**row, "label": label}], TINY, READING)
    chat = {"prompt": said("a"), "completion": said("", "b")[1:], "label": label}
    reading = dataclasses.replace(READING, columns={"messages": ["prompt", "completion"]})
    with pytest.raises(ValueError, match=r"row 0: label=.* not to be learned .KTO."):
        formats.tokenize_chats([chat], TINY, reading)


def test_tools_that_template_ignores_raise() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    row = {"messages": said("a", "b"), "tools": json.dumps(tools)}
    pair = {"prompt": said("a"), "chosen": said("", "b")[1:], "rejected": said("", "c")[1:]}
    message = "row 1 has tools, but the chat template does not read them"
    for form, given in (("chat", row), ("preference", {**pair, "tools": tools})):
        empty = {**given, "tools": None}
        with pytest.raises(ValueError, match=message):
            formats.FORMATS[form]([empty, given], with_template("chatml"), READING)
        formats.FORMATS[form]([empty, given], with_template("llama3"), READING)


def test_tokenize_chats_reads_parts(tmp_path: pathlib.Path) -> None:
    """Parts of content, calls as JSON, and a system message reach the template from every file."""
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}"
        "{{ m.content }}{% else %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = TINY._replace(chat_template=ChatTemplate(text))
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    system = {"role": "system", "content": [{"type": "text", "text": "s"}]}
    calls = json.dumps([{"function": {"name": "f", "arguments": {}}}])
    chat = [system, {"role": "user", "content": "a"}, {"role": "assistant", "content": parts}]
    chat += [{"role": "assistant", "content": "", "tool_calls": calls}]
    row = {"messages": chat, "system": "s"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    frame = {"messages": json.dumps(chat), "system": "s"}
    datasets.Dataset.from_list([frame]).to_csv(str(tmp_path / "a.csv"))
    for given in ([row], *(sources.load_rows(tmp_path / f"a.{kind}") for kind in ("jsonl", "csv"))):
        corpus = formats.tokenize_chats(given, tokenizer, READING)
        tokens, learnt = pieces(corpus, 0)
        assert TINY.decode(learnt) == "[b][c]<|im_end|>f<|im_end|>"
        assert "system\n[s]<|im_end|>" in TINY.decode(tokens)
    prompt = [system, {"role": "user", "content": "a"}]
    spelled = [{"role": "system", "content": "s"}, {"role": "user", "content": parts[:0] or "a"}]
    answers = {"chosen": [*spelled, said("", "b")[1]], "rejected": said("", "c")[1:]}
    pair = formats.tokenize_preferences([{"prompt": prompt, **answers}], tokenizer, READING)
    assert TINY.decode(pieces(pair, 0)[1]) == "b<|im_end|>"


def test_columns_of_prompt_can_be_mapped() -> None:
    reading = dataclasses.replace(READING, columns={"prompt": ["system", "prompt"]})
    row = {"prompt": "a", "completion": "b"}
    got = formats.tokenize_completions([{**row, "system": "s"}], TINY, reading)
    want = formats.tokenize_completions([{**row, "prompt": "s\n\na"}], TINY, READING)
    assert got.fingerprint == want.fingerprint


def test_tokenize_chats_joins_messages(tmp_path: pathlib.Path) -> None:
    chat = said("a", "b", "c", "d")
    row = {"prompt": chat[:3], "completion": chat[3:]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    reading = dataclasses.replace(READING, columns={"messages": ["prompt", "completion"]})
    want = formats.tokenize_chats([{"messages": chat}], TINY, READING, train_on="last")
    mend = r"format: chat, `columns: {messages: \[prompt, completion\]}` and data.train_on=last"
    for given in ([row], sources.load_rows(tmp_path / "a.jsonl")):
        got = formats.tokenize_chats(given, TINY, reading, train_on="last")
        assert got.fingerprint == want.fingerprint
        with pytest.raises(ValueError, match=mend):
            formats.tokenize_completions(given, TINY, READING)
    with pytest.raises(ValueError, match="row 0, completion must be a list of messages, got 'b'"):
        formats.tokenize_chats([{**row, "completion": "b"}], TINY, reading)


def test_tokenize_preferences_render_tools() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    messages, tokenizer = said("a", "b"), with_template("llama3")
    row = {"prompt": messages[:1], "chosen": messages[1:], "rejected": said("", "c")[1:]}
    chat = {"messages": messages}
    for tools in ([tool], json.dumps([tool]), [json.dumps(tool)]):
        chats = [{**chat, "tools": given} for given in (tools, [tool])]
        corpus = formats.tokenize_chats(chats, tokenizer, READING)
        assert pieces(corpus, 0) == pieces(corpus, 1)
    for tools in ({"tools": [tool]}, {"tools": json.dumps([tool])}, {}):
        pair = formats.tokenize_preferences([{**row, **tools}], tokenizer, READING)
        want = formats.tokenize_chats([{**chat, **tools}], tokenizer, READING)
        assert pieces(pair, 0) == pieces(want, 0)


def test_tokenize_chats_json_keeps_nulls(tmp_path: pathlib.Path) -> None:
    call = {"function": {"name": "f", "arguments": {"a": None}}}
    row = {"messages": [*said("a"), {"role": "assistant", "content": None, "tool_calls": [call]}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    tokenizer = with_template("llama3")
    got = formats.tokenize_chats(sources.load_rows(tmp_path / "a.jsonl"), tokenizer, READING)
    assert '{"a": null}' in tokenizer.decode(got.tokens.tolist())


def test_tokenize_table_equals_list(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": text, "completion": text, "more": 1} for text in TEXTS * 3]
    want = formats.tokenize_completions(rows, TINY, READING)
    monkeypatch.setattr(formats, "_TOKENIZE_BATCH_SIZE", 5)
    table = datasets.Dataset.from_list(rows)
    for given in (rows, table):
        assert formats.tokenize_completions(given, TINY, READING).fingerprint == want.fingerprint
    other = formats.tokenize_completions(rows, TINY, READING, train_on="all")
    assert other.fingerprint != want.fingerprint
    renamed = table.rename_column("prompt", "question")
    reading = TokenizeConfig(max_seq_length=400, columns={"prompt": "question"})
    assert formats.tokenize_completions(renamed, TINY, reading).fingerprint == want.fingerprint


def test_tokenize_chats_table_equals_list() -> None:
    calls = [{"function": {"name": "f", "arguments": {"city": "Zürich"}}}]
    other = [{"function": {"name": "f", "arguments": {"degrees": 3}}}]
    rows = [
        {"messages": [*said("a"), {"role": "assistant", "content": None, "tool_calls": made}]}
        for made in (calls, other)
    ] + [{"messages": said("a", "b")}]
    want = formats.tokenize_chats(rows, with_template("llama3"), READING)
    table = datasets.Dataset.from_list(rows)
    got = formats.tokenize_chats(table, with_template("llama3"), READING)
    assert got.fingerprint == want.fingerprint


@pytest.mark.parametrize(
    ("form", "row", "columns", "message"),
    [
        ("completion", {"prompt": "a", "answer": "b"}, {}, "has no column completion, only prom"),
        (
            "completion",
            {"prompt": "a"},
            {"completion": "out"},
            "has no column out, only prompt. Map",
        ),
        ("completion", {"prompt": "a", "answer": "b"}, {}, "use `columns: {completion: answer}`"),
        ("text", {"text": "a"}, {"txt": "a"}, "contains txt, which the format does not have"),
        ("text", {"text": None}, {}, r"train.jsonl, row 1: text=None must be a string"),
        (
            "completion",
            {"prompt": "a", "completion": 3},
            {},
            "row 1: completion=3 must be a string",
        ),
        ("chat", {"messages": "a"}, {}, "train.jsonl, row 1 must be a list of messages, got 'a'"),
        ("chat", {"messages": said("a"), "tools": "{"}, {}, "row 1: tools is not valid JSON"),
        ("chat", {"messages": said("a"), "tools": ["{"]}, {}, "row 1: tools is not valid JSON"),
        (
            "chat",
            {"messages": said("a"), "tools": {"name": "f"}},
            {},
            "row 1: tools={'na.* must",
        ),
        ("chat", {"messages": said("a"), "tools": "[3]"}, {}, r"row 1: tools=\[3\] must be a list"),
        ("preference", {"prompt": "a", "chosen": 1, "rejected": ""}, {}, "row 1: chosen=1 must be"),
        (
            "preference",
            {"prompt": said("a"), "chosen": "b", "rejected": "c"},
            {},
            r"row 1: prompt=\[.{1,60} must be a string. Use strings in all columns, or messages in",
        ),
        ("completion", {"prompt": said("a"), "completion": "b"}, {}, "with messages in all of the"),
    ],
)
def test_tokenize_invalid_rows_raise(
    form: str, row: dict[str, Any], columns: dict[str, str], message: str
) -> None:
    good: dict[str, Any] = {
        "completion": {"prompt": "a", "completion": "b"},
        "text": {"text": "a"},
        "chat": {"messages": said("a", "b")},
        "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    }
    first = (
        row
        if columns or "answer" in row
        else good[form] | ({"tools": None} if "tools" in row else {})
    )
    reading = TokenizeConfig(max_seq_length=400, data_name="train.jsonl", columns=columns)
    with pytest.raises(ValueError, match=message):
        formats.FORMATS[form]([first, row], TINY, reading)


def test_preferences_form_is_of_first_answer() -> None:
    """Null is neither text nor messages."""
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(ValueError, match="row 0: chosen=None must be a string"):
        formats.tokenize_preferences([{**row, "chosen": None}, row], TINY, READING)
    chat = {"prompt": "a", "chosen": said("", "b")[1:], "rejected": said("", "c")[1:]}
    with pytest.raises(ValueError, match="row 1, chosen must be a list of messages, got 'b'"):
        formats.tokenize_preferences([chat, row], TINY, READING)
    with pytest.raises(ValueError, match=r"row 1: chosen=\[.* Use strings in all columns, or mess"):
        formats.tokenize_preferences([row, chat], TINY, READING)


def test_preferences_two_answer_messages_raise() -> None:
    row = {"prompt": said("a"), "chosen": said("b", "c"), "rejected": said("a", "d")}
    message = r"row 0: chosen must be one assistant message .* \['user', 'assistant'\]"
    with pytest.raises(ValueError, match=message):
        formats.tokenize_preferences([row], TINY, READING)


def test_tokenize_missing_eos_or_template_raises() -> None:
    without = TINY._replace(eos_token_id=None, chat_template=None)
    with pytest.raises(ValueError, match="has no eos token"):
        formats.tokenize_texts([{"text": "a"}], without, READING)
    with pytest.raises(ValueError, match="folder has no chat template"):
        formats.tokenize_chats([{"messages": said("a", "b")}], without, READING)


def test_tokenize_outside_vocabulary_raises() -> None:
    highest = max(ids(TEXTS[0]))
    rows = [{"text": "a"}, {"text": TEXTS[0]}]
    reading = TokenizeConfig(max_seq_length=400, vocab_size=highest, data_name="train.jsonl")
    with pytest.raises(ValueError, match=f"row 1: token {highest} is outside of the model's"):
        formats.tokenize_texts(rows, TINY, reading)
    formats.tokenize_texts(rows, TINY, TokenizeConfig(max_seq_length=400, vocab_size=highest + 1))


# Rows that are too long

LONG = "a" + " answers" * 9


def test_truncation_error_and_drop() -> None:
    rows = [{"text": "a"}, {"text": LONG}]
    size = len(ids(LONG)) + 2
    with pytest.raises(ValueError, match=rf"train.jsonl, row 1: {size} tokens are more"):
        formats.tokenize_texts(
            rows, TINY, TokenizeConfig(max_seq_length=size - 1, data_name="train.jsonl")
        )
    assert formats.tokenize_texts(rows, TINY, TokenizeConfig(max_seq_length=size)).num_examples == 2
    corpus = formats.tokenize_texts(
        rows, TINY, TokenizeConfig(max_seq_length=size - 1, truncation="drop")
    )
    assert (corpus.num_examples, corpus.stats.dropped, corpus.stats.rows) == (1, 1, 2)


def test_truncation_truncate_keeps_beginning() -> None:
    rows = [
        {"prompt": "a", "completion": LONG},
        {"prompt": LONG, "completion": "a"},
        {"prompt": "a", "completion": "a"},
    ]
    whole = formats.tokenize_completions(rows, TINY, READING)
    corpus = formats.tokenize_completions(
        rows, TINY, TokenizeConfig(max_seq_length=6, truncation="truncate")
    )
    counts = corpus.stats
    assert (counts.rows, counts.examples, counts.truncated, counts.truncated_to_nothing) == (
        3,
        2,
        1,
        1,
    )
    assert pieces(corpus, 0)[0] == pieces(whole, 0)[0][:6]
    assert pieces(corpus, 1) == pieces(whole, 2)
    pair = [{"prompt": "a", "chosen": LONG, "rejected": "b"}]
    cut = formats.tokenize_preferences(
        pair, TINY, TokenizeConfig(max_seq_length=6, truncation="truncate")
    )
    assert np.diff(cut.offsets).tolist() == [6, 4]


@pytest.mark.parametrize("length", [2, 3, 5, 8, 200])
def test_truncation_split_counts_tokens_once(length: int) -> None:
    rows = [{"text": text} for text in ("a", LONG, "b")]
    whole = formats.tokenize_texts(rows, TINY, READING)
    corpus = formats.tokenize_texts(
        rows, TINY, TokenizeConfig(max_seq_length=length, truncation="split")
    )
    assert corpus.tokens[corpus.loss_mask].tolist() == whole.tokens[whole.loss_mask].tolist()
    assert corpus.example_lengths().max() <= length
    assert corpus.example_lengths().min() >= 2
    # A chunk begins with the last token of the previous one, or with the start of a text.
    for number in range(1, corpus.num_examples):
        first, before = corpus.get_sequence(number)[0][0], corpus.get_sequence(number - 1)[0][-1]
        assert first == (BOS if before == EOS else before)


def test_stats_count_rows_without_loss_tokens() -> None:
    rows = [{"messages": said("a")}, {"messages": said("a", "b")}]
    corpus = formats.tokenize_chats(rows, TINY, READING)
    assert (corpus.num_examples, corpus.stats.without_loss_tokens) == (1, 1)
    with pytest.raises(
        ValueError, match=r"has no examples to train on: of 1 rows, 0 .* 1 have none at all"
    ):
        formats.tokenize_chats(rows[:1], TINY, READING)


def test_tokenize_invalid_options_raise() -> None:
    with pytest.raises(
        ValueError,
        match=r"TokenizeConfig.max_seq_length=1 .data.max_seq_length of a recipe. must be",
    ):
        TokenizeConfig(max_seq_length=1)
    wrong: Any = "cut"
    with pytest.raises(
        ValueError, match=r"TokenizeConfig.truncation='cut' must be one of error, drop"
    ):
        TokenizeConfig(max_seq_length=4, truncation=wrong)
    chats, train_on = [{"messages": said("a", "b")}], wrong
    with pytest.raises(ValueError, match="train_on='cut' must be one of assistant, last, all"):
        formats.tokenize_chats(chats, TINY, READING, train_on=train_on)
    texts = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(ValueError, match="train_on='cut' must be completion or all"):
        formats.tokenize_completions(texts, TINY, READING, train_on=train_on)


@pytest.mark.parametrize("form", sorted(formats.FORMATS.keys() - {"text"}))
def test_truncation_split_of_other_formats_raises(form: str) -> None:
    with pytest.raises(ValueError, match="data.truncation=split makes several examples of"):
        formats.FORMATS[form]([], TINY, TokenizeConfig(max_seq_length=4, truncation="split"))


def test_stats_and_dtypes_of_completions() -> None:
    rows = [{"prompt": text, "completion": text} for text in TEXTS]
    corpus = formats.tokenize_completions(rows, TINY, READING)
    assert corpus.stats == (4, 4, 0, 0, 0, 0, 0, len(corpus.tokens), corpus.loss_mask.sum())
    assert (corpus.tokens.dtype, corpus.loss_mask.dtype) == (np.int32, np.bool_)
    assert corpus.offsets.dtype == np.int64
