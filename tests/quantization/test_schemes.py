"""Codes and scales, against the papers' equations in NumPy and against bitsandbytes."""

from __future__ import annotations

import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora
from jlora.quantization.double_quantization import dynamic_map

DATA = pathlib.Path(__file__).parent / "data"
SCHEMES = {
    "nf4": jlora.NF4(),
    "nf4 plain": jlora.NF4(double_quantization=False),
    "nf4 short": jlora.NF4(block_size=8),
    "int8": jlora.Int8(block_size=32),
    "int4": jlora.Int4(block_size=32),
    "fp8": jlora.FP8(block_size=32),
}


def normal(*shape: int) -> jax.Array:
    return jax.device_put(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def quantized(weight: Any, scheme: Any) -> Any:
    return jlora.quantize({"w": jnp.asarray(weight)}, {"w": scheme})["w"]


# --- against bitsandbytes -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs() -> dict[str, np.ndarray]:
    with np.load(DATA / "bitsandbytes.npz") as file:
        return dict(file)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_quantize_nf4_equals_bitsandbytes(theirs: dict[str, np.ndarray], double: bool) -> None:
    # PyTorch's weights have their inputs last, and blocks run along them.
    qarray = quantized(theirs["weight"].T, jlora.NF4(double_quantization=double))
    kind = "double" if double else "plain"
    np.testing.assert_array_equal(qarray.codes.T, theirs[f"{kind}_codes"])
    if not double:
        np.testing.assert_array_equal(qarray.scales.T, theirs["plain_scales"])
        return
    np.testing.assert_allclose(qarray.scales.absmax.ravel(), theirs["largest"], rtol=1e-6)
    np.testing.assert_allclose(qarray.scales.mean, [[theirs["mean"]]], rtol=1e-6)
    # Where a scale is midway between two codes, the last bit decides.
    other = np.asarray(qarray.scales.codes.T) != theirs["double_scales"]
    assert other.mean() <= 1 / 256
    same = ~np.repeat(other, 64, axis=1)
    np.testing.assert_allclose(
        qarray.dequantize().T[same], theirs["dense"][same], rtol=1e-6, atol=1e-8
    )


def test_nf4_tables_equal_bitsandbytes(theirs: dict[str, np.ndarray]) -> None:
    one = jnp.asarray([[1.0, *theirs["table"][1:]]]).T  # The largest of the block is 1.
    np.testing.assert_array_equal(
        quantized(one, jlora.NF4(block_size=16, double_quantization=False)).dequantize()[1:, 0],
        theirs["table"][1:],
    )
    np.testing.assert_allclose(dynamic_map(), theirs["map"], rtol=2e-7)  # Two last bits.


# --- against the papers' equations ----------------------------------------------------------------


def nf4() -> np.ndarray:
    """The quantiles of a normal distribution that section 3 of the paper describes."""
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    inverse = np.vectorize(statistics.NormalDist().inv_cdf)
    above = inverse(np.linspace(outermost, 0.5, 9)[:-1])
    below = -inverse(np.linspace(outermost, 0.5, 8)[:-1])
    return np.sort([*above, 0.0, *below]) / above.max()


def test_nf4_values_are_normal_quantiles() -> None:
    values = nf4()
    weight = np.concatenate([values, np.zeros(48)])[:, None]
    qarray = quantized(weight, jlora.NF4(double_quantization=False)).dequantize()
    # The paper gives them to seven digits, from probabilities rounded to seven digits.
    np.testing.assert_allclose(qarray[:16, 0], values, atol=1e-6)


def blocks(weight: np.ndarray, size: int) -> np.ndarray:
    """(blocks, size, columns) of a matrix."""
    return weight.reshape(-1, size, weight.shape[-1])


def test_nf4_encode_takes_nearest_value() -> None:
    weight = np.asarray(normal(256, 48))
    scale = np.abs(blocks(weight, 64)).max(1, keepdims=True)
    qarray = quantized(weight, jlora.NF4(double_quantization=False))
    relative = blocks(np.asarray(qarray.dequantize()), 64) / scale
    numbers = np.array(nf4())
    assert np.abs(relative[..., None] - numbers).min(-1).max() < 1e-6
    nearest = np.abs(blocks(weight, 64)[..., None] / scale[..., None] - numbers).min(-1)
    np.testing.assert_allclose(np.abs(relative - blocks(weight, 64) / scale), nearest, atol=2e-6)


@pytest.mark.parametrize(("scheme", "largest"), [(jlora.Int8, 127), (jlora.Int4, 7)])
def test_integer_schemes_round_to_nearest(scheme: Any, largest: int) -> None:
    weight = np.asarray(normal(96, 40))
    scale = np.abs(blocks(weight, 32)).max(1, keepdims=True) / np.float32(largest)
    expected = (np.round(blocks(weight, 32) / scale) * scale).reshape(weight.shape)
    qarray = np.asarray(quantized(weight, scheme(block_size=32)).dequantize())
    # A quotient whose last bit differs may round to the other side of a half.
    off = np.abs(qarray - expected) > 1e-6
    assert off.mean() < 1e-3
    assert np.all(np.abs(qarray - weight) <= np.repeat(scale[:, 0], 32, 0) * 0.5001)


def test_fp8_equals_ml_dtypes() -> None:
    weight = np.asarray(normal(96, 40))
    scale = np.abs(blocks(weight, 32)).max(1, keepdims=True) / np.float32(448)
    scaled = (blocks(weight, 32) / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    qarray = quantized(weight, jlora.FP8(block_size=32)).dequantize()
    off = np.abs(np.asarray(qarray) - (scaled * scale).reshape(weight.shape)) > 1e-6
    assert off.mean() < 1e-3  # As with integers.
    assert np.isfinite(qarray).all()


def test_quantize_scales_matches_dynamic_map() -> None:
    weight = np.asarray(normal(1024, 64)) * np.linspace(0.5, 2, 64)
    qarray = quantized(weight, jlora.NF4())
    scales = np.abs(blocks(weight, 64)).max(1)  # (16, 64): 16 blocks for each column.
    centred = scales - scales.mean()
    # 256 scales are all 16 blocks of 16 columns.
    largest = np.abs(centred).reshape(16, 4, 16).max((0, 2))
    relative = centred / np.repeat(largest, 16)
    nearest = dynamic_map()[np.abs(relative[..., None] - dynamic_map()).argmin(-1)]
    expected = nearest * np.repeat(largest, 16) + scales.mean()
    np.testing.assert_allclose(qarray.scales.dequantize(), expected, rtol=1e-5, atol=1e-6)


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "shape", "bits"),
    [
        (jlora.NF4(), (4096, 1024), 4 + 8 / 64 + 32 / (64 * 256)),
        (jlora.NF4(), (14336, 128), 4 + 8 / 64 + 32 / (64 * 256)),
        (jlora.NF4(double_quantization=False), (4096, 64), 4 + 32 / 64),
        (jlora.Int8(), (4096, 64), 8 + 32 / 128),
        (jlora.Int4(), (4096, 64), 4 + 32 / 64),
        (jlora.FP8(), (4096, 64), 8 + 32 / 128),
    ],
)
def test_qarray_bits_per_param(scheme: Any, shape: tuple[int, int], bits: float) -> None:
    qarray = jlora.quantize({"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}, {"w": scheme})["w"]
    assert qarray.bits == pytest.approx(bits, abs=1e-4)  # And one mean.
    if scheme == jlora.NF4():
        assert qarray.bits == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(64, 3), (3, 64), (65, 7), (5, 70), (2, 64, 6), (1,), (129,)])
