"""Damaged and hostile files: readers raise an error of jlora and never crash.

All three readers are tested: jlora's adapter files, PEFT's folders, and checkpoints.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import pickle
import shutil
import struct
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jlora
from jlora import models, peft
from jlora.models.hf import decoder_configs, load, weight_names
from jlora.models.hf.weight_mapping import single_tensor_weight

BASE = pathlib.Path(__file__).parents[1] / "models" / "data" / "decoders" / "llama"
PARAMS = {"w": jnp.arange(30.0).reshape(6, 5)}
STORED = {"w": single_tensor_weight("net.w.weight", (6, 5), (1, 0))}
X = jnp.ones((2, 6))
TOKENS = jax.ShapeDtypeStruct((1, 2), jnp.int32)
REFUSED = (ValueError, FileNotFoundError)
FUZZ = hypothesis.settings(
    max_examples=300,
    deadline=None,
    derandomize=True,  # The same cases every time: what it finds is then put right and stays so.
    suppress_health_check=list(hypothesis.HealthCheck),
)


def product(params: Any, x: Any) -> Any:
    return x @ params["w"]


@functools.cache
def decoder_shapes(config: models.DecoderConfig) -> Any:
    return weight_names.eval_param_shapes(models.Decoder(config), TOKENS)


@functools.cache
def adapter() -> Any:
    lora = jlora.lora_transform(product, jlora.LoRA(rank=2, alpha=3))
    return jax.tree.map(lambda a: a + 0.5, lora.init(jax.random.key(0), PARAMS, X))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a good file for each reader."""
    folder = tmp_path_factory.mktemp("good")
    jlora.save_adapter(folder / "adapter.safetensors", adapter(), PARAMS)
    peft.save(folder / "peft", adapter(), product, PARAMS, X, checkpoint_mapping=STORED)
    shutil.copytree(BASE, folder / "model")
    return folder


def read_adapter(folder: pathlib.Path) -> Any:
    return jlora.load_adapter(folder / "adapter.safetensors", PARAMS)


def read_peft(folder: pathlib.Path) -> Any:
    return peft.load(folder / "peft", product, PARAMS, X, checkpoint_mapping=STORED)


def read_model(folder: pathlib.Path) -> Any:
    return load.check_loadable(folder / "model")


# Each reader and the file of its tensors.
READERS: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "adapter": (read_adapter, "adapter.safetensors"),
    "peft": (read_peft, "peft/adapter_model.safetensors"),
    "model": (read_model, "model/model.safetensors"),
}


def framed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of these parts, with the length in front of its header."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def described(*offsets: int, dtype: str = "F32", shape: Any = (2,)) -> bytes:
    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
    return json.dumps({"w": entry}).encode()


