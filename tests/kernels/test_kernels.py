"""Selection of kernels, and the derivatives and shapes of their primitives.

CPU devices run the primitives as plain products; `tests/gpu` runs the kernels themselves.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.kernels import hopper, lora_matmul, self_test, tpu

NAMES = ("lora_matmul", "matmul_add", "lora_grads")


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selects kernels as on a device that has them, for products of any size."""
    monkeypatch.setattr(self_test, "kernels_work", lambda _: True)
    monkeypatch.setattr(hopper, "fits_hopper_tiles", lambda *_: True)
    monkeypatch.setattr(lora_matmul, "KERNEL_DTYPES", (jnp.bfloat16, jnp.float32))


def array(seed: int, *shape: int) -> jax.Array:
    draw = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jax.device_put(draw)


def program(fn: Callable[..., Any], *args: Any) -> str:
    return str(jax.make_jaxpr(fn)(*args))


def uses_kernels(text: str) -> bool:
    """Whether a program has any of the primitives."""
    return any(name in text for name in NAMES)


PARAMS = {"in": array(0, 12, 20), "out": array(1, 8, 20), "heads": array(2, 8, 3, 5)}
X = array(3, 3, 7, 12)


def model(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["in"]) @ params["out"].T  # The second is stored transposed.
    return jnp.einsum("abi,ihd->abhd", hidden, params["heads"])


LORA = jlora.lora_transform(model, jlora.LoRA(rank=4, alpha=8))


def moved(lora: Any) -> Any:
    """An adapter with noise on every array."""
    adapter = jax.jit(lora.init)(jax.random.key(4), PARAMS, X)
    return jax.tree.map(lambda a: a + 0.1 * array(5, *a.shape), adapter)


def loss(adapter: Any, x: jax.Array) -> jax.Array:
    return (LORA.apply(PARAMS, adapter, x) ** 2).sum()


def stacked(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.stack([a, 2 * a]), tree)


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "apply": lambda a: LORA.apply(PARAMS, a, X),
    "grad": lambda a: jax.grad(loss, argnums=(0, 1))(a, X),
    "grad of the adapter": lambda a: jax.grad(loss)(a, X),
    "grad of the input": lambda a: jax.grad(loss, argnums=1)(a, X),
    "jit of grad": lambda a: jax.jit(jax.grad(loss, argnums=(0, 1)))(a, X),
    "grad of W": lambda a: jax.grad(lambda p: (LORA.apply(p, a, X) ** 2).sum())(PARAMS),
    "jvp": lambda a: jax.jvp(lambda a, x: LORA.apply(PARAMS, a, x), (a, X), (a, X)),
    "hessian": lambda a: jax.hessian(loss, argnums=1)(a, X[:1, :2]),
    "vmap over inputs": lambda a: jax.vmap(lambda x: LORA.apply(PARAMS, a, x), 1)(
        jnp.stack([X, 2 * X], axis=1)
    ),
    "vmap over adapters": lambda a: jax.vmap(lambda a: LORA.apply(PARAMS, a, X))(stacked(a)),
    "vmap of grad": lambda a: jax.vmap(jax.grad(loss), (0, None))(stacked(a), X),
    "vmap of grad over both": lambda a: jax.vmap(jax.grad(loss))(stacked(a), stacked(X)),
    "grad of vmap": lambda a: jax.grad(lambda s: jax.vmap(loss, (0, None))(s, X).sum())(stacked(a)),
    "checkpoint": lambda a: jax.grad(jax.checkpoint(loss))(a, X),
    "scan": lambda a: jax.grad(
        lambda a: jax.lax.scan(lambda c, x: (c + loss(a, x), None), 0.0, stacked(X))[0]
    )(a),
}


EAGER = {"apply", "grad of the input"}  # Compiled one operation at a time; the others at once.


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.thin(2)
def test_kernels_transformed_equal_plain(name: str) -> None:
    adapter = moved(LORA)
    # A function of its own for each call, so that the second one is traced anew.
    compiled = (lambda fn: fn) if name in EAGER else (lambda fn: jax.jit(lambda a: fn(a)))
    outputs = compiled(TRANSFORMS[name])(adapter)
    with lora_matmul.plain_products():
        expected = compiled(TRANSFORMS[name])(adapter)
    for one, two in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True):
        # Sums of at most 60 products in float32, in another order.
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("with_kernels")
def test_grad_of_step_fuses_every_product() -> None:
    adapter = moved(LORA)
    text = program(jax.grad(loss), adapter, X)
    # Three weights; only two input gradients, because the gradient of x is not requested.
    assert [text.count(f" {name}") for name in NAMES] == [3, 2, 3]
    # The rest are x A, and xᵀ u for A.
    assert text.count("dot_general[") == 2 * 3
    with lora_matmul.plain_products():
        assert not uses_kernels(program(jax.grad(lambda a, x: loss(a, x)), adapter, X))


