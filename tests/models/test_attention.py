"""Attention: masks, the choice of kernels, and their test before use."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.attention_cases import ATTENTION_CASE as CASE
from jax.sharding import AbstractDevice, AbstractMesh

from jlora import models
from jlora.models import attention, attention_kernels, decoder_config, tokamax_attention
from jlora.models.attention import attend
from jlora.models.attention_kernels import AttentionCase
from jlora.models.layers import has_layout
from jlora.models.splash_attention import splash_attention
from jlora.training import sharding

PACKED = np.repeat([[1, 2, 0, 0], [1, 2, 3, 0]], [5, 4, 2, 1], axis=1)  # 12 tokens
PADDED = (PACKED == 1).astype(int)


def attend_each(
    query: np.ndarray[Any, Any],
    key: np.ndarray[Any, Any],
    value: np.ndarray[Any, Any],
    segments: np.ndarray[Any, Any],
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> np.ndarray[Any, Any]:
    """The definition in float64, one query after another; zeros for padding."""
    out = np.zeros(query.shape)
    group = query.shape[2] // key.shape[2]
    for row, slot, head in np.ndindex(query.shape[:3]):
        if segments[row, slot] == 0:
            continue
        seen = segments[row] == segments[row, slot]
        distance = slot - np.arange(query.shape[1])
        seen &= (distance >= 0) | (not causal)
        seen &= abs(distance) < (window or np.inf)
        scores = key[row, seen, head // group] @ query[row, slot, head] * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[row, slot, head] = weights / weights.sum() @ value[row, seen, head // group]
    return out


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segments", [None, PACKED, PADDED], ids=["one text", "packed", "padded"])
def test_attend_is_the_definition(
    segments: Any, causal: bool, window: int | None, softcap: float | None
) -> None:
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 12, 4, 8))
    key, value = rng.normal(size=(2, 2, 12, 2, 8))
    options = {"scale": 0.7, "causal": causal, "window": window, "softcap": softcap}
    ids = np.ones((2, 12), int) if segments is None else segments
    expected = attend_each(query, key, value, ids, **options)
    arrays = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
    given = None if segments is None else jnp.asarray(segments)
    out = attend(*arrays, query_segment_ids=given, implementation="xla", **options)
    np.testing.assert_allclose(np.where(ids[..., None, None] > 0, out, 0), expected, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("has_segments", [True, False])
@pytest.mark.thin(3)
def test_splash_attention_is_the_definition(
    has_segments: bool, window: int | None, softcap: float | None
) -> None:
    """In Pallas's interpreter; TPUs have the kernel."""
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 128, 4, 6))
    key, value = rng.normal(size=(2, 2, 128, 2, 6))
    ids = np.repeat([[1, 2], [1, 3]], [50, 78], axis=1) if has_segments else np.ones((2, 128), int)
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    expected = attend_each(query, key, value, ids, causal=True, **options)
    arrays = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
    given = jnp.asarray(ids, jnp.int32) if has_segments else None
    out = splash_attention(*arrays, given, interpret=True, **options)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"query_segment_ids": PACKED},
        {"query_segment_ids": PACKED, "softcap": 2.0},
        {"query_slots": np.array([[3, 7, 11]])},
        {"query_slots": np.array([[3, 7, 11]]), "softcap": 2.0},
    ],
    ids=["one text", "packed", "softcap", "cache", "cache and softcap"],
)
def test_attend_float16_on_cpu(options: dict[str, Any]) -> None:
    """Also over a cache, whose product with a mask XLA refuses in float16."""
    rng = np.random.default_rng(0)
    count = 3 if "query_slots" in options else 12
    arrays = [rng.normal(size=(2, n, h, 8)).astype(np.float16) for n, h in ((count, 4), (12, 2))]
    narrow = [jnp.asarray(x) for x in (*arrays, arrays[1])]
    given = {name: jnp.asarray(x) if name != "softcap" else x for name, x in options.items()}
    out = attend(*narrow, scale=0.7, **given)
    expected = attend(*(x.astype(jnp.float32) for x in narrow), scale=0.7, **given)
    assert out.dtype == jnp.float16
    np.testing.assert_array_equal(out, expected.astype(jnp.float16))