@pytest.mark.thin(9)
def test_quantize_any_shape_roundtrips(name: str, shape: tuple[int, ...]) -> None:
    weight = normal(*shape)
    qarray = quantized(weight, SCHEMES[name])
    back = qarray.dequantize()
    assert (qarray.shape, qarray.dtype, qarray.ndim, qarray.size) == (
        (weight.shape, weight.dtype, weight.ndim, weight.size)
    )
    assert (back.shape, back.dtype) == (weight.shape, weight.dtype)
    # Half the widest step of each scheme, relative to the largest element, plus the error of
    # double quantization.
    step = {"nf4": 0.16, "int8": 0.004, "int4": 0.08, "fp8": 0.04}[name.split()[0]]
    assert float(jnp.abs(back - weight).max()) <= (step + 0.02) * float(jnp.abs(weight).max())


@pytest.mark.parametrize("name", SCHEMES)
def test_quantize_zero_blocks_stay_zero(name: str) -> None:
    weight = np.array(normal(128, 6))
    weight[:64] = 0
    weight[:, 2] = 0
    back = quantized(weight, SCHEMES[name]).dequantize()
    assert not back[:64].any()
    assert not back[:, 2].any()
    assert back[64:, 0].any()
    zeros = np.zeros((128, 6), np.float32)
    assert not quantized(zeros, SCHEMES[name]).dequantize().any()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("tiny", [1e-30, 1e30])
