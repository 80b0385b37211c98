"""Data and bases of the recipes without downloads, from Python's standard library.

    python examples/prepare_data.py quickstart   # for jlora train examples/recipes/quickstart.yaml
    python examples/prepare_data.py rank-search  # for jlora rank-search, rank-search.yaml
    python examples/prepare_data.py docstrings   # for jlora train examples/recipes/stdlib-base.yaml

`quickstart` writes labeled docstrings, and a link to all-MiniLM-L6-v2 in its Python package.
`rank-search` does the same, with a fifth of the training texts for validation.

`docstrings` writes the library's source as plain text and pairs of signature and docstring, trains
a tokenizer on the text, and writes a small decoder with random weights, which stdlib-base.yaml
trains on the source and docstrings.yaml on docstrings.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
import tokenizers
from flax import linen as nn
from flax import traverse_util

from jlora.models import Decoder, checkpoint_mapping, make_tensor_getter, model_from_config

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}
SPECIAL = ("<s>", "</s>", "<pad>")


# --- quickstart -----------------------------------------------------------------------------------


def prepare_quickstart(folder: Path) -> None:
    """Writes train.jsonl and test.jsonl, and a link to the base."""
    for split, rows in load_labeled_rows().items():
        write_lines(folder / f"{split}.jsonl", iter(rows))
    link_base(folder)


def prepare_rank_search(folder: Path) -> None:
    """Writes the same files, with part of train.jsonl in validation.jsonl."""
    splits = load_labeled_rows()
    in_validation = [is_validation(row["text"]) for row in splits["train"]]
    pairs = list(zip(splits["train"], in_validation, strict=True))
    for split, wanted in (("train", False), ("validation", True)):
        rows = (row for row, is_validation_row in pairs if is_validation_row == wanted)
        write_lines(folder / f"{split}.jsonl", rows)
    write_lines(folder / "test.jsonl", iter(splits["test"]))
    link_base(folder)


def load_labeled_rows() -> dict[str, list[dict[str, str]]]:
    """Returns the rows of train and test: docstrings and their packages."""
    from examples import quickstart

    found = {}
    texts = quickstart.load_texts()
    for split in ("train", "test"):
        names = texts[split].features["label"].names
        both = zip(texts[split]["text"], texts[split]["label"], strict=True)
        found[split] = [{"text": text, "label": names[label]} for text, label in both]
    return found


def is_validation(text: str) -> bool:
    """Returns True for the validation texts, one training text in five, chosen by hash.

    Uses another byte of the hash than the split into train and test.
    """
    return hashlib.sha256(text.encode()).digest()[1] < 256 // 5


def link_base(folder: Path) -> None:
    """Writes a link to all-MiniLM-L6-v2."""
    from examples import quickstart

    (folder / "base").symlink_to(quickstart.find_checkpoint().absolute())


# --- docstrings -----------------------------------------------------------------------------------


class Function(NamedTuple):
    """Documented function or class of the standard library.

    Attributes:
        module: Path of its file, relative to the library's root.
        signature: Text `def name(arguments):` or `class Name(bases):`.
        doc: First paragraph of the docstring.
    """

    module: str
    signature: str
    doc: str


def prepare_docstrings(folder: Path) -> None:
    """Writes the texts, the pairs, the tokenizer and the base model."""
    sources = dict(iter_library())
    test_paths = {path for path in sources if is_held_out(path)}
    write_lines(
        folder / "source.jsonl",
        ({"text": text} for path, text in sources.items() if path not in test_paths),
    )
    pairs = [function for path, text in sources.items() for function in iter_functions(path, text)]
    for split in ("train", "test"):
        chosen = (f for f in pairs if (f.module in test_paths) == (split == "test"))
        write_lines(
            folder / f"{split}.jsonl",
            ({"prompt": f'{f.signature}\n    """', "completion": f'{f.doc}"""'} for f in chosen),
        )
    base = folder / "base"
    base.mkdir()
    train_tokenizer((text for path, text in sources.items() if path not in test_paths), base)
    write_random_model(base)


def iter_library() -> Iterator[tuple[str, str]]:
    """Yields the path and text of each file of the standard library, without tests."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "lib2to3", "encodings", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        within = path.relative_to(root)
        if skipped.isdisjoint(within.parts):
            yield within.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def is_held_out(path: str) -> bool:
    """Returns True for the test files, one in ten, chosen by the hash of the path."""
    return hashlib.sha256(path.encode()).digest()[0] < 256 // 10


def iter_functions(path: str, text: str) -> Iterator[Function]:
    """Yields the documented functions and classes of a file."""
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
        tree = ast.parse(text)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        doc = ast.get_docstring(node)
        if not doc or '"""' in doc:
            continue
        first = " ".join(inspect.cleandoc(doc).partition("\n\n")[0].split())
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            signature = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
        else:
            signature = f"def {node.name}({ast.unparse(node.args)}):"
        if len(first.split()) >= 3 and len(signature) + len(first) < 600:
            yield Function(path, signature, first)


def train_tokenizer(texts: Iterator[str], folder: Path) -> None:
    """Trains and writes a byte-level BPE tokenizer."""
    tokenizer = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    tokenizer.train_from_iterator(
        texts, vocab_size=CONFIG["vocab_size"], special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_random_model(folder: Path) -> None:
    """Writes a decoder with random weights as a Hugging Face folder."""
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    model = model_from_config(folder)
    assert isinstance(model, Decoder)
    tokens = np.zeros((1, 2), np.int32)
    variables = nn.unbox(model.init(jax.random.key(0), tokens))
    flat = traverse_util.flatten_dict(variables, sep="/")
    weights = checkpoint_mapping(model)[0]
    make = make_tensor_getter(weights, flat)
    tensors = {p.key: np.ascontiguousarray(make(p.key)) for w in weights.values() for p in w.slices}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_lines(path: Path, rows: Iterator[dict[str, str]]) -> None:
    """Writes one line of JSON per row."""
    with path.open("w", encoding="utf-8") as file:
        count = sum(bool(file.write(json.dumps(row) + "\n")) for row in rows)
    print(f"{path.name}: {count:,} rows")


DATASETS = {
    "quickstart": prepare_quickstart,
    "rank-search": prepare_rank_search,
    "docstrings": prepare_docstrings,
}


def main() -> None:
    """Runs the example with the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=list(DATASETS))
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="by default {name}-data")
    options = parser.parse_args()
    folder = options.output or Path(f"{options.name}-data")
    if folder.exists():
        print(f"{folder} already exists and is not overwritten.")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In a temporary folder first, so that an interruption leaves no partial data.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".preparing-") as temporary:
        complete = Path(temporary) / folder.name
        complete.mkdir()
        DATASETS[options.name](complete)
        complete.rename(folder)
    print(f"The data is in {folder}/.")


if __name__ == "__main__":
    main()
