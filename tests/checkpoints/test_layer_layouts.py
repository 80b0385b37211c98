"""Adapters of stacked and of separate layers: one form in files, and each loads on the other's."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from _support.cases import FAMILIES, moved

import jlora
from jlora import _tree, merging, models, multi_lora
from jlora.adapters import WeightAxes, match_layer_layout
from jlora.adapters.full import FullDeltaLeaf
from jlora.checkpoints import content_hash

LLAMA = pathlib.Path(__file__).parent.parent / "models" / "data" / "decoders" / "llama"
IDS = np.array([[3, 5, 2, 9], [7, 1, 8, 30]])
KERNELS = r"(q|v|down)/kernel$"


@functools.cache
def loaded(stacked: bool, dtype: str = "float32") -> Any:
    return models.load(LLAMA, dtype=dtype, scan_layers=stacked)


def adapted(stacked: bool, rules: Any) -> Any:
    """An adapter moved off zero."""
    model, params = loaded(stacked)
    return moved(jlora.lora_transform(model.apply, rules).init(jax.random.key(0), params, IDS))


def logits(stacked: bool, adapter: Any) -> np.ndarray:
    model, params = loaded(stacked)
    lora = jlora.lora_transform(model.apply)
    return np.asarray(jax.jit(lora.apply)(params, adapter, IDS))


def assert_same(adapter: Any, other: Any) -> None:
    assert jax.tree.structure(adapter) == jax.tree.structure(other)
    for value, expected in zip(jax.tree.leaves(adapter), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(value, expected)


LINEAR = sorted(set(FAMILIES) - {"token_rows"})  # Of an embedding, which is in no layer.


@pytest.mark.parametrize("family", LINEAR)
@pytest.mark.thin(8)
def test_match_layer_layout_keeps_function(family: str) -> None:
    stack = adapted(True, {KERNELS: FAMILIES[family].config})
    separate = match_layer_layout(stack, loaded(False).params)
    assert any("layers_1/attention/q/kernel" in path for path in separate)
    # The same sums in another program.
    np.testing.assert_allclose(logits(False, separate), logits(True, stack), atol=2e-5)
    assert_same(match_layer_layout(separate, loaded(True).params), stack)
    assert content_hash(separate) == content_hash(stack)


def test_match_layer_layout_fitting_is_unchanged() -> None:
    stack = adapted(True, {KERNELS: FAMILIES["lora"].config, "norm/scale": jlora.FullDelta()})
    assert all(
        match_layer_layout(stack, loaded(True).params)[path] is stack[path] for path in stack
    )


def test_save_adapter_layouts_write_same_bytes(tmp_path: pathlib.Path) -> None:
    rules = {KERNELS: jlora.LoRA(rank=2, alpha=4), "norm/scale": jlora.FullDelta()}
    stack = adapted(True, rules)
    separate = match_layer_layout(stack, loaded(False).params)
    for name, adapter, stacked in (("stack", stack, True), ("separate", separate, False)):
        jlora.save_adapter(tmp_path / name, adapter, loaded(stacked).params)
    assert (tmp_path / "stack").read_bytes() == (tmp_path / "separate").read_bytes()
    with safetensors.safe_open(tmp_path / "stack", "numpy") as file:
        assert "params/layers_1/attention/q/kernel/a" in file.keys()  # noqa: SIM118
        assert file.get_tensor("params/layers_1/attention/q/kernel/a").shape == (12, 2)
    assert_same(jlora.load_adapter(tmp_path / "stack", loaded(True).params), stack)
    assert_same(jlora.load_adapter(tmp_path / "stack", loaded(False).params), separate)


def test_load_adapter_other_layer_raises(tmp_path: pathlib.Path) -> None:
    """One layer of the stack has other values."""
    jlora.save_adapter(
        tmp_path / "a", adapted(False, {KERNELS: FAMILIES["lora"].config}), loaded(False).params
    )
    params = jax.tree.map(lambda x: x, loaded(True).params)
    kernel = params["params"]["layers"]["mlp"]["down"]["kernel"]
    params["params"]["layers"]["mlp"]["down"]["kernel"] = kernel.at[1].multiply(2)
    with pytest.raises(ValueError, match=r"layers_1/mlp/down/kernel' \(1 of 6 adapted"):
        jlora.load_adapter(tmp_path / "a", params)
    jlora.load_adapter(tmp_path / "a", params, allow_other_base=True)


@pytest.mark.slow
def test_load_adapter_quantized_layouts_match(tmp_path: pathlib.Path) -> None:
    """An adapter of a quantized stack loads on separate layers, quantized or not."""
    bases = {
        stacked: models.load(LLAMA, scan_layers=stacked, quantize={KERNELS: jlora.Int8()}).params
        for stacked in (True, False)
    }
    stack = adapted(True, {KERNELS: FAMILIES["lora"].config})
    jlora.save_adapter(tmp_path / "a", stack, bases[True])
    assert_same(jlora.load_adapter(tmp_path / "a", bases[True]), stack)
    separate = match_layer_layout(stack, bases[False])
    assert_same(jlora.load_adapter(tmp_path / "a", bases[False]), separate)
    plain = models.load(LLAMA, scan_layers=False).params
    assert_same(jlora.load_adapter(tmp_path / "a", plain), separate)


def test_stack_layers_of_other_ranks_is_padded() -> None:
    rules = {
        "layers_0/attention/q": jlora.LoRA(rank=3, alpha=3),
        "layers_1/attention/q": jlora.LoRA(rank=1, alpha=5),
        "layers_1/attention/v": jlora.LoRA(rank=2, alpha=4),  # Layer 0 has none.
    }
    separate = adapted(False, rules)
    stack = match_layer_layout(separate, loaded(True).params)
    assert stack["params/layers/attention/q/kernel"].rank == 3
    np.testing.assert_allclose(logits(True, stack), logits(False, separate), atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_stack_layers_narrow_factors_keep_size(dtype: Any, tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    bases = {False: {f"layers_{i}": {"w": np.zeros((6, 5), np.float32)} for i in range(2)}}
    bases[True] = {"layers": {"w": np.zeros((2, 6, 5), np.float32)}}
    separate, expected = {}, []
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=1))
    fresh = lora.init(jax.random.key(0), bases[False]["layers_0"], np.ones((1, 6)))["w"]
    for i, alpha in enumerate((1e-3, 1e3)):
        a = jnp.asarray(rng.normal(size=(6, 2)), dtype)
        b = jnp.asarray(rng.normal(size=(2, 5)) / 50, dtype)
        separate[f"layers_{i}/w"] = dataclasses.replace(fresh, a=a, b=b, alpha=alpha)
        expected.append(alpha / 2 * np.float64(a) @ np.float64(b))
    stack = match_layer_layout(separate, bases[True])
    jlora.save_adapter(tmp_path / "a", stack, bases[True])
    for adapter in (stack, jlora.load_adapter(tmp_path / "a", bases[True])):
        merged = jlora.merge(bases[True], adapter)["layers"]["w"]
        for found, wanted in zip(np.asarray(merged), expected, strict=True):
            assert np.abs(found - wanted).max() < 1e-6 * np.abs(wanted).max()
    # Rounding of a narrow product, and of its sum of six.
    x = rng.normal(size=(3, 6)).astype(dtype)
    run = jlora.lora_transform(lambda p, x: jnp.stack([x @ w for w in p["layers"]["w"]]))
    narrow = jax.tree.map(lambda w: w.astype(dtype), bases[True])
    outputs = np.float64(run.apply(narrow, stack, x))
    for found, wanted in zip(outputs, expected, strict=True):
        exact = np.float64(x) @ wanted
        assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"layers_1/attention/q": jlora.DoRA(rank=1, alpha=1)},
            r"the layers \[0\] have no adapter",
        ),
        (
            {
                "layers_0/attention/q": jlora.LoRA(rank=1, alpha=1),
                "layers_1/attention/q": jlora.IA3(),
            },
            "their methods or settings differ. Load the model with",
        ),
    ],
)
def test_stack_layers_that_differ_raises(rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"attention/q/kernel' cannot be stacked: {message}"):
        match_layer_layout(adapted(False, rules), loaded(True).params)


def test_stack_layers_past_the_stack_raises() -> None:
    separate = adapted(False, {"layers_1/attention/q": FAMILIES["lora"].config})
    path, leaf = next(iter(separate.items()))
    past = {path.replace("layers_1", "layers_7"): leaf}
    with pytest.raises(ValueError, match=r"layers \[7\] of shapes .* which stacks 2 layers"):
        match_layer_layout(past, loaded(True).params)


def test_merge_and_combine_take_both_layouts() -> None:
    stack = adapted(True, {KERNELS: FAMILIES["lora"].config})
    separate = match_layer_layout(stack, loaded(False).params)
    for stacked in (True, False):
        params = loaded(stacked).params
        fits, other = (stack, separate) if stacked else (separate, stack)
        assert_same(jlora.merge(params, other), jlora.merge(params, fits))
        assert_same(
            jlora.merge_to_dtype(params, other).params, jlora.merge_to_dtype(params, fits).params
        )
        mixed = merging.combine_adapters([stack, separate], [1.0, 2.0], params=params)
        assert set(mixed.adapter) == set(fits)
    mixed = merging.combine_adapters([stack, separate], [1.0, 2.0])
    thrice = jlora.merge(
        loaded(False).params,
        separate
        | {
            path: dataclasses.replace(leaf, alpha=3 * leaf.alpha) for path, leaf in separate.items()
        },
    )
    merged = jlora.merge(loaded(False).params, mixed.adapter)
    for value, expected in zip(jax.tree.leaves(merged), jax.tree.leaves(thrice), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)  # Sums of float32.


def test_bank_takes_both_layouts() -> None:
    model, params = loaded(True)
    stack = adapted(True, {KERNELS: FAMILIES["lora"].config})
    lora = jlora.lora_transform(model.apply)
    bank = multi_lora.AdapterBank(lora, params, stack, slots=3)
    bank.add("stack", stack)
    bank.add("separate", match_layer_layout(stack, loaded(False).params))
    assert bank.content_hash("stack") == bank.content_hash("separate")
    out = bank.apply(params, ["stack", "separate"], np.stack([IDS[0], IDS[0]]))
    np.testing.assert_array_equal(out[0], out[1])


def both(params: Any, x: Any) -> Any:
    """A dense layer, and a stack of three more."""
    x = jnp.tanh(x @ params["layers_0"]["w"])
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"]["w"])[0]


def deep(params: Any, x: Any) -> Any:
    return both({name: params["enc"][name]["m"] for name in ("layers_0", "layers")}, x)


def nested(params: Any, x: Any) -> Any:
    """Two stacks of three layers."""

    def outer(x: Any, stack: Any) -> Any:
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)[0], None

    return jax.lax.scan(outer, x, params["layers"]["layers"]["w"])[0]


def listed(params: Any, x: Any) -> Any:
    """Lists of layers have a number as a key; names with zeros in front are other names."""
    for layer in (*params["layers"], params["layers_1"], params["layers_01"]):
        x = x @ layer["w"] * layer["scale"]
    return x


def small_base(shapes: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32) / 2,
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


ONE, STACK = {"w": (4, 4)}, {"w": (3, 4, 4)}
SCALED = {"w": (4, 4), "scale": (4,)}
BASES = {
    "both": (both, {"layers": STACK, "layers_0": ONE}),
    "deep": (deep, {"enc": {"layers": {"m": STACK}, "layers_0": {"m": ONE}}}),
    "nested": (nested, {"layers": {"layers": {"w": (2, 3, 4, 4)}}}),
    "listed": (listed, {"layers": [SCALED, SCALED], "layers_1": SCALED, "layers_01": SCALED}),
}
RULES = {"w$": jlora.LoRA(rank=2, alpha=2), "scale": jlora.FullDelta()}


@functools.cache
def small(name: str, rules: Any = None) -> Any:
    """Function, base and an adapter moved off zero."""
    fn, shapes = BASES[name]
    params = small_base(shapes)
    used = {key: RULES[key] for key in (rules or ("w$", "scale")[: 1 + (name == "listed")])}
    lora = jlora.lora_transform(fn, used)
    return params, moved(lora.init(jax.random.key(0), params, np.ones((2, 4), np.float32)))


@pytest.mark.parametrize("name", BASES)
def test_save_adapter_keeps_all_layers(name: str, tmp_path: pathlib.Path) -> None:
    params, adapter = small(name)
    jlora.save_adapter(tmp_path / "a", adapter, params)
    with safetensors.safe_open(tmp_path / "a", "numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    stored = np.sort(np.concatenate([value.ravel() for value in tensors.values()]))
    given = [np.ravel(value) for value in jax.tree.leaves(adapter)]
    np.testing.assert_array_equal(stored, np.sort(np.concatenate(given)))
    loaded = jlora.load_adapter(tmp_path / "a", params)
    assert_same(loaded, {path: adapter[path] for path in loaded})
    assert set(loaded) == set(adapter)
    assert content_hash(loaded) == content_hash(adapter)
    if name == "nested":
        assert tensors["layers_1/layers_2/w/a"].shape == (4, 2)
    if name == "listed":
        assert tensors["layers/0/scale/delta"].shape == (4,)


def test_save_adapter_of_stack_beside_layer(tmp_path: pathlib.Path) -> None:
    # The base has a weight of a layer's name, which the adapter leaves alone.
    params, adapter = small("both")
    for path in adapter:
        jlora.save_adapter(tmp_path / "a", {path: adapter[path]}, params)
        for other in (False, True):
            loaded = jlora.load_adapter(tmp_path / "a", params, allow_other_base=other)
            assert_same(loaded, {path: adapter[path]})
    values = {"layers_0": params["layers_0"], "layers_1": params["layers_0"]}
    jlora.save_adapter(tmp_path / "a", {"layers/w": adapter["layers/w"]}, params)
    with pytest.raises(ValueError, match="was trained on another base"):
        jlora.load_adapter(tmp_path / "a", {**values, "layers_2": params["layers_0"]})


@pytest.mark.parametrize("path", ["layers/w", "layers_0/w"])
def test_content_hash_covers_all_layers(path: str) -> None:
    _, adapter = small("both")
    leaf = adapter[path]
    changed = {**adapter, path: dataclasses.replace(leaf, b=leaf.b + 1)}
    assert content_hash(changed) != content_hash(adapter)


def test_merging_stack_beside_layer_keeps_both() -> None:
    params, adapter = small("both")
    first = {"layers_0/w": adapter["layers_0/w"]}
    mixed = merging.weighted_sum({"all": adapter, "first": first}, [0.5, 0.5])
    mixed_params = jlora.merge(params, mixed)
    expected = jlora.merge(params, adapter)
    stack = (params["layers"]["w"] + expected["layers"]["w"]) / 2  # Of one adapter of the two.
    np.testing.assert_allclose(mixed_params["layers"]["w"], stack, atol=1e-6)
    np.testing.assert_allclose(
        mixed_params["layers_0"]["w"], expected["layers_0"]["w"], atol=1e-6
    )  # Sums of float32.
    with pytest.raises(ValueError, match="has 'layers/w', and another some of its layers but not"):
        merging.weighted_sum({"a": {"layers/w": adapter["layers/w"]}, "b": first}, [0.5, 0.5])


def nested_layouts() -> dict[str, Any]:
    """The base of stacks in a stack in each of its layouts."""
    weights = small("nested")[0]["layers"]["layers"]["w"]

    def apart(stack: Any, name: Any) -> Any:
        return {f"layers_{i}": name(layer) for i, layer in enumerate(stack)}

    def alone(weight: Any) -> Any:
        return {"w": weight}

    return {
        "outer": {"layers": apart(np.swapaxes(weights, 0, 1), alone)},
        "inner": apart(weights, lambda stack: {"layers": {"w": stack}}),
        "none": apart(weights, lambda stack: apart(stack, alone)),
    }


@pytest.mark.parametrize("layout", ["outer", "inner", "none"])
def test_load_adapter_nested_stacks_converts(layout: str, tmp_path: pathlib.Path) -> None:
    params, adapter = small("nested")
    base = nested_layouts()[layout]
    jlora.save_adapter(tmp_path / "a", adapter, params)
    loaded = jlora.load_adapter(tmp_path / "a", base)
    leaf = adapter["layers/layers/w"]
    for outer, inner in np.ndindex(2, 3):
        found = jlora.merge(base, loaded)
        for name, index in (("layers", outer), ("layers", inner)):
            found = found[f"{name}_{index}"] if f"{name}_{index}" in found else found[name]
        index = {"outer": outer, "inner": inner}.get(layout, ...)
        product = leaf.a[outer, inner] @ leaf.b[outer, inner]  # Of alpha / rank = 1.
        expected = params["layers"]["layers"]["w"][outer, inner] + product
        np.testing.assert_allclose(found["w"][index], expected, atol=1e-6)
    jlora.save_adapter(tmp_path / "b", loaded, base)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert_same(jlora.load_adapter(tmp_path / "b", params), adapter)


@pytest.mark.parametrize("family", LINEAR)
@pytest.mark.thin(8)
def test_match_layer_layout_nested_stacks(family: str) -> None:
    params, x = small("nested")[0], np.ones((2, 4), np.float32)
    lora = jlora.lora_transform(nested, {"w": FAMILIES[family].config})
    adapter = moved(lora.init(jax.random.key(0), params, x))
    base = nested_layouts()["none"]
    separate = match_layer_layout(adapter, base)
    assert {f"layers_{i}/layers_{j}/w" for i, j in np.ndindex(2, 3)} <= set(separate)
    assert_same(match_layer_layout(separate, params), adapter)
    assert content_hash(separate) == content_hash(adapter)


def test_match_layer_layout_two_places_raises() -> None:
    params, adapter = small("both")
    apart = {f"layers_{i}": params["layers_0"] for i in range(3)}
    separate = match_layer_layout({"layers/w": adapter["layers/w"]}, apart)
    with pytest.raises(ValueError, match="'layers_0/w' may be a part of 'layers_0/w' or of"):
        match_layer_layout(separate, params)
    with pytest.raises(ValueError, match=r"has both 'layers/w' and layers \[\(0,\)\] of it"):
        match_layer_layout(adapter, {"layers": params["layers"]})
    delta = FullDeltaLeaf(delta=jnp.ones(3), shape=(3,), axes=WeightAxes((), (), ()))
    overlapping = dict.fromkeys(["layers_1/layers/w", "layers_1/layers_1/w"], adapter["layers_0/w"])
    with pytest.raises(ValueError, match=r"has both 'layers/layers/w' and layers \[\(1,\), \(1, 1"):
        match_layer_layout(overlapping, {"layers": {"layers": {"w": np.ones((2, 4, 4))}}})
    twice = dict.fromkeys(["layers/layers_0/w", "layers_0/layers/w"], adapter["layers_0/w"])
    with pytest.raises(ValueError, match=r"has both 'layers/layers/w' and layers \[\(0,\)\] of it"):
        match_layer_layout(twice, {"layers": {"layers": {"w": np.ones((2, 4, 4))}}})
    # Neither stack has its layers' names for itself.
    crossed = {"layers/layers_1/w": delta, "layers_1/layers/w": delta}
    base = {"layers": {"layers": {"w": np.ones((3, 3), np.float32)}}}
    assert set(match_layer_layout(crossed, base)) == set(crossed)
    with pytest.raises(ValueError, match=r"\(2 such of 2\), which params does not"):
        jlora.merge(base, crossed)
    with pytest.raises(ValueError, match="which stacks 0 layers"):
        match_layer_layout({"layers_0/w": delta}, {"layers": {"w": np.float32(1)}})
    # Not told apart by a stack that has no such layer.
    fourth = {"layers_7/w": adapter["layers_0/w"]}
    base = {"layers": params["layers"], "layers_7": params["layers_0"]}
    stack = match_layer_layout({**separate, **fourth}, base)
    assert set(stack) == {"layers/w", "layers_7/w"}


def test_save_adapter_of_giant_shape_raises(tmp_path: pathlib.Path) -> None:
    # The declared number of layers, of which the arrays have three.
    params, adapter = small("both")
    giant = {"layers/w": dataclasses.replace(adapter["layers/w"], shape=(10**12, 4, 4))}
    assert len(content_hash(giant)) == 64
    with pytest.raises(ValueError, match=r"built for a weight of shape \(1000000000000, 4, 4\)"):
        jlora.save_adapter(tmp_path / "a", giant, params)


def random_tree(rng: np.random.Generator) -> dict[str, Any]:
    """Paths of names that layers have, in any order."""
    tree: dict[str, Any] = {}
    for _ in range(rng.integers(1, 6)):
        *outer, last = rng.choice(["layers", "layers_0", "layers_1", "m"], rng.integers(1, 4))
        node = tree
        for key in outer:
            node = node.setdefault(key, {})
        node.setdefault(last, {})["w"] = np.zeros((2,) * rng.integers(1, 4), np.float32)
    return tree


def random_adapter(rng: np.random.Generator, params: Any) -> dict[str, Any]:
    flat = _tree.flatten_with_paths(params)
    return {
        path: FullDeltaLeaf(
            delta=jax.device_put(rng.normal(size=leaf.shape).astype(np.float32)),
            shape=leaf.shape,
            axes=WeightAxes((), (), ()),
        )
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        if rng.integers(4)
    }


def entries(adapter: Any) -> np.ndarray:
    values = np.concatenate([np.ravel(leaf.delta) for leaf in adapter.values()] + [np.zeros(0)])
    return np.sort(values[values != 0])


def test_random_trees_lose_no_layer(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    matched = 0
    for number in range(400):
        params, other = random_tree(rng), random_tree(rng)
        adapter = random_adapter(rng, params)
        if number % 10 == 0:
            jlora.save_adapter(tmp_path / "a", adapter, params)
            loaded = jlora.load_adapter(tmp_path / "a", params, allow_other_base=True)
            assert_same(loaded, {path: adapter[path] for path in loaded})
            assert len(loaded) == len(adapter)
        try:  # Errors are fine, lost entries are not.
            found = match_layer_layout(adapter, other)
        except ValueError:
            continue
        matched += set(found) != set(adapter)
        np.testing.assert_array_equal(entries(found), entries(adapter))
    assert matched > 20