def test_attend_of_part_of_a_row_needs_slots() -> None:
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="need query_slots"):
        attend(x[:, :2], x, x, scale=1.0)


# --- layouts of rows -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "packed", "padded"),
    [
        ([1, 1, 2, 2, 0, 0], True, False),
        ([1, 1, 1, 1, 0, 0], True, True),
        ([0, 0, 1, 1, 2, 2], True, False),
        ([0, 0, 0, 0, 0, 0], True, True),
        ([2, 2, 5, 5, 7, 0], True, False),
        ([1, 1, 2, 1, 1, 0], False, False),
        ([1, 1, 0, 1, 1, 0], False, False),
        ([0, 1, 1, 1, 1, 1], True, False),
    ],
)
def test_has_layout_of_rows(row: list[int], packed: bool, padded: bool) -> None:
    ids = jnp.array([row, [1] * 6])
    assert has_layout(ids, "packed").tolist() == [packed, True]
    assert has_layout(ids, "padded").tolist() == [padded, True]
    assert has_layout(ids, "any").tolist() == [True, True]


@functools.cache
def tiny_decoder() -> tuple[models.Decoder, Any]:
    config = decoder_config(
        {
            "model_type": "llama",
            "vocab_size": 32,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
        }
    )
    model = models.Decoder(config, text_layout="packed")
    return model, jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 2), jnp.int32))


def test_decoder_broken_promise_is_nan() -> None:
    model, params = tiny_decoder()
    tokens = jnp.arange(12).reshape(2, 6)
    ids = jnp.array([[1, 1, 2, 2, 2, 0], [1, 2, 2, 1, 1, 0]])
    promised = model.apply(params, tokens, ids)
    free = model.clone(text_layout="any").apply(params, tokens, ids)
    assert np.isnan(promised[1]).all()
    np.testing.assert_array_equal(promised[0], free[0])
    assert np.isfinite(free[1, :5]).all()


def test_encoder_broken_promise_is_nan() -> None:
    config = models.EncoderConfig(
        model_type="bert",
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        max_position_embeddings=16,
    )
    model = models.Encoder(config, text_layout="padded")
    tokens, mask = jnp.ones((2, 4), jnp.int32), jnp.array([[1, 1, 1, 0], [1, 0, 1, 1]])
    params = jax.jit(model.init)(jax.random.key(0), tokens, mask)
    promised = model.apply(params, tokens, mask)
    free = model.clone(text_layout="any").apply(params, tokens, mask)
    assert np.isnan(promised[1]).all()
    np.testing.assert_array_equal(promised[0], free[0])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_run_bounds_are_the_keys_of_a_query(causal: bool, window: int | None) -> None:
    """The mask that tokamax gets is that of the definition."""
    starts, ends = tokamax_attention.key_bounds(jnp.asarray(PACKED), window)
    keys = np.arange(12)
    found = (keys >= starts[..., None]) & (keys < ends[..., None])
    distance = keys[:, None] - keys
    found &= (distance >= 0) | (not causal)
    expected = (PACKED[:, :, None] == PACKED[:, None]) & (abs(distance) < (window or 99))
    expected &= (distance >= 0) | (not causal)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("length", [12, 128])