def test_quantize_is_scale_invariant(name: str, tiny: float) -> None:
    weight = normal(128, 6)
    one, other = (quantized(weight * by, SCHEMES[name]) for by in (1.0, tiny))
    np.testing.assert_allclose(other.dequantize() / tiny, one.dequantize(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantize_nonfinite_raises(name: str, bad: float) -> None:
    params = {"a": {"kernel": normal(64, 4)}, "b": {"kernel": normal(64, 4).at[7, 1].set(bad)}}
    with pytest.raises(ValueError, match="'b/kernel' holds NaN or Inf.*Fix the checkpoint"):
        jlora.quantize(params, {"kernel": SCHEMES[name]})


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.slow
def test_qarray_slice_and_stack_commute(name: str) -> None:
    scheme = SCHEMES[name]
    stack = normal(3, 64, 128)
    qarray = quantized(stack, scheme)
    each = [quantized(layer, scheme) for layer in stack]
    one = jax.tree.map(lambda array: array[1], qarray)
    np.testing.assert_array_equal(one.dequantize(), qarray.dequantize()[1])
    np.testing.assert_array_equal(one.dequantize(), each[1].dequantize())
    joined = jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)
    np.testing.assert_array_equal(joined.dequantize(), qarray.dequantize())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.slow
def test_qarray_transpose_commutes(name: str) -> None:
    qarray = quantized(normal(3, 64, 128), SCHEMES[name])
    for order in ((0, 2, 1), (2, 0, 1), (1, 2, 0)):
        np.testing.assert_array_equal(
            qarray.transpose(order).dequantize(), qarray.dequantize().transpose(order)
        )


# --- rules ----------------------------------------------------------------------------------------


def test_quantize_first_rule_wins() -> None:
    params = {"a": {"kernel": normal(64, 4), "bias": normal(4)}, "head": {"kernel": normal(64, 4)}}
    rules = {"head": None, r"kernel$": jlora.Int8(block_size=64)}
    qarray = jlora.quantize(params, rules)
    assert isinstance(qarray["a"]["kernel"], jlora.QArray)
    assert qarray["head"]["kernel"] is params["head"]["kernel"]
    assert qarray["a"]["bias"] is params["a"]["bias"]
    again = jlora.dequantize(qarray)
    assert jax.tree.structure(again) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("rules", "kind", "message"),
    [
        (jlora.NF4(), TypeError, r"rules must be a mapping from patterns to schemes, got NF4"),
        ({"kernel": 4}, TypeError, r"The rule 'kernel' maps to 4"),
        ({"kernal": jlora.NF4()}, ValueError, r"'kernal' matches none of the 3 weights. The nea"),
        (
            {"count": jlora.NF4()},
            TypeError,
            "matches 'count', which must be an array of floats, got int32",
        ),
        ({"scale": jlora.NF4()}, ValueError, r"matches 'scale', whose shape \(\) has no axis"),
        (
            {"kernel": jlora.NF4(axis=-3)},
            ValueError,
            r"axis=-3 of NF4.* must be an axis of the weight, got shape \(6",
        ),
    ],
)
def test_quantize_bad_rules_raise(rules: Any, kind: Any, message: str) -> None:
    params = {"kernel": normal(64, 4), "count": jnp.int32(3), "scale": jnp.float32(1)}
    with pytest.raises(kind, match=message):
        jlora.quantize(params, rules)


def test_quantize_twice_raises() -> None:
    qarray = jlora.quantize({"w": normal(64, 4)}, {"w": jlora.Int8()})
    with pytest.raises(ValueError, match=r"'w', which is already quantized \(int8\)"):
        jlora.quantize(qarray, {"w": jlora.NF4()})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: jlora.NF4(block_size=63),
            "NF4.block_size must be an even integer of 2 or more, got 63",
        ),
        (
            lambda: jlora.Int8(block_size=1),
            "Int8.block_size must be an integer of 2 or more, got 1",
        ),
        (
            lambda: jlora.FP8(block_size=64.0),
            "FP8.block_size must be an integer of 2 or more, got 64.0",
        ),
        (lambda: jlora.Int4(axis=0), "Int4.axis must be a negative integer, got 0"),
    ],
)
def test_scheme_bad_fields_raise(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("split", [("x", None), (None, "x")])
def test_quantize_sharded_is_bit_identical(split: Any) -> None:
    """Equal to the last bit, as the fingerprint needs; a sum of floats would differ."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    weight = normal(1024, 512)
    parts = jax.device_put(weight, NamedSharding(mesh, PartitionSpec(*split)))
    one, many = (quantized(array, jlora.NF4()) for array in (weight, parts))
    jax.tree.map(np.testing.assert_array_equal, one, many)
    plain = quantized(weight, jlora.NF4(double_quantization=False)).scales
    np.testing.assert_allclose(one.scales.mean[0, 0], plain.mean(), rtol=1e-6)


@pytest.mark.parametrize("order", [(0, 2, 1), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("axis", [-1, -2, -3])
@pytest.mark.thin(3)
def test_qarray_transpose_any_axis_and_order(axis: int, order: tuple[int, ...]) -> None:
    weight = jax.random.normal(jax.random.key(0), (4, 6, 10))
    packed = jlora.quantize({"w": weight}, {"w": jlora.Int4(block_size=2, axis=axis)})["w"]
    transposed = packed.transpose(order)
    assert transposed.shape == tuple(weight.shape[axis] for axis in order)
    np.testing.assert_array_equal(transposed.dequantize(), packed.dequantize().transpose(order))
