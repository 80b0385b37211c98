"""Data sources: local files, folders and patterns, and datasets on the Hugging Face Hub."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from jlora.checkpoints.safetensors_io import format_names
from jlora.checkpoints.text_files import check_regular_file
from jlora.training.data.readers import (
    read_csv_table,
    read_json_table,
    read_parquet_table,
    read_text_table,
)

if TYPE_CHECKING:
    import datasets

_READER_BY_SUFFIX = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}

_HUB_NAME_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

# Words in a file's name that identify its split.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "eval"),
}


def load_rows(
    path: str | os.PathLike[str],
    *,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    max_examples: int | None = None,
) -> datasets.Dataset:
    r"""Returns the rows of a file, of a folder's files, or of a dataset on the Hub.

    Lines of JSON are validated, and blank ones skipped. Every cell of a .csv file is its text. A
    line of a .txt file is a row with the column `text`.

    Args:
        path: A .jsonl, .json, .parquet, .csv or .txt file, a pattern with `*`, a folder of such
            files, or `owner/name` on the Hub. In a folder whose file names contain splits, such
            as train.jsonl or train-00000-of-00002.parquet, the files of the split are read, and a
            warning lists files without one; in other folders, all files are "train".
        split: "train", "validation", "test" or another split of the Hub's dataset; a slice such
            as "train[:95%]" selects a part.
        name: Configuration of the Hub's dataset.
        revision: Branch, tag or commit on the Hub.
        max_examples: Maximum number of rows, the first ones; None: all.

    Raises:
        FileNotFoundError: If there is no such file, folder or dataset.
        OSError: If the Hub cannot be reached.
        ValueError: If a line is not a JSON object, files are of several kinds, there is no such
            split, or there are no rows.

    Example:
        >>> import pathlib, tempfile
        >>> from jlora.training import data
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "train.csv"
        ...     _ = file.write_text("text,label\nyes,1\nno,0\n")
        ...     data.load_rows(file, max_examples=1).to_list()
        [{'text': 'yes', 'label': '1'}]
    """
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples={max_examples} must be at least 1, or None for all rows.")
    if not _is_local_path(path) and _HUB_NAME_PATTERN.fullmatch(str(path)):
        rows = _load_hub_dataset(str(path), split, name, revision)
    else:
        if name is not None or revision is not None:
            raise ValueError(
                f"name={name!r} and revision={revision!r} apply to datasets on the Hub, but "
                f"{str(path)!r} is local. Leave them out."
            )
        rows = _load_data_files(_find_data_files(path, split), split)
    if not len(rows):
        raise ValueError(f"{path}, split={split!r}, has no rows. Use data with at least one row.")
    return rows if max_examples is None else rows.select(range(min(max_examples, len(rows))))


def hash_local_files(path: str | os.PathLike[str], split: str) -> str | None:
    """Returns the SHA-256 of the names and bytes of the files that `load_rows` reads.

    None for a dataset on the Hub, which has revisions.

    Args:
        path: As in `load_rows`.
        split: As in `load_rows`.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: No file belongs to the split.
    """
    if not _is_local_path(path) and _HUB_NAME_PATTERN.fullmatch(str(path)):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `load_rows` gives them.
        files = _find_data_files(path, split)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            part = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file} {part}\n".encode())
    return digest.hexdigest()


def _is_local_path(path: str | os.PathLike[str]) -> bool:
    return (
        os.path.exists(path) or glob.has_magic(str(path)) or Path(path).suffix in _READER_BY_SUFFIX
    )


def _find_data_files(path: str | os.PathLike[str], split: str) -> list[Path]:
    """Returns the data files of a path, sorted by name.

    Raises:
        FileNotFoundError: There is none, or one is not a regular file.
        ValueError: No file belongs to the split.
    """
    files = _match_data_files(path, split)
    for file in files:
        check_regular_file(file)  # A pipe that is opened would never answer.
    return files


def _match_data_files(path: str | os.PathLike[str], split: str) -> list[Path]:
    if glob.has_magic(str(path)) and not os.path.exists(path):
        files = sorted(Path(file) for file in glob.glob(str(path), recursive=True))
        if not files:
            raise FileNotFoundError(f"path={str(path)!r} matches no file. Check the pattern.")
        return files
    path = Path(path)
    if path.is_dir():
        return _select_split_files(path, split)
    if not os.path.lexists(path):
        raise FileNotFoundError(
            f"path={str(path)!r} is neither a local file or folder nor an `owner/name` on the Hub. "
            f"Check the name."
        )
    return [path]


def _select_split_files(folder: Path, split: str) -> list[Path]:
    """Returns the files of a folder whose names belong to the split."""
    files = sorted(file for file in folder.iterdir() if file.suffix in _READER_BY_SUFFIX)
    if not files:
        raise FileNotFoundError(
            f"{folder} contains no {', '.join(_READER_BY_SUFFIX)} file. Use the folder with the "
            f"data."
        )
    base = split.split("[")[0]
    words_by_file = _split_words_in_names(files, base)
    if base == "train" and not any(words_by_file):
        return files
    split_words = {*_SPLIT_WORDS.get(base, ()), base}
    pairs = list(zip(files, words_by_file, strict=True))
    chosen = [file for file, words in pairs if words & split_words]
    if not chosen:
        raise ValueError(
            f"split={split!r}: none of {format_names([file.name for file in files])} in {folder} "
            f"has that split in its name. Use the path of one of the files."
        )
    others = [file.name for file, words in pairs if not words]
    if others:
        warnings.warn(
            f"{folder}: split={split!r} reads {format_names([file.name for file in chosen])}; "
            f"{len(others)} of {len(files)} files have no split in their names and are skipped: "
            f"{format_names(others)}. Use the pattern {str(folder / '*')!r} to read all files.",
            stacklevel=4,
        )
    return chosen


def _split_words_in_names(files: list[Path], split_name: str) -> list[set[str]]:
    """Returns the split words in each file's name.

    Only the first word of a name counts, as in train-00000-of-00002. Later words count if every
    file has one, as in small_train and small_test: night-train beside other files is not a split.
    """
    known = {word for words in _SPLIT_WORDS.values() for word in words} | {split_name}
    parts = [re.split(r"[-_.]", file.stem.lower()) for file in files]
    firsts = [known & {names[0]} for names in parts]
    anywhere = [known & set(names) for names in parts]
    return anywhere if not any(firsts) and all(anywhere) else firsts


def _load_data_files(files: list[Path], split: str) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    kinds = sorted({file.suffix for file in files})
    readers = {_READER_BY_SUFFIX.get(kind) for kind in kinds}
    if len(readers) > 1 or None in readers:
        raise ValueError(
            f"The files end in {', '.join(kind or 'no suffix' for kind in kinds)}: "
            f"{format_names([str(file) for file in files])}. Use files of one kind, of "
            f"{', '.join(_READER_BY_SUFFIX)}."
        )
    (reader,) = readers
    for file in files:
        if not file.stat().st_size:
            raise ValueError(f"{file} is empty. Use a file with at least one row.")
    base = split.split("[")[0]
    if reader == "json":
        return _slice_split(datasets.Dataset(read_json_table(files)), base, split)
    if reader in ("text", "parquet"):
        read = read_text_table if reader == "text" else read_parquet_table
        try:
            dataset = datasets.Dataset(read(files))
        except (ValueError, OSError, pa.ArrowException) as error:
            raise ValueError(
                f"{format_names([str(file) for file in files])}, split={split!r}, cannot be read "
                f"as {reader} ({error}). Use rows with the same columns, and one type per column."
            ) from error
        return _slice_split(dataset, base, split)
    # The builder's name marks tables without types, whose numeric labels are parsed.
    info = datasets.DatasetInfo(builder_name="csv")
    return _slice_split(datasets.Dataset(read_csv_table(files), info=info), base, split)


def _slice_split(dataset: datasets.Dataset, split_name: str, split: str) -> datasets.Dataset:
    """Returns the rows of a split such as "train[:95%]"."""
    from datasets import ReadInstruction

    if split == split_name:
        return dataset
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({split_name: len(dataset)})
    except ValueError as error:
        raise ValueError(
            f"split={split!r} is not a slice of {split_name!r} ({error}). Use one such as "
            f"'{split_name}[:95%]'."
        ) from error
    chosen = [range(len(dataset))[part.from_ : part.to] for part in parts]
    return dataset.select(itertools.chain(*chosen))


def _load_hub_dataset(
    path: str, split: str, name: str | None, revision: str | None
) -> datasets.Dataset:
    import datasets
    from datasets import exceptions

    try:
        return datasets.load_dataset(path, name=name, split=split, revision=revision)
    except exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"{path!r} is not a local file or folder, and the Hub has no dataset of that name that "
            f"you may read. Check the name, or log in with `hf auth login`."
        ) from error
    except OSError as error:
        raise OSError(
            f"{path!r} is not a local file or folder and not in the Hub's cache, and the Hub "
            f"cannot be reached ({type(error).__name__}). Download it on a machine with network "
            f"access, and use its folder."
        ) from error
