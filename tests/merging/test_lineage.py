"""Content hashes and lineages of adapter files."""

from __future__ import annotations

import dataclasses
import json
import struct
import types
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from _support.deltas import bias, lora

import jlora
from jlora.checkpoints.adapter_file import (
    adapted_weight_paths,
    load_adapter,
    read_lineage,
    save_adapter,
)
from jlora.checkpoints.lineage import Lineage, ParentAdapter, content_hash
from jlora.cli.checkpoint_contents import inspect_path

PARAMS = {"w": jnp.arange(30.0).reshape(6, 5), "b": jnp.arange(5.0)}
ADAPTER = {"w": lora("plain", 1), "b": bias(2)}
HASH = content_hash(ADAPTER)
LINEAGE = Lineage(
    parents=(ParentAdapter("one.safetensors", HASH, 1.0), ParentAdapter("two", "0" * 64, -0.5)),
    method="TIES(density=0.2), rank=4",
    recipe={"model": {"path": "base"}, "data": {"train": [{"path": "x.jsonl"}]}, "seed": 3},
)


def metadata_of(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])["__metadata__"]


def rewritten(path: Path, without: tuple[str, ...] = (), **changes: str) -> None:
    """The file with other metadata, as another program might write it."""
    metadata = {k: v for k, v in metadata_of(path).items() if k not in without} | changes
    path.write_bytes(safetensors.numpy.save(safetensors.numpy.load_file(path), metadata))


def test_law_content_hash_survives_save_and_load(tmp_path: Path) -> None:
    narrow = dataclasses.replace(ADAPTER["w"], a=jnp.asarray(ADAPTER["w"].a, jnp.bfloat16))
    for adapter in (ADAPTER, {"w": narrow}):
        path = tmp_path / "adapter.safetensors"
        save_adapter(path, adapter, PARAMS)
        assert content_hash(load_adapter(path, PARAMS)) == content_hash(adapter)
        assert metadata_of(path)["content"] == content_hash(adapter)


def test_content_hash_ignores_only_order() -> None:
    leaf = ADAPTER["w"]
    assert content_hash(dict(reversed(ADAPTER.items()))) == HASH
    a = np.array(leaf.a)
    a[0, 0] = np.nextafter(a[0, 0], np.inf, dtype=np.float32)
    others = [
        {"w": leaf},
        {"v": leaf, "b": ADAPTER["b"]},
        {**ADAPTER, "w": dataclasses.replace(leaf, a=a)},
        {**ADAPTER, "w": dataclasses.replace(leaf, alpha=3.5)},
        {**ADAPTER, "w": dataclasses.replace(leaf, use_rslora=True)},
        {**ADAPTER, "w": dataclasses.replace(leaf, b=np.float64(leaf.b))},
        {**ADAPTER, "w": jlora.adapters.lora_fa.LoRAFALeaf(**vars(leaf))},
    ]
    hashes = [HASH, *map(content_hash, others)]
    assert len(set(hashes)) == len(hashes)


def test_law_read_lineage_roundtrip(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, ADAPTER, PARAMS, LINEAGE)
    assert read_lineage(path) == LINEAGE
    save_adapter(path, ADAPTER, PARAMS)
    assert read_lineage(path) == Lineage()
    # Neither the lineage nor the file's name is part of the content.
    assert metadata_of(path)["content"] == HASH


def test_load_adapter_without_lineage(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    save_adapter(path, ADAPTER, PARAMS, LINEAGE)
    rewritten(path, without=("content", "lineage"))
    assert content_hash(load_adapter(path, PARAMS)) == HASH
    assert read_lineage(path) == Lineage()
    assert "content" not in inspect_path(path).details


def test_load_adapter_changed_content_raises(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, ADAPTER, PARAMS)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match="does not have the content that jlora wrote"):
        load_adapter(path, PARAMS)
    path.write_bytes(good)
    rewritten(path, adapter=metadata_of(path)["adapter"].replace('"alpha": 3.0', '"alpha": 6.0'))
    with pytest.raises(ValueError, match="does not have the content that jlora wrote"):
        load_adapter(path, PARAMS)