def dropped(a: Any) -> Any:
    lora = jlora.lora_transform(model, jlora.LoRA(rank=4, alpha=8, dropout=0.5))
    return lora.apply(PARAMS, lora.init(jax.random.key(0), PARAMS, X), X, dropout_key=a)


@pytest.mark.usefixtures("with_kernels")
def test_unsupported_products_stay_plain() -> None:
    lora = jlora.lora_transform

    def one(fn: Any, w: Any, x: Any, config: Any = None) -> str:
        transform = lora(fn, config or jlora.LoRA(rank=2, alpha=2))
        adapter = transform.init(jax.random.key(0), w, x)
        return program(lambda a: transform.apply(w, a, x), adapter)

    w, x = array(0, 6, 5), array(1, 4, 6)
    assert "lora_matmul" in one(lambda w, x: x @ w, w, x)
    plain = {
        "the weight on the left": one(lambda w, x: w.T @ x.T, w, x),
        "the weight on the left, contracted as on the right": one(
            lambda w, x: jax.lax.dot_general(w, x, (((0,), (1,)), ((), ()))), w, x
        ),
        "a batch of matrices": one(lambda w, x: x @ w, array(0, 3, 6, 5), array(1, 3, 4, 6)),
        "a precision": one(lambda w, x: jnp.dot(x, w, precision="highest"), w, x),
        "two terms": one(lambda w, x: x @ w, w, x, jlora.LoHa(rank=2, alpha=2)),
        "a wider result": one(
            lambda w, x: jnp.dot(x, w, preferred_element_type=jnp.float32),
            w.astype(jnp.bfloat16),
            x.astype(jnp.bfloat16),
        ),
        "dropout": program(dropped, jax.random.key(0)),
    }
    for case, text in plain.items():
        assert "lora_matmul" not in text, case


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("config", [jlora.DoRA(rank=2, alpha=4), jlora.LoRAFA(rank=2, alpha=4)])
def test_two_factor_adapters_use_kernels(config: Any) -> None:
    lora = jlora.lora_transform(model, config)
    adapter = moved(lora)
    assert "lora_matmul" in program(lambda a: lora.apply(PARAMS, a, X), adapter)
    merged = jax.jit(lambda a: model(lora.merge(PARAMS, a), X))(adapter)
    # Sums of at most 20 products in float32 between three layers.
    output = jax.jit(lora.apply)(PARAMS, adapter, X)
    np.testing.assert_allclose(output, merged, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("with_kernels")
def test_quantized_weight_is_recomputed() -> None:
    params = jlora.quantize(PARAMS, {"in|out": jlora.Int8(block_size=4)})
    adapter = moved(LORA)

    def total(a: Any) -> jax.Array:
        return (LORA.apply(params, a, X) ** 2).sum()

    gradient = jax.jit(jax.grad(total))(adapter)
    with lora_matmul.plain_products():
        expected = jax.jit(jax.grad(lambda a: (LORA.apply(params, a, X) ** 2).sum()))(adapter)
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
    _, pull_back = jax.vjp(total, adapter)
    residuals = {(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(pull_back)}
    assert ((12, 20), "int8") in residuals
    assert ((12, 20), "float32") not in residuals


@pytest.mark.usefixtures("with_kernels")
def test_products_saveable_saves_products() -> None:
    policy = jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, lora_matmul.products_saveable
    )
    again = lambda policy: program(jax.grad(jax.checkpoint(loss, policy=policy)), moved(LORA), X)
    plain = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    assert again(policy).count(" lora_matmul") == 3
    assert again(plain).count(" lora_matmul") > 3


@pytest.mark.usefixtures("with_kernels")
def test_explicit_sharding_stays_plain() -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    lora = jlora.lora_transform(lambda w, x: x @ w, jlora.LoRA(rank=2, alpha=2))
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        w, x = array(0, 6, 5), jax.device_put(array(1, 4, 3, 6), sharding)
        adapter = lora.init(jax.random.key(0), w, x)
        text = program(jax.grad(lambda a: lora.apply(w, a, x).sum()), adapter)
    assert not uses_kernels(text)


@pytest.mark.usefixtures("with_kernels")
def test_multi_device_mesh_stays_plain() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    adapter = moved(LORA)
    with jax.set_mesh(mesh):
        assert not uses_kernels(program(jax.grad(loss), adapter, X))


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowering_elsewhere_omits_kernels(platform: str) -> None:
    """Also when the kernels of the other device were selected during tracing."""
    w, x = (array(seed, 256, 256).astype(jnp.bfloat16) for seed in range(2))
    lora = jlora.lora_transform(lambda w, x: x @ w, jlora.LoRA(rank=2, alpha=2))
    adapter = lora.init(jax.random.key(0), w, x)

    def text(chosen: Any) -> str:
        with chosen():
            traced = jax.jit(lambda a: lora.apply(w, a, x)).trace(adapter)
        assert "lora_matmul" in str(traced.jaxpr)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    if platform != "tpu":
        assert "custom_call" not in text(lora_matmul.tpu_products)
    if platform != "cuda":
        assert "custom_call" not in text(contextlib.nullcontext)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hopper, "hopper_matmul_add", lambda x, w, *_, transpose_rhs: 3 * x)
            assert "3.0" in text(contextlib.nullcontext)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.usefixtures("with_kernels")
