"""Rows from files and the Hub, and errors for invalid files."""

from __future__ import annotations

import csv
import json
import os
import pathlib
import re
from collections.abc import Callable

import datasets
import pytest

from jlora.training.data import sources

ROWS = [{"text": f"row {number} é", "n": number} for number in range(7)]


def write(path: pathlib.Path, rows: list[dict] = ROWS) -> pathlib.Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def test_load_rows_every_file_kind(tmp_path: pathlib.Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.to_csv(str(tmp_path / "a.csv"))
    write(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    for suffix in ("parquet", "jsonl", "json"):
        assert sources.load_rows(tmp_path / f"a.{suffix}").to_list() == ROWS, suffix
    cells = [{column: str(value) for column, value in row.items()} for row in ROWS]
    assert sources.load_rows(tmp_path / "a.csv").to_list() == cells
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert sources.load_rows(tmp_path / "a.txt")["text"][:] == ["one", "two"]


@pytest.mark.parametrize("suffix", [".txt", ".parquet", ".csv", ".jsonl", ".json"])
def test_load_rows_reads_replaced_files(tmp_path: pathlib.Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    found, hashes = [], []
    for text in ("the first", "another"):
        if suffix == ".parquet":
            datasets.Dataset.from_list([{"text": text}]).to_parquet(str(path))
        else:
            row = json.dumps([{"text": text}] if suffix == ".json" else {"text": text})
            content = {".txt": text, ".csv": f"text\n{text}"}.get(suffix, row)
            path.write_text(content + "\n")
        os.utime(path, ns=(10**18, 10**18))  # As the files of a reproducible archive.
        found.append(sources.load_rows(path)["text"][:])
        hashes.append(sources.hash_local_files(path, "train"))
    assert found == [["the first"], ["another"]]
    assert hashes[0] != hashes[1]


def test_load_rows_text_lines(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n  two \n\x0cthree")
    want = ["one", "", "  two ", "\x0cthree"]
    assert sources.load_rows(tmp_path / "a.txt")["text"][:] == want
    assert sources.load_rows(tmp_path / "a.txt", split="train[2:3]")["text"][:] == ["  two "]


def test_load_rows_parquet_files_agree(tmp_path: pathlib.Path) -> None:
    labels = datasets.Features(
        {"t": datasets.Value("string"), "y": datasets.ClassLabel(names=["a", "b"])}
    )
    first = datasets.Dataset.from_dict({"t": ["x"], "y": [1]}, features=labels)
    first.to_parquet(str(tmp_path / "1.parquet"))
    # The order of columns and the width of integers may differ.
    datasets.Dataset.from_dict({"y": [0], "t": ["z"]}).to_parquet(str(tmp_path / "2.parquet"))
    rows = sources.load_rows(tmp_path)
    assert rows.to_list() == [{"t": "x", "y": 1}, {"t": "z", "y": 0}]
    assert rows.features["y"].names == ["a", "b"]
    datasets.Dataset.from_dict({"y": [0]}).to_parquet(str(tmp_path / "2.parquet"))
    with pytest.raises(ValueError, match=r"2\.parquet has the columns y, but .* has t, y"):
        sources.load_rows(tmp_path)
    datasets.Dataset.from_dict({"y": ["?"], "t": ["z"]}).to_parquet(str(tmp_path / "2.parquet"))
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        sources.load_rows(tmp_path)


def test_load_rows_skips_blank_lines(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('\n{"text": "one"}\n\n  \n{"text": "two"}')
    assert sources.load_rows(file)["text"][:] == ["one", "two"]


def test_load_rows_json_values_unchanged(tmp_path: pathlib.Path) -> None:
    """Arrow's reader would make dates of the first, and fill the fields of the last."""
    rows = [
        {"text": "2024-05-01", "n": 1, "x": 1, "messages": [{"role": "user"}], "none": None},
        {"text": "2024-05-02", "n": 2, "x": 0.5, "messages": [{"arguments": {"a": None}}]},
        {"text": "2024-05-03", "n": 3, "messages": [{"arguments": {"a": "\U0001f642"}}], "b": True},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("text", "n", "x", "messages", "none", "b")
    want = [{column: row.get(column) for column in columns} for row in rows]
    assert sources.load_rows(file).to_list() == want
    assert sources.load_rows(file, split="train[1:]").to_list() == want[1:]
    assert sources.load_rows(file, split="train[:34%]+train[-1:]").to_list() == [want[0], want[2]]


def test_load_rows_csv_cells_are_text(tmp_path: pathlib.Path) -> None:
    values = ["4,5", "7", "007", "1e5", "null", "NA", "None", "True", "", " x ", "a\nb", '"', "é"]
    values.append("long " * 50_000)
    for name, part in (("a-1.csv", values[:5]), ("a-2.csv", values[5:])):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file)
            writer.writerows([("prompt", "completion"), *((value, "1") for value in part)])
    before = csv.field_size_limit(1000)
    found = sources.load_rows(tmp_path)
    assert found.to_list() == [{"prompt": value, "completion": "1"} for value in values]
    assert sources.load_rows(tmp_path, split="train[1:2]")["prompt"][:] == ["7"]
    assert csv.field_size_limit(before) == 1000  # The reader's own is not left behind.
    (tmp_path / "a-2.csv").write_text("completion,prompt\n\nb,a\n")  # By name, without blank lines.
    assert sources.load_rows(tmp_path).to_list()[-1] == {"prompt": "a", "completion": "b"}
    (tmp_path / "a-2.csv").write_text("prompt,answer\na,b\n")
    with pytest.raises(ValueError, match=r"a-2\.csv has the columns prompt, answer, but .*a-1"):
        sources.load_rows(tmp_path)


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_load_rows_csv_other_separator_raises(separator: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.csv").write_text(f"prompt{separator}completion\na, b{separator}c\n")
    message = f"a.csv: the first line separates its columns by {separator!r}. Save the file with"
    with pytest.raises(ValueError, match=re.escape(message)):
        sources.load_rows(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text(f"text\na{separator}b\n")
    assert sources.load_rows(tmp_path / "a.csv").to_list() == [{"text": f"a{separator}b"}]


def make_dangling(path: pathlib.Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, make_dangling])
def test_load_rows_irregular_file_raises(
    make: Callable[[pathlib.Path], None], tmp_path: pathlib.Path
) -> None:
    # A dangling link is not left out, and a pipe that is opened would never answer.
    (tmp_path / "a.txt").write_text("one\n")
    make(tmp_path / "b.txt")
    for path in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(FileNotFoundError, match=r"b\.txt is (not a regular file|a link to no)"):
            sources.load_rows(path)


def test_load_rows_drops_byte_order_mark(tmp_path: pathlib.Path) -> None:
    texts = {
        "a.txt": "one\ntwo\n",
        "a.jsonl": '{"text": "one"}\n{"text": "two"}\n',
        "a.json": '[{"text": "one"}, {"text": "two"}]',
        "a.csv": "text\none\ntwo\n",
    }
    for name, content in texts.items():
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert sources.load_rows(tmp_path / name).to_list() == [{"text": "one"}, {"text": "two"}], (
            name
        )


def test_load_rows_train_in_a_file_name(tmp_path: pathlib.Path) -> None:
    for number, name in enumerate(("a", "b", "night-train")):
        write(tmp_path / f"{name}.jsonl", ROWS[number : number + 1])
    assert sources.load_rows(tmp_path).to_list() == ROWS[:3]
    with pytest.raises(ValueError, match="split='test': none of"):
        sources.load_rows(tmp_path, split="test")


def test_load_rows_split_words_in_all_names(tmp_path: pathlib.Path) -> None:
    for number, name in enumerate(("small_test", "small_train-1", "small_train-2")):
        write(tmp_path / f"{name}.jsonl", ROWS[number : number + 1])
    assert sources.load_rows(tmp_path).to_list() == ROWS[1:3]
    assert sources.load_rows(tmp_path, split="test").to_list() == ROWS[:1]


def test_load_rows_patterns_folders_and_slices(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "b-2.jsonl", ROWS[4:])
    write(tmp_path / "b-1.jsonl", ROWS[:4])
    assert sources.load_rows(tmp_path).to_list() == ROWS
    assert sources.load_rows(str(tmp_path / "b-*.jsonl")).to_list() == ROWS
    assert sources.load_rows(tmp_path, max_examples=5).to_list() == ROWS[:5]
    assert sources.load_rows(tmp_path, max_examples=500).to_list() == ROWS
    assert sources.load_rows(tmp_path, split="train[:2]").to_list() == ROWS[:2]
    write(tmp_path / "test-1.jsonl", ROWS[:1])
    write(tmp_path / "train.jsonl", ROWS[1:3])
    with pytest.warns(UserWarning, match=r"2 of 4 files have no split .* b-1.jsonl, b-2"):
        assert sources.load_rows(tmp_path).to_list() == ROWS[1:3]
    with pytest.warns(UserWarning, match=r"split='test' reads test-1.jsonl; 2 of 4"):
        assert sources.load_rows(tmp_path, split="test").to_list() == ROWS[:1]
    for name in ("b-1", "b-2"):
        (tmp_path / f"{name}.jsonl").unlink()
    assert sources.load_rows(tmp_path).to_list() == ROWS[1:3]


def test_load_rows_changed_file_is_reread(tmp_path: pathlib.Path) -> None:
    file = write(tmp_path / "a.jsonl")
    assert len(sources.load_rows(file)) == 7
    write(file, ROWS[:3])
    assert len(sources.load_rows(file)) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 2\n', r"a\.jsonl:2 is not JSON .*Correct or remove"),
        ("a.jsonl", b'{"a": 1}\n\n[1]\n', r"a\.jsonl:3 must be a JSON object, got list"),
        ("a.jsonl", b'{"a": NaN}\n', r"a\.jsonl:1 is not JSON \(NaN"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl:2 is not JSON .*utf-8"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not JSON"),
        ("a.json", b'[{"a": 1},\n{"a": }]', r"a\.json:2 is not JSON"),
        ("a.json", b'[{"a": 1},\n3]', r"a\.json: entry 1 must be a JSON object, got int"),
        ("a.json", b"[]", r"has no rows"),
        ("a.jsonl", b'{"a": "\\ud83d"}', r"a\.jsonl:1 is not JSON .*surrogates"),
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": "1"}',
            r"a\.jsonl:2, column 'a' contains text, but integers in earlier",
        ),
        (
            "a.jsonl",
            b'{"a": [1]}\n{"a": "1"}',
            r"contains text, but lists or objects in earlier rows",
        ),
        ("a.jsonl", b'{"a": 9223372036854775808}', r"a\.jsonl:1, column 'a': 92.* 64 bits"),
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.jsonl", b"\n \n", r"a\.jsonl is empty"),
        ("a.csv", b"", r"a\.csv is empty"),
        ("a.csv", b"\n\n", r"a\.csv is empty"),
        ("a.csv", b"a,b\n", r"has no rows"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv:3 has 1 cells, but the first line names 2 columns"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv:2 has 3 cells, .* quote text that contains commas"),
        ("a.csv", b"a;b\n1;2,3\n", r"a\.csv: the first line separates its columns by ';'"),
        ("a.csv", b"a,a\n1,2\n", r"a\.csv: the first line names columns twice: a, a"),
        ("a.csv", b'a\n"1\n', r"a\.csv:2 is not valid CSV \(unexpected end of data\)"),
        ("a.csv", b"a\n\xff\n", r"a\.csv is not UTF-8"),
        ("a.txt", b"\xef\xbb\xbf", r"a\.txt.*cannot be read as text"),
        ("a.parquet", b"PAR1 nothing", r"a\.parquet, split='train', cannot be read as parquet"),
        ("a.tsv", b"a", r"end in \.tsv.*Use files of one kind"),
        ("a", b"a", r"end in no suffix"),
    ],
)
def test_load_rows_invalid_file_names_line(
    name: str, content: bytes, message: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        sources.load_rows(tmp_path / name)


def test_load_rows_missing_path_raises(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, message in (
        (tmp_path / "a.jsonl", "neither a local file or folder"),
        ("data/a.jsonl", "neither a local file or folder"),
        (tmp_path / "*.jsonl", "matches no file"),
        (tmp_path, "contains no .jsonl"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            sources.load_rows(path)
    write(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"split='test': none of a\.jsonl"):
        sources.load_rows(tmp_path, split="test")
    with pytest.raises(ValueError, match=r"split='train\[:x\]' is not a slice of 'train'"):
        sources.load_rows(tmp_path, split="train[:x]")
    with pytest.raises(ValueError, match="revision='main' apply to datasets on the Hub"):
        sources.load_rows(tmp_path, revision="main")
    with pytest.raises(ValueError, match="max_examples=0 must be at least 1"):
        sources.load_rows(tmp_path, max_examples=0)
    write(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"end in \.jsonl, \.txt"):
        sources.load_rows(tmp_path)


def test_load_rows_hub_runs_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        calls.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert (
        sources.load_rows("owner/name", name="main", revision="v1", max_examples=2).to_list()
        == ROWS[:2]
    )
    assert calls == [(("owner/name",), {"name": "main", "split": "train", "revision": "v1"})]


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("x"), FileNotFoundError, "no dataset of that"),
        (ConnectionError("x"), OSError, r"cannot be reached \(ConnectionError\)"),
    ],
)
def test_load_rows_hub_unreachable_raises(
    raised: Exception, expected: type, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(expected, match=message):
        sources.load_rows("owner/name")