TWO = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]},"b":{"dtype":"F32","shape":[1],'
HOSTILE = {
    "empty": b"",
    **{f"{size} bytes": bytes(size) for size in range(1, 8)},
    "a header of no length": framed(b""),
    "a header longer than the file": framed(b"{}", length=1000),
    "a header of 2^63 bytes": framed(b"{}", length=2**63),
    "a header of 2^64 - 1 bytes": framed(b"{}", length=2**64 - 1),
    "a header of 101 MB": framed(b"{}", length=101_000_000),
    "no UTF-8": framed(b"\xff\xfe{}"),
    "no JSON": framed(b"{not json}"),
    "a list": framed(b"[1, 2]"),
    "10,000 lists in each other": framed(b"[" * 10_000 + b"]" * 10_000),
    "10,000 objects in each other": framed(b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    "tensors that overlap": framed(TWO % (0, 4) + b'"data_offsets":[2,6]}}', bytes(6)),
    "a hole between tensors": framed(TWO % (0, 4) + b'"data_offsets":[8,12]}}', bytes(12)),
    "an end before the beginning": framed(described(8, 0), bytes(8)),
    "a negative offset": framed(described(-8, 0), bytes(8)),
    "offsets past the end": framed(described(0, 80), bytes(8)),
    "a shape whose product overflows": framed(described(0, 8, shape=(2**40, 2**40)), bytes(8)),
    "a shape that does not fill its bytes": framed(described(0, 8, shape=(3,)), bytes(8)),
    "a negative shape": framed(described(0, 8, shape=(-2,)), bytes(8)),
    "a dtype that nobody knows": framed(described(0, 8, dtype="F12"), bytes(8)),
    "weights of truth values": framed(described(0, 2, dtype="BOOL"), bytes(2)),
    "weights of integers": framed(described(0, 16, dtype="I64"), bytes(16)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_readers_hostile_file_raises(
    name: str, reader: str, good: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    read, file = READERS[reader]
    shutil.copytree(good, tmp_path / "copy")
    (tmp_path / "copy" / file).write_bytes(HOSTILE[name])
    with pytest.raises(REFUSED):
        read(tmp_path / "copy")


@pytest.mark.parametrize("reader", ["adapter", "peft"])
def test_readers_truncated_file_raises(
    reader: str, good: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    read, file = READERS[reader]
    shutil.copytree(good, tmp_path / "copy")
    whole_file = (good / file).read_bytes()
    for length in range(len(whole_file)):
        (tmp_path / "copy" / file).write_bytes(whole_file[:length])
        with pytest.raises(REFUSED):
            read(tmp_path / "copy")
    (tmp_path / "copy" / file).write_bytes(whole_file + b"\0")
    with pytest.raises(REFUSED):
        read(tmp_path / "copy")
    (tmp_path / "copy" / file).write_bytes(whole_file)
    assert read(tmp_path / "copy")


@pytest.mark.parametrize("reader", ["adapter", "peft"])
def test_readers_changed_bytes_raise_or_load(
    reader: str, good: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    read, file = READERS[reader]
    shutil.copytree(good, tmp_path / "copy")
    bytes_of = (good / file).read_bytes()

    @FUZZ
    @hypothesis.given(
        st.lists(
            st.tuples(st.integers(0, len(bytes_of) - 1), st.integers(0, 255)),
            min_size=1,
            max_size=4,
        )
    )
    def fuzz(changes: list[tuple[int, int]]) -> None:
        spoilt = bytearray(bytes_of)
        for place, value in changes:
            spoilt[place] = value
        (tmp_path / "copy" / file).write_bytes(bytes(spoilt))
        try:
            found = read(tmp_path / "copy")
        except REFUSED:
            return
        # Numbers may have changed, to others that are finite.
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))

    fuzz()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["net.w", "w", "all-linear", ".*", "(", "[", "LORA", "lora_only", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=4,
)
FIELDS = [
    *("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "bias", "use_dora", "use_rslora", "exclude_modules", "lora_dropout"),
    *("layers_to_transform", "layers_pattern", "trainable_token_indices", "target_parameters"),
    *("fan_in_fan_out", "init_lora_weights", "task_type", "anything"),
]


def test_peft_config_fuzzed_raises_or_loads(good: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(good, tmp_path / "copy")
    path = tmp_path / "copy" / "peft" / "adapter_config.json"
    fields = json.loads(path.read_text())

    @FUZZ
    @hypothesis.given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=2))
    def fuzz(changes: dict[str, Any]) -> None:
        path.write_text(json.dumps({**fields, **changes}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of a rank that is more than the weight's.
            try:
                found = read_peft(tmp_path / "copy")
            except REFUSED:
                return
        # What is read is the adapter that is there, whatever else the config says.
        assert found.adapter["w"].shape == (6, 5)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))

    fuzz()


def test_decoder_config_fuzzed_raises_or_parses(good: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(good, tmp_path / "copy")
    path = tmp_path / "copy" / "model" / "config.json"
    fields = json.loads(path.read_text())
    names = [*fields, "rope_scaling", "head_dim", "quantization_config", "sliding_window", "other"]

    @FUZZ
    @hypothesis.given(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=2))
    def fuzz(changes: dict[str, Any]) -> None:
        path.write_text(json.dumps({**fields, **changes}))
        try:
            config = decoder_configs.decoder_config({**fields, **changes})
        except REFUSED:
            return
        # And what is a config makes a model.
        if config.hidden_size <= 64 and config.vocab_size <= 64:
            assert decoder_shapes(config)

    fuzz()


def test_readers_never_run_pickles(good: pathlib.Path, tmp_path: pathlib.Path) -> None:
    class Canary:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "it-ran"),)

    harm = pickle.dumps(Canary())
    for reader, (read, file) in READERS.items():
        for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt", pathlib.Path(file).name):
            copy = tmp_path / f"{reader}-{name}"
            shutil.copytree(good, copy)
            (copy / file).unlink()
            (copy / file).with_name(name).write_bytes(harm)
            with pytest.raises(REFUSED):
                read(copy)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("reader", READERS)
def test_readers_irregular_file_raises(
    reader: str, good: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    read, file = READERS[reader]
    for make in (os.mkfifo, os.mkdir):
        copy = tmp_path / make.__name__
        shutil.copytree(good, copy)
        (copy / file).unlink()
        make(copy / file)
        with pytest.raises(REFUSED):
            read(copy)  # A FIFO that is opened would never answer.


def test_save_failure_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, params = models.load(BASE)
    for name in ("fsync", "rename"):
        with monkeypatch.context() as patched:

            def fail(*_: Any) -> None:
                raise OSError(28, "No space left on device")

            patched.setattr(os, name, fail)
            with pytest.raises(OSError, match="No space left"):
                models.save(tmp_path / "out", params, BASE)
            with pytest.raises(OSError, match="No space left"):
                peft.save(
                    tmp_path / "peft", adapter(), product, PARAMS, X, checkpoint_mapping=STORED
                )
        assert not list(tmp_path.iterdir())
    models.save(tmp_path / "out", params, BASE)
    assert safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
