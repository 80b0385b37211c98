"""Speed of tokenization, planning and batching on the host.

The texts are docstrings and source files of Python's standard library; the tokenizer is a
byte-level BPE trained on some of them. Prints a table and writes JSON. Quickly:
`python -m benchmarks.speed.input_pipeline --tiny`; the committed figures:
`python -m benchmarks.speed.input_pipeline --output benchmarks/results/input_pipeline.json`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import json
import pathlib
import platform
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from jlora.training import data

Rows = list[dict[str, str]]
# Rows and length of a batch.
SHAPES = ((8, 1024), (2, 4096))
LONGEST = 1024


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        stage: Name of the stage.
        tokens: Tokens processed.
        seconds: Median of the repeats.
        tokens_per_s: Tokens per second at the median.
        filled: Fraction of the batches' positions with tokens; None for other stages.
    """

    stage: str
    tokens: int
    seconds: float
    tokens_per_s: int
    filled: float | None = None


def texts(files: int | None) -> Rows:
    """Returns docstrings and source files, each as a row."""
    found = []
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = (p for p in sorted(folder.rglob("*.py")) if "site-packages" not in p.parts)
    for path in itertools.islice(paths, files):
        try:
            source = path.read_text("utf-8")
            found += [{"text": text} for text in (source, *docstrings(source))]
        except (SyntaxError, UnicodeDecodeError):  # Test files with intentional errors.
            continue
    return found


def docstrings(source: str) -> Iterator[str]:
    """Yields the docstrings of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield from filter(None, [ast.get_docstring(node)])


def train_tokenizer(rows: Rows, vocabulary: int) -> data.Tokenizer:
    """Returns a tokenizer trained on the texts."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(rows, vocabulary, pathlib.Path(folder))
        return data.Tokenizer.from_folder(folder)


def write_tokenizer(rows: Rows, vocabulary: int, folder: pathlib.Path) -> None:
    """Writes the files of a tokenizer trained on the texts to an existing folder."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((row["text"] for row in rows[::10]), trainer)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')


def median_s(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Returns the median time of several runs, and the result of the last."""
    times, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def row(stage: str, tokens: int, seconds: float, filled: float | None = None) -> Row:
    """Returns a measurement with its rate."""
    return Row(stage, tokens, round(seconds, 4), round(tokens / seconds), filled)


def count_encoded_tokens(rows: Rows, tokenizer: data.Tokenizer) -> int:
    """Returns the tokens of the texts, encoded in the same batches as by the dataset."""
    words = [row["text"] for row in rows]
    parts = (words[start : start + 1000] for start in range(0, len(words), 1000))
    return sum(
        len(encoding)
        for part in parts
        for encoding in tokenizer.without_special_tokens.encode_batch_fast(part)
    )


def count_batch_tokens(stream: data.BatchStream) -> tuple[int, int]:
    """Returns the tokens and positions of an epoch's batches, prefetched as in training."""
    tokens = places = 0
    with data.prefetch(stream.batches(epochs=1), lambda item: item[1].arrays) as batches:
        for batch in batches:
            tokens += int(np.count_nonzero(batch.segment_ids))
            places += batch.segment_ids.size
    return tokens, places


def measure(rows: Rows, vocabulary: int, repeats: int) -> list[Row]:
    """Measures every stage."""
    tokenizer = train_tokenizer(rows, vocabulary)
    seconds, tokens = median_s(lambda: count_encoded_tokens(rows, tokenizer), repeats)
    found = [row("encode_batch_fast alone", tokens, seconds)]
    reading = data.TokenizeConfig(max_seq_length=LONGEST, truncation="split")
    table = datasets.Dataset.from_list(rows)
    seconds, dataset = median_s(lambda: data.tokenize_texts(table, tokenizer, reading), repeats)
    found.append(row("rows to a corpus", dataset.stats.tokens, seconds))
    for count, length in SHAPES:
        batching = data.BatchConfig(batch_size=count, seq_length=length)
        plan = lambda b=batching: data.plan_epoch([dataset.example_lengths()], b, seed=0, epoch=0)
        seconds, _ = median_s(plan, repeats)
        found.append(row(f"plan {count} x {length}", dataset.stats.tokens, seconds))
        stream = data.BatchStream([dataset], batching)
        seconds, (tokens, places) = median_s(lambda s=stream: count_batch_tokens(s), repeats)
        found.append(row(f"batches {count} x {length}", tokens, seconds, round(tokens / places, 4)))
    return found


def command(output: pathlib.Path) -> str:
    """Returns the command, with the name of the output file only."""
    words = [output.name if word == str(output) else word for word in sys.argv[1:]]
    return " ".join(["python -m benchmarks.speed.input_pipeline", *words])


def table(rows: list[Row]) -> str:
    """Returns the rows as text."""
    lines = [f"{'stage':26} {'tokens':>12} {'seconds':>9} {'tokens/s':>12} {'filled':>8}"]
    for each in rows:
        filled = "-" if each.filled is None else f"{each.filled:.2%}"
        lines.append(
            f"{each.stage:26} {each.tokens:12,} {each.seconds:9.4f} {each.tokens_per_s:12,} "
            f"{filled:>8}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures every stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tiny", action="store_true", help="a few files, in seconds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file to write")
    options = parser.parse_args()
    files, vocabulary = (20, 1000) if options.tiny else (None, 16_000)
    rows = texts(files)
    measured = measure(rows, vocabulary, options.repeats)
    device = platform.processor() or platform.machine()
    print(f"{len(rows):,} texts, {device}, numpy {np.__version__}")
    print(table(measured))
    if options.output:
        result = {
            "command": command(options.output),
            "device": device,
            "versions": {
                "python": sys.version.split()[0],
                "numpy": np.__version__,
                "tokenizers": tokenizers.__version__,
                "datasets": datasets.__version__,
            },
            "texts": len(rows),
            "vocabulary": vocabulary,
            "repeats": options.repeats,
            "rows": [dataclasses.asdict(each) for each in measured],
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
