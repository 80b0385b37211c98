"""A tiny base with a tokenizer, and recipes for it."""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
import tokenizers
from jax.experimental.compilation_cache import compilation_cache

DATA = pathlib.Path(__file__).parents[1] / "models" / "data"
LETTERS = " abcdefghijklmnopqrstuvwxyz.,:?!'-"
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<assistant>"]


def write_tokenizer(folder: pathlib.Path) -> None:
    """One token per letter, 39 in all."""
    vocab = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="-"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")  # type: ignore
    made.decoder = tokenizers.decoders.Fuse()  # type: ignore
    made.add_special_tokens(SPECIAL)
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    text = json.dumps({**config, "chat_template": TEMPLATE})
    (folder / "tokenizer_config.json").write_text(text)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A Llama of two layers whose vocabulary holds the tokenizer's."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    shutil.copytree(DATA / "decoders" / "llama", folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("base") / "bert"
    shutil.copytree(DATA / "encoders" / "bert", folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def no_cache() -> Iterator[None]:
    """Disables the compilation cache of the tests, as for a user who has not enabled one."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


ANIMALS = ["cat", "dog", "cow", "hen", "owl", "pig", "fox", "bee", "ant", "eel"]


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Twenty chats about animals."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    with path.open("w") as file:
        for verb in ("sees", "eats"):
            for animal in ANIMALS:
                messages = [
                    {"role": "user", "content": f"who {verb} the {animal}?"},
                    {"role": "assistant", "content": f"a {animal[::-1]} {verb} it."},
                ]
                file.write(json.dumps({"messages": messages}) + "\n")
    return path


Make = Callable[..., dict[str, Any]]


def make_recipe(
    folder: pathlib.Path, base: pathlib.Path, chats: pathlib.Path, **sections: Any
) -> dict[str, Any]:
    """A recipe as a mapping, with other sections merged into it."""
    raw: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"path": str(base), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4.0, "dropout": 0.1},
        "data": {"train": [{"path": str(chats), "format": "chat"}], "max_seq_length": 64},
        "batch": {"size": 2},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"steps": 6},
    }
    for name, value in sections.items():
        held = raw.get(name)
        raw[name] = {**held, **value} if isinstance(held, dict) else value
    return raw


@pytest.fixture
def recipe_of(base: pathlib.Path, chats: pathlib.Path, tmp_path: pathlib.Path) -> Make:
    return functools.partial(make_recipe, tmp_path, base, chats)
