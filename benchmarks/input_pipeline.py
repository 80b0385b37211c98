"""How fast texts become tokens, plans and batches on the host.

The texts are the docstrings and the source files of Python's standard library, the tokenizer a
byte-level BPE trained on some of them. Prints a table and writes JSON. Quickly:
`python benchmarks/input_pipeline.py --tiny`; the committed figures:
`python benchmarks/input_pipeline.py --output benchmarks/results/input_pipeline.json`.
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
        tokens: That the stage went through.
        seconds: The median over the repeats.
        tokens_per_s: At the median.
        filled: Which share of the batches' places are tokens; None where there are none.
    """

    stage: str
    tokens: int
    seconds: float
    tokens_per_s: int
    filled: float | None = None


def texts(files: int | None) -> Rows:
    """Docstrings and whole files, each a row."""
    found = []
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = (p for p in sorted(folder.rglob("*.py")) if "site-packages" not in p.parts)
    for path in itertools.islice(paths, files):
        try:
            source = path.read_text("utf-8")
            found += [{"text": text} for text in (source, *docstrings(source))]
        except (SyntaxError, UnicodeDecodeError):  # Some are there to be wrong.
            continue
    return found


def docstrings(source: str) -> Iterator[str]:
    """What the modules, classes and functions of a file say of themselves."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield from filter(None, [ast.get_docstring(node)])


def trained(rows: Rows, vocabulary: int) -> data.Tokenizer:
    """A tokenizer of such texts."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator((row["text"] for row in rows[::10]), trainer)
    with tempfile.TemporaryDirectory() as folder:
        made.save(f"{folder}/tokenizer.json")
        config = pathlib.Path(folder) / "tokenizer_config.json"
        config.write_text('{"eos_token": "</s>"}')
        return data.Tokenizer.from_folder(folder)


def median_s(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The median time of several runs, and what the last returned."""
    times, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def row(stage: str, tokens: int, seconds: float, filled: float | None = None) -> Row:
    """A measurement with its rate."""
    return Row(stage, tokens, round(seconds, 4), round(tokens / seconds), filled)


def encoded(rows: Rows, tokenizer: data.Tokenizer) -> int:
    """How many tokens the library makes of the texts, when asked for them as the corpus asks."""
    words = [row["text"] for row in rows]
    parts = (words[start : start + 1000] for start in range(0, len(words), 1000))
    return sum(
        len(made)
        for part in parts
        for made in tokenizer.without_special_tokens.encode_batch_fast(part)
    )


def made(stream: data.BatchStream) -> tuple[int, int]:
    """The tokens and the places of an epoch's batches, made ahead as a trainer has them made."""
    tokens = places = 0
    with data.prefetch(stream.batches(epochs=1), lambda item: item[1].arrays) as batches:
        for batch in batches:
            tokens += int(np.count_nonzero(batch.segments))
            places += batch.segments.size
    return tokens, places


def measure(rows: Rows, vocabulary: int, repeats: int) -> list[Row]:
    """Every stage, one after the other."""
    tokenizer = trained(rows, vocabulary)
    seconds, tokens = median_s(lambda: encoded(rows, tokenizer), repeats)
    found = [row("encode_batch_fast alone", tokens, seconds)]
    reading = data.TokenizeConfig(max_seq_length=LONGEST, truncation="split")
    table = datasets.Dataset.from_list(rows)
    seconds, corpus = median_s(lambda: data.tokenize_texts(table, tokenizer, reading), repeats)
    found.append(row("rows to a corpus", corpus.report.tokens, seconds))
    for count, length in SHAPES:
        batching = data.BatchConfig(batch_size=count, seq_length=length)
        plan = lambda b=batching: data.plan_epoch([corpus.lengths()], b, seed=0, epoch=0)
        seconds, _ = median_s(plan, repeats)
        found.append(row(f"plan {count} x {length}", corpus.report.tokens, seconds))
        stream = data.BatchStream([corpus], batching)
        seconds, (tokens, places) = median_s(lambda s=stream: made(s), repeats)
        found.append(row(f"batches {count} x {length}", tokens, seconds, round(tokens / places, 4)))
    return found


def command(output: pathlib.Path) -> str:
    """How the program was called; of where it wrote, the file's name only."""
    words = [output.name if word == str(output) else word for word in sys.argv[1:]]
    return " ".join(["python benchmarks/input_pipeline.py", *words])


def table(rows: list[Row]) -> str:
    """The rows as text."""
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
