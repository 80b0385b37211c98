"""Rows of examples, from files here or from the Hugging Face Hub."""

from __future__ import annotations

import glob
import itertools
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora.checkpoints.safetensors_io import format_names
from jlora.training.data.readers import read_csv_table, read_json_table

if TYPE_CHECKING:
    import datasets

# What datasets calls the reader of each kind of file.
_READER_BY_SUFFIX = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}

_HUB_NAME_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

# Words in a file's name that say which split it holds.
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
    """The rows of a file, of a folder's files, or of a data set on the Hub.

    Lines of JSON are checked before they are read, blank ones left out. Every cell of a .csv file
    is text, as it stands there. A line of a .txt file is a row with the column `text`.

    Args:
        path: A .jsonl, .json, .parquet, .csv or .txt file, a pattern with `*` that finds some, a
            folder of them, or `owner/name` on the Hub. Of a folder whose files are named after
            splits, such as train.jsonl or train-00000-of-00002.parquet, those of the split are
            taken, and a warning counts the files of none; of another folder all for "train".
        split: "train", "validation", "test" or another of the Hub's; a slice such as
            "train[:95%]" takes a part.
        name: Which configuration of the Hub's data set.
        revision: Of the Hub's: a branch, tag or commit.
        max_examples: How many rows are taken at most, the first ones.

    Raises:
        FileNotFoundError: There is no such file, folder or data set.
        OSError: The Hub cannot be reached.
        ValueError: A line is no JSON object, files are of several kinds, there is no such split,
            or there are no rows.
    """
    if max_examples is not None and max_examples < 1:
        raise ValueError(
            f"limit={max_examples} leaves no rows. Give a positive count, or None for all."
        )
    if not _is_local_path(path) and _HUB_NAME_PATTERN.fullmatch(str(path)):
        found = _load_hub_dataset(str(path), split, name, revision)
    else:
        if name is not None or revision is not None:
            raise ValueError(
                f"name={name!r} and revision={revision!r} choose among the Hub's versions of a "
                f"data set, and {str(path)!r} is here. Leave them out."
            )
        found = _load_data_files(_find_data_files(path, split), split)
    if not len(found):
        raise ValueError(f"{path}, split={split!r}, holds no rows. Give data with at least one.")
    return found if max_examples is None else found.select(range(min(max_examples, len(found))))


def _is_local_path(path: str | os.PathLike[str]) -> bool:
    return (
        os.path.exists(path) or glob.has_magic(str(path)) or Path(path).suffix in _READER_BY_SUFFIX
    )


def _find_data_files(path: str | os.PathLike[str], split: str) -> list[Path]:
    """The data files meant, in the order of their names."""
    if glob.has_magic(str(path)) and not os.path.exists(path):
        files = sorted(Path(file) for file in glob.glob(str(path), recursive=True))
        if not files:
            raise FileNotFoundError(f"path={str(path)!r} finds no file. Check the pattern.")
        return files
    path = Path(path)
    if path.is_dir():
        return _select_split_files(path, split)
    if not path.is_file():
        raise FileNotFoundError(
            f"path={str(path)!r} is no file or folder here, and no `owner/name` of a data set on "
            f"the Hub. Check the name."
        )
    return [path]


def _select_split_files(folder: Path, split: str) -> list[Path]:
    """The files of a folder that hold the split, by their names."""
    files = sorted(file for file in folder.iterdir() if file.suffix in _READER_BY_SUFFIX)
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no {', '.join(_READER_BY_SUFFIX)} file. Give the folder that does."
        )
    base = split.split("[")[0]
    words = _split_words_in_names(files, base)
    if base == "train" and not any(words):
        return files
    wanted = {*_SPLIT_WORDS.get(base, ()), base}
    chosen = [file for file, named in zip(files, words, strict=True) if named & wanted]
    if not chosen:
        raise ValueError(
            f"split={split!r}: none of {format_names([file.name for file in files])} in {folder} carries "
            f"that name. Give one of the files."
        )
    others = [file.name for file, named in zip(files, words, strict=True) if not named]
    if others:
        warnings.warn(
            f"{folder}: split={split!r} takes {format_names([file.name for file in chosen])}, and "
            f"{len(others)} of {len(files)} files are of no split and not read: {format_names(others)}. "
            f"Give the pattern {str(folder / '*')!r} to read them all.",
            stacklevel=4,
        )
    return chosen


def _split_words_in_names(files: list[Path], split_name: str) -> list[set[str]]:
    """Of each file the words that say which split it holds; none where a folder has no such names.

    The first word of a name tells, as in train-00000-of-00002. Other words do where all files have
    one, as in small_train and small_test: night-train beside other files is a name like theirs.
    """
    known = {word for words in _SPLIT_WORDS.values() for word in words} | {split_name}
    parts = [re.split(r"[-_.]", file.stem.lower()) for file in files]
    firsts = [known & {names[0]} for names in parts]
    anywhere = [known & set(names) for names in parts]
    return anywhere if not any(firsts) and all(anywhere) else firsts


def _load_data_files(files: list[Path], split: str) -> datasets.Dataset:
    import datasets
    from datasets import exceptions

    kinds = sorted({file.suffix for file in files})
    readers = {_READER_BY_SUFFIX.get(kind) for kind in kinds}
    if len(readers) > 1 or None in readers:
        raise ValueError(
            f"The files end in {', '.join(kind or 'no suffix' for kind in kinds)}: "
            f"{format_names([str(file) for file in files])}. Give files of one kind, of "
            f"{', '.join(_READER_BY_SUFFIX)}."
        )
    (reader,) = readers
    for file in files:
        if not file.stat().st_size:
            raise ValueError(f"{file} is empty. Give a file with at least one row.")
    base = split.split("[")[0]
    if reader == "json":
        return _slice_split(datasets.Dataset(read_json_table(files)), base, split)
    if reader == "csv":
        # What the info says is how labels that are numbers are told from text.
        info = datasets.DatasetInfo(builder_name="csv")
        return _slice_split(datasets.Dataset(read_csv_table(files), info=info), base, split)
    # Some editors begin a text with a byte order mark, which is no part of it.
    options: dict[str, Any] = {"encoding": "utf-8-sig"} if reader == "text" else {}
    try:
        return datasets.load_dataset(
            str(reader), data_files={base: [str(file) for file in files]}, split=split, **options
        )
    except (ValueError, StopIteration, exceptions.DatasetGenerationError) as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"{format_names([str(file) for file in files])}, split={split!r}, gives no rows as {reader} "
            f"({reason}). Give rows of the same columns, and every column one type."
        ) from error


def _slice_split(dataset: datasets.Dataset, split_name: str, split: str) -> datasets.Dataset:
    """The rows that a split such as "train[:95%]" means."""
    from datasets import ReadInstruction

    if split == split_name:
        return dataset
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({split_name: len(dataset)})
    except ValueError as error:
        raise ValueError(
            f"split={split!r} is no part of {split_name!r} ({error}). Write one such as '{split_name}[:95%]'."
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
            f"{path!r} is no file or folder here, and the Hub has no data set of that name that "
            f"you may read. Check the name, or log in with `hf auth login`."
        ) from error
    except OSError as error:
        raise OSError(
            f"{path!r} is no file or folder here and not in the Hub's cache, and the Hub cannot be "
            f"reached ({type(error).__name__}). Fetch it where there is a network, and give its "
            f"folder."
        ) from error