def test_tokamax_rows_fill_whole_blocks(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key past the end of a row is read, whose memory may hold NaN."""
    seen = []

    def call(query: Any, key: Any, value: Any, starts: Any, ends: Any, **options: Any) -> Any:
        seen.append((query.shape, starts, ends))
        return query

    monkeypatch.setattr(tokamax_attention, "_call_op", call)
    x = jnp.ones((2, length, 2, 8))
    options = {"scale": 1.0, "causal": False, "window": None, "softcap": None}
    ids = jnp.ones((2, length), jnp.int32).at[:, 7:].set(2).at[:, 10:].set(0)
    for segments in (None, ids):
        out = tokamax_attention.tokamax_attention(x, x, x, segments, kernel="mosaic", **options)
        assert out.shape == x.shape
        shape, starts, ends = seen.pop()
        assert shape == (2, 128, 2, 8)
        assert starts.shape == ends.shape == (len(x) if segments is not None else 1, 128)
        np.testing.assert_array_equal(ends[:, :length].max(), length)


# --- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "capability", "expected"),
    [
        ({}, 9.0, ["mosaic", "triton", "cudnn", "xla"]),
        ({}, 10.0, ["mosaic", "triton", "cudnn", "xla"]),
        ({}, 12.0, ["triton", "cudnn", "xla"]),
        ({}, 8.9, ["triton", "cudnn", "xla"]),
        ({}, 7.5, ["cudnn", "xla"]),
        ({}, None, ["xla"]),
        ({"length": 2}, 9.0, ["xla"]),
        ({"length": 501}, 9.0, ["mosaic", "triton", "xla"]),
        ({"text_layout": None}, 9.0, ["cudnn", "mosaic", "triton", "xla"]),
        ({"text_layout": "any"}, 9.0, ["cudnn", "xla"]),
        ({"text_layout": "padded"}, 9.0, ["mosaic", "triton", "cudnn", "xla"]),
        ({"text_layout": "padded", "length": 501}, 7.5, ["cudnn", "xla"]),
        ({"text_layout": None, "causal": False, "window": 9}, 9.0, ["mosaic", "triton", "xla"]),
        ({"text_layout": None, "causal": True, "window": 9}, 7.5, ["cudnn", "xla"]),
        ({"text_layout": "padded", "causal": False, "window": 9}, 7.5, ["xla"]),
        ({"causal": False, "window": 9}, 7.5, ["cudnn", "xla"]),
        ({"softcap": 30.0}, 9.0, ["mosaic", "xla"]),
        ({"softcap": 30.0, "text_layout": "any"}, 9.0, ["xla"]),
        ({"head_dim": 256}, 9.0, ["mosaic", "triton", "xla"]),
    ],
    ids=str,
)
def test_list_gpu_kernels_by_case(
    change: dict[str, Any], capability: Any, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokamax_attention, "is_installed", lambda: True)
    case = CASE._replace(**change)
    assert attention_kernels.list_gpu_kernels(case, capability) == expected


@pytest.mark.parametrize(
    ("change", "expected", "instead"),
    [
        ({}, ["cudnn", "xla"], "cuDNN with a mask"),
        ({"softcap": 30.0}, ["xla"], "XLA with an array of all pairs"),
        ({"text_layout": "padded"}, ["cudnn", "xla"], None),
        ({"text_layout": None}, ["cudnn", "xla"], None),
    ],
    ids=str,
)
def test_list_gpu_kernels_without_tokamax(
    change: dict[str, Any],
    expected: list[str],
    instead: str | None,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setattr(tokamax_attention, "is_installed", lambda: False)
    attention_kernels._warn_not_installed.cache_clear()
    for _ in range(2):  # One warning.
        assert attention_kernels.list_gpu_kernels(CASE._replace(**change), 9.0) == expected
    messages = [str(warning.message) for warning in recwarn]
    if instead is None:
        assert not messages
    else:
        assert [instead in message for message in messages] == [True]
        assert "jlora[gpu]" in messages[0]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose default device looks like a Hopper GPU with tokamax."""
    monkeypatch.setattr(attention, "_get_platform", lambda: "gpu")
    monkeypatch.setattr(attention_kernels.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention_kernels, "_get_compute_capability", lambda: 9.0)
    monkeypatch.setattr(tokamax_attention, "is_installed", lambda: True)
    monkeypatch.setattr(attention_kernels.importlib.metadata, "version", lambda name: "9.9")
    attention_kernels._passes_test.cache_clear()


def small(case: AttentionCase) -> AttentionCase:
    return case._replace(num_heads=2, num_kv_heads=1, head_dim=8)


def run_with(broken: dict[str, Any]) -> Any:
    """Attention by XLA under every name, with some kernels that do something else."""

    def run(
        query: Any, key: Any, value: Any, segments: Any, kernel: str, case: Any, scale: float
    ) -> Any:
        out = attention._run_kernel(query, key, value, segments, "xla", case, scale)
        return broken.get(kernel, lambda x: x)(out)

    return run


def fail(out: Any) -> Any:
    raise RuntimeError("no PTX")


@pytest.mark.parametrize(
    ("broken", "expected", "reasons"),
    [
        ({}, "mosaic", []),
        ({"mosaic": fail}, "triton", ["no PTX"]),
        ({"mosaic": lambda out: out * 1.05}, "triton", ["results are off by "]),
        # A right output whose gradient is wrong.
        (
            {"mosaic": lambda out: 2 * out - jax.lax.stop_gradient(out)},
            "triton",
            ["results are off by 1.0e"],
        ),
        (
            {"mosaic": fail, "triton": lambda out: out + jnp.nan},
            "cudnn",
            ["no PTX", "results are off by nan"],
        ),
        (dict.fromkeys(("mosaic", "triton", "cudnn"), fail), "xla", ["no PTX"] * 3),
    ],
    ids=["all work", "raises", "wrong", "wrong gradient", "two", "all"],
)
def test_select_kernel_tries_before_use(
    broken: dict[str, Any],
    expected: str,
    reasons: list[str],
    hopper: None,
    recwarn: pytest.WarningsRecorder,
) -> None:
    run = run_with(broken)
    for _ in range(2):  # One test and one warning each.
        assert attention_kernels.select_gpu_kernel(small(CASE), run) == expected
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == len(reasons)
    for message, reason in zip(messages, reasons, strict=True):
        assert reason in message
        assert "heads of 8 and packed texts" in message


def test_kernel_is_tried_on_one_device_of_a_mesh(
    hopper: None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Also while a step over several devices is traced, whose axes do not divide the test's."""
    seen = []

    def run(query: Any, *rest: Any) -> Any:
        seen.append(query.shape)
        return run_with({})(query, *rest)

    x = jnp.ones((16, 256, 4, 8), jnp.bfloat16)
    with sharding.use_mesh(sharding.make_mesh({"data": 8})):
        traced = jax.jit(
            lambda x: attention_kernels.select_gpu_kernel(small(CASE), run) == "mosaic" and x
        )
        assert traced(x).shape == x.shape
    assert set(seen) == {(2, 256, 2, 8)}
    assert not recwarn.list


def test_select_kernel_other_devices_is_xla() -> None:
    assert attention.choose_kernel(CASE) == "xla"  # A CPU.
    assert attention.choose_kernel(CASE._replace(text_layout=None)) == "xla"
    mesh = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice("TPU v5e", None, "tpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention.choose_kernel(CASE) == "splash"
        assert attention.choose_kernel(CASE._replace(length=500)) == "xla"
        assert attention.choose_kernel(CASE._replace(causal=False)) == "xla"


def test_select_kernel_float32_is_xla(hopper: None) -> None:
    assert attention.choose_kernel(CASE._replace(dtype="float32")) == "xla"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "tokamax"}, "Pass text_layout='packed' or 'padded'"),
        (
            {"implementation": "tokamax", "text_layout": "packed"},
            "needs the library, an NVIDIA GPU .* bfloat16 or float16, and this is float32 on cpu",
        ),
        ({"implementation": "splash", "causal": False}, "only causal self-attention"),
        ({"implementation": "splash", "query_slots": 0}, "only self-attention over a full"),
        ({"implementation": "cudnn", "softcap": 2.0}, "does not support softcap=2.0"),
        ({"implementation": "splash"}, "multiples of 128, got 12"),
    ],
    ids=str,
)
def test_attend_implementation_unsupported_raises(options: dict[str, Any], message: str) -> None:
    x = jnp.ones((2, 12, 2, 8))
    if "query_slots" in options:
        options = {**options, "query_slots": jnp.arange(12)[None]}
    with pytest.raises(ValueError, match=message):
        attend(x, x, x, scale=1.0, query_segment_ids=jnp.asarray(PACKED), **options)


def test_attention_cases_are_those_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run prints is about the attention that runs."""
    seen: list[AttentionCase] = []
    model, params = tiny_decoder()
    monkeypatch.setattr(attention, "choose_kernel", lambda case: seen.append(case) or "xla")
    ids = jnp.ones((2, 6), jnp.int32)
    model.apply(params, ids, ids)
    assert model.attention_cases(6, "float32") == seen