def test_linear_transpose_equals_plain(number: int) -> None:
    args = [array(0, 3, 7, 12), array(1, 12, 20), array(2, 12, 4), array(3, 4, 20)]
    dy = array(4, 3, 7, 20)

    def back(fn: Callable[..., Any]) -> Any:
        linear = lambda one: fn(*args[:number], one, *args[number + 1 :])
        return jax.linear_transpose(linear, args[number])(dy)[0]

    product = functools.partial(lora_matmul.lora_matmul, transpose_rhs=False, device="hopper")
    plain = lambda x, w, a, b: x @ w + (x @ a) @ b
    # Sums of at most 60 products in float32, in another order.
    np.testing.assert_allclose(back(product), back(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("with_kernels")
def test_disable_jit_runs_plain_products() -> None:
    adapter = moved(LORA)
    with jax.disable_jit():
        output = LORA.apply(PARAMS, adapter, X)
    np.testing.assert_allclose(output, LORA.apply(PARAMS, adapter, X), rtol=1e-4, atol=1e-4)


def test_fits_hopper_tiles_needs_divisibility() -> None:
    fits = hopper.fits_hopper_tiles
    assert fits(8192, 2048, 512, 16)
    assert not fits(8192 + 128, 2048, 512, 16)
    assert not fits(8192, 2048 + 32, 512, 16)
    assert not fits(8192, 2048, 512 + 64, 16)
    assert not fits(8192, 2048, 512, 65)
    assert not fits(0, 2048, 512, 16)


def test_select_kernel_device_needs_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "kernels_work", lambda _: True)

    def select(x_dtype: Any, w_dtype: Any) -> Any:
        shapes = (((8192, 2048), x_dtype), ((2048, 512), w_dtype))
        x, w = (jax.ShapeDtypeStruct(*each) for each in shapes)
        return lora_matmul.select_kernel_device(x, w, 16, transpose_rhs=False)

    assert select(jnp.bfloat16, jnp.bfloat16) == "hopper"
    assert select(jnp.float32, jnp.float32) is None
    assert select(jnp.bfloat16, jnp.float32) is None


def test_kernels_work_is_false_on_cpu() -> None:
    assert not self_test.kernels_work(16)


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize("rank", [1, 16, 24, 64])
@pytest.mark.thin(3)
def test_hopper_matmul_add_lowers(rank: int, transpose_rhs: bool) -> None:
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
    product = functools.partial(hopper.hopper_matmul_add, transpose_rhs=transpose_rhs, num_sms=132)
    arguments = (
        shape(512, 192),
        shape(256, 192) if transpose_rhs else shape(192, 256),
        shape(512, rank),
        shape(rank, 256),
    )
    lowered = jax.jit(product).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert lowered.out_info.shape == (512, 256)


@pytest.mark.parametrize(
    "shape", [(256, 640, 6), (8192, 14336, 16), (512, 128, 24), (256, 256, 32)]
)
def test_lora_grads_lowers(shape: tuple[int, int, int]) -> None:
    m, n, rank = shape
    arguments = [
        jax.ShapeDtypeStruct(sizes, jnp.bfloat16) for sizes in ((m, n), (m, rank), (rank, n))
    ]
    lowered = jax.jit(hopper.lora_grads).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert [one.shape for one in lowered.out_info] == [(m, rank), (rank, n)]


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize("shape", [(256, 512, 256, 16), (512, 256, 768, 3)])
def test_tpu_matmul_add_equals_plain(shape: tuple[int, ...], transpose_rhs: bool) -> None:
    m, k, n, rank = shape
    x, w, t, b = (
        array(seed, *sizes).astype(jnp.bfloat16)
        for seed, sizes in enumerate(
            ((m, k), (n, k) if transpose_rhs else (k, n), (m, rank), (rank, n))
        )
    )
    output = tpu.tpu_matmul_add(x, w, t, b, transpose_rhs=transpose_rhs, interpret=True).astype(
        jnp.float32
    )
    x, w, t, b = (np.asarray(one, np.float32) for one in (x, w, t, b))
    expected = x @ (w.T if transpose_rhs else w) + t @ b
    # One rounding to bfloat16.
    np.testing.assert_allclose(output, expected, rtol=2.0**-8, atol=2.0**-8)


def test_tpu_products_turns_kernel_on() -> None:
    lora = jlora.lora_transform(lambda w, x: x @ w, jlora.LoRA(rank=2, alpha=2))
    w, x = (array(seed, 256, 256).astype(jnp.bfloat16) for seed in range(2))
    adapter = lora.init(jax.random.key(0), w, x)

    def text() -> str:
        return program(lambda a: lora.apply(w, a, x), adapter)

    assert "lora_matmul" not in text()
    with lora_matmul.tpu_products():
        assert "lora_matmul" in text()
        small = lora.apply(w, adapter, x[:8])  # Sizes that are not divisible by its tiles.
    np.testing.assert_array_equal(small, lora.apply(w, adapter, x[:8]))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A Hopper device whose kernels are plain products."""
    device = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "default_device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def product(x: Any, w: Any, t: Any, b: Any, *, transpose_rhs: bool) -> Any:
        return x @ (w.T if transpose_rhs else w) + t @ b

    monkeypatch.setattr(hopper, "hopper_matmul_add", product)
    monkeypatch.setattr(hopper, "lora_grads", lambda dy, t, b: (dy @ b.T, t.T @ dy))
    self_test._test_kernels.cache_clear()
    yield monkeypatch
    self_test._test_kernels.cache_clear()


@pytest.mark.usefixtures("gpu")
def test_kernels_work_correct_kernels_pass() -> None:
    assert self_test.kernels_work(16)


@pytest.mark.usefixtures("gpu")
def test_kernels_work_while_tracing_passes() -> None:
    passed = []
    jax.jit(lambda x: passed.append(self_test.kernels_work(16)) or x)(1.0)
    assert passed == [True]


@pytest.mark.usefixtures("gpu")
def test_kernels_work_without_jit_passes() -> None:
    with jax.disable_jit(), jax.transfer_guard("disallow"):
        assert self_test.kernels_work(16)


WRONG: dict[str, Any] = {
    "hopper_matmul_add": lambda x, w, t, b, *, transpose_rhs: x @ (w.T if transpose_rhs else w),
    "lora_grads": lambda dy, t, b: (dy @ b.T, t.T @ (dy + 1)),
}


@pytest.mark.parametrize("name", WRONG)
def test_kernels_work_wrong_kernel_warns(name: str, gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(hopper, name, WRONG[name])
    with pytest.warns(RuntimeWarning, match="results are off by .* Plain products are used"):
        assert not self_test.kernels_work(16)


def test_kernels_work_broken_kernel_warns(gpu: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no such instruction")

    gpu.setattr(hopper, "hopper_matmul_add", broken)
    with pytest.warns(RuntimeWarning, match="NotImplementedError: no such instruction"):
        assert not self_test.kernels_work(16)


def test_kernels_work_is_false_on_many_gpus(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(jax, "device_count", lambda: 2)
    assert not self_test.kernels_work(16)