def test_inspect_path_shows_lineage(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, ADAPTER, PARAMS, LINEAGE)
    facts = inspect_path(path).details
    assert facts["content"] == HASH
    assert facts["method"] == "TIES(density=0.2), rank=4"
    assert facts["parent 1"] == f"1 x one.safetensors ({HASH[:12]})"
    assert facts["parent 2"] == "-0.5 x two (000000000000)"
    assert facts["recipe"] == "base base, data x.jsonl"
    assert all(text in str(inspect_path(path)) for text in facts.values())


@pytest.mark.parametrize(
    "recipe", [{}, {"model": 3, "data": []}, {"data": {"train": 3}}, {"data": {"train": [3]}}]
)
def test_inspect_path_unknown_recipe(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, ADAPTER, PARAMS, Lineage(recipe=recipe))
    assert inspect_path(path).details["recipe"] == "in the metadata"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 20000,
        "[]",
        "3",
        '"text"',
        '{"parents": 3}',
        '{"parents": [3]}',
        '{"parents": [{"name": "a"}]}',
        f'{{"parents": [{{"name": "", "content": "{HASH}", "weight": 1}}]}}',
        '{"parents": [{"name": "a", "content": "zz", "weight": 1}]}',
        f'{{"parents": [{{"name": "a", "content": "{HASH}", "weight": NaN}}]}}',
        f'{{"parents": [{{"name": "a", "content": "{HASH}", "weight": 1{"0" * 400}}}]}}',
        f'{{"parents": [{{"name": "a", "content": "{HASH}", "weight": "1"}}]}}',
        '{"method": 3}',
        '{"recipe": []}',
        '{"recipe": {"seed": Infinity}}',
        '{"other": 1}',
    ],
)
def test_read_lineage_damaged_raises(text: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, ADAPTER, PARAMS)
    rewritten(path, lineage=text)
    if text == "[]":  # A dict of no pairs.
        assert read_lineage(path) == Lineage()
        return
    for read in (read_lineage, inspect_path):
        with pytest.raises(ValueError, match=r"adapter.safetensors: the lineage is damaged"):
            read(path)
    # The tensors are intact.
    assert adapted_weight_paths(path) == ["b", "w"]
    assert content_hash(load_adapter(path, PARAMS)) == HASH


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "content", "weight", "model", "data", "train", "path"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(
    st.dictionaries(st.sampled_from(["parents", "method", "recipe"]), VALUES, max_size=3)
)
def test_lineage_any_json_is_valid_or_raises(held: dict[str, Any]) -> None:
    from jlora.cli.checkpoint_contents import _describe_lineage

    try:
        found = Lineage.from_json(json.dumps(held))
    except ValueError:
        return
    assert Lineage.from_json(found.to_json()) == found
    assert all(isinstance(text, str) for text in _describe_lineage(found).values())


def test_save_adapter_bad_lineage_raises(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(TypeError, match="must be a jlora.checkpoints.Lineage"):
        save_adapter(path, ADAPTER, PARAMS, {"method": "x"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must contain only JSON values"):
        Lineage(recipe={"seed": jax.numpy.ones(2)})
    with pytest.raises(ValueError, match="ParentAdapter.content='abc' must be a content hash"):
        ParentAdapter("a", "abc", 1.0)
    with pytest.raises(TypeError, match="not what init returns"):
        content_hash({"w": 3})
    assert not path.exists()


def test_lineage_has_recipe_without_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jlora.training import export
    from jlora.training.prompt_format import PromptFormat
    from jlora.training.recipe.sections import Recipe

    monkeypatch.setattr(export, "gather_adapter", lambda *_: ADAPTER)
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        data = {"train": [{"path": "x.jsonl", "format": "chat"}]}
        made = Recipe.model_validate({"output": str(folder), "model": {"path": "b"}, "data": data})
        setup: Any = types.SimpleNamespace(
            fingerprints=dict.fromkeys(ADAPTER, "0" * 32), base_digest=None
        )
        export.save_adapter_and_head(made, setup, {}, None, PromptFormat(is_chat=True))
    one, two = (tmp_path / name / "adapter.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    recipe = read_lineage(one).recipe
    assert recipe is not None
    again = Recipe.model_validate({"output": str(tmp_path / "two"), **recipe})
    assert again == made
    assert inspect_path(one).details["recipe"] == "base b, data x.jsonl"
