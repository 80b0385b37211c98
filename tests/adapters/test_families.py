"""The laws, for every adapter method on every kind of layer that it supports."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _support.cases import (
    BY_NAME,
    DIFFERENTIABLE,
    FAMILIES,
    LAYERS,
    Case,
    base_output,
    case,
    errors,
    moved,
    total,
)
from _support.hlo import weight_shaped_products
from _support.materialized import record_materialized
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora
from jlora.adapters import format_families_table
from jlora.adapters.base import count_trainable_elements, get_adapter_leaves

OTHERS = sorted(set(DIFFERENTIABLE) - set(LAYERS))
REST = sorted(set(FAMILIES) - {"lora"})  # test_laws.py covers LoRA.
EMBEDDINGS = {"embed", "tied_embedding", "look_up_with_a_filling", "looked_up_rows_joined"}


def kinds(layer: str) -> set[str]:
    if layer in EMBEDDINGS:
        return {"embedding", "linear"} if layer == "looked_up_rows_joined" else {"embedding"}
    return {"convolution"} if "conv" in layer else {"linear"}


# Supported pairs on which the laws cannot be observed.
UNTESTABLE = {
    ("ia3", "weight_norm"),  # The norm cancels a gain on the outputs.
    # Uses of a part of the input, but LoRAMoE's router needs the full input.
    ("mixture", "concatenated_inputs"),
    ("mixture", "used_twice"),
    ("mixture", "strided_slices"),
    # LoRAMoE is not a function of a weight, which a custom derivative could differentiate.
    ("mixture", "in_custom_vjp"),
    ("mixture", "in_custom_vjp_true"),
    ("mixture", "in_custom_jvp"),
    ("mixture", "through_an_identity_with_a_rule"),
}


def grid(layers: list[str]) -> list[Any]:
    pairs = [(family, layer) for family in REST for layer in layers]
    return [pytest.param(*pair, id="-".join(pair)) for pair in pairs if pair not in UNTESTABLE]


# Methods with the same kind of terms. On the other layers those that support the layer alternate,
# so that each kind of term is tested on every layer; the rest refuse it.
# tests/interpreter/test_rule_properties.py tests the rules on products of drawn operands.
RELATED = [
    ["lora_fa", "adalora", "vera"],
    ["dylora", "sora", "vb_lora"],
    ["dora", "dora_through_norm"],
    ["loha", "loha_tucker"],
    ["lokr", "lokr_tucker", "lokr_pairs"],
    ["fourierft", "fourierft_whole"],
    ["ia3", "ia3_inputs"],
]


def has_turn(family: str, layer: str) -> bool:
    group = next((group for group in RELATED if family in group), [family])
    able = [name for name in group if kinds(layer) <= FAMILIES[name].config.supported_kinds]
    return family not in able or able[OTHERS.index(layer) % len(able)] == family


GRID = grid(LAYERS) + [
    pytest.param(*one.values, id=one.id, marks=pytest.mark.slow)
    for one in grid(OTHERS)
    if has_turn(*one.values)
]


def case_or_skip(family: str, layer: str, dtype: str = "float32") -> Case:
    """The case; skips when the method rejects the layer with an error that names it."""
    config = FAMILIES[family].config
    try:
        return case(layer, dtype, family)
    except ValueError as error:
        text = str(error)
        assert type(config).__name__ in text
        refused = "defined for" in text and not kinds(layer) <= config.supported_kinds
        if family == "mixture":
            reasons = ("already routed", "is materialized", "used transposed")
            refused |= any(reason in text for reason in reasons)
        if family == "fourierft_whole":
            refused |= "entries" in text
        assert refused, text
        pytest.skip("the method rejects this layer")


def ones(*shape: int) -> jax.Array:
    return jax.device_put(np.ones(shape, np.float32))


def close(values: Any, truth: Any, relative: float = 3e-5) -> None:
    """Checks float32 sums of at most 60 products, in another order."""
    for error, size in errors(values, truth):
        assert error <= relative * (1 + size), (error, size)


@pytest.mark.parametrize(("family", "layer"), GRID)
@pytest.mark.thin(4)
def test_laws_hold(family: str, layer: str) -> None:
    """One test per method and layer, because the laws share compiled programs."""
    one = case_or_skip(family, layer)
    law_apply_equals_merge_with_gradients(one, family)
    law_fresh_adapter_is_base(one, family)
    law_gradient_forms_no_frozen_weight_shape(one, family)
    law_explain_matches_evaluation(one)


def law_apply_equals_merge_with_gradients(one: Case, family: str) -> None:
    if not FAMILIES[family].merges:
        with pytest.raises(ValueError, match=r"LoRAMoE on .* routes by the input"):
            one.lora.merge(one.params, one.adapter)
        return

    def merged(adapter: Any) -> Any:
        output = one.fn(jlora.merge(one.params, adapter), *one.inputs)
        return total(output), output

    # One layer casts its weight to bfloat16, whose spacing is 2^-8, before it multiplies.
    relative = 2**-6 if one.layer.name == "cast" else 3e-5
    gradient, output = jax.jit(jax.grad(merged, has_aux=True))(one.adapter)
    close(one.output, output, relative)
    ours, frozen = jlora.partition(one.gradient)
    close(ours, jlora.partition(gradient)[0], relative)
    close(frozen, jax.tree.map(lambda leaf: np.zeros(leaf.shape), frozen))


def law_fresh_adapter_is_base(one: Case, family: str) -> None:
    base = base_output(one.layer.name, "float32")
    fresh = one.output_of(one.fresh)
    if FAMILIES[family].starts_at_base:
        close(fresh, base)
    else:
        assert max(error for error, _ in errors(fresh, base)) > 0
    # Rounding alone is below 1e-5.
    assert max(error for error, _ in errors(one.output, base)) > 1e-4, "nothing was adapted"


# Layers whose operations on the weight an update cannot follow, so that the weight is materialized:
# a Kronecker factor's axis cannot be sliced or joined, nor a gain extended beyond its part.
MATERIALIZED = {
    "fused_qkv": {"lokr", "lokr_pairs"},
    "concatenated_inputs": {
        *("lokr", "lokr_tucker", "lokr_pairs"),
        *("ia3", "dora", "dora_through_norm"),
    },
}
WEIGHT_SIZED = {"full", "hira", "fourierft_whole"}


def law_gradient_forms_no_frozen_weight_shape(one: Case, family: str) -> None:
    rows = [row for row in one.explanation.rows if row.adapter != "frozen"]
    summed = any(row.dense_reasons for row in rows)
    sized = any("full-size" in row.adapter for row in rows)
    name = one.layer.name
    if one.layer in [BY_NAME[layer] for layer in LAYERS]:
        assert summed == (
            one.layer.dense or family == "full" or family in MATERIALIZED.get(name, ())
        )
    assert sized == (family in WEIGHT_SIZED - {"full"}) or family.startswith("fourierft")
    shapes = {row.shape for row in rows}
    for row in rows:  # And those of one entry of a stack.
        batch = row.axes.batch if row.axes else ()
        shapes.add(tuple(n for axis, n in enumerate(row.shape) if axis not in batch))
    found = weight_shaped_products(one.program.as_text(), shapes, with_slices=False)
    if name.startswith("in_custom"):
        # A custom derivative returns the weight's gradient, which Hadamard products and gains need
        # at full size.
        return
    assert summed or sized or not found, found


def law_explain_matches_evaluation(one: Case) -> None:
    explanation = one.explanation
    with record_materialized() as seen:
        jax.eval_shape(lambda: one.lora.apply(one.params, one.adapter, *one.inputs))
    adapted = [row for row in explanation.rows if row.adapter != "frozen"]
    assert set(seen) == {row.path for row in adapted if row.dense_reasons}
    assert explanation.trainable_params == sum(map(count_trainable_elements, one.adapter.values()))
    assert not explanation.errors


@pytest.mark.parametrize("family", REST)
@pytest.mark.thin(3)
def test_lora_optimizer_skips_frozen_arrays(
    family: str,
) -> None:
    one = case("embed" if family == "token_rows" else "dense_general", "float32", family)
    optimizer = jlora.lora_optimizer(optax.adam(0.1))
    state = optimizer.init(one.adapter)
    sizes = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert sizes == 2 * sum(map(count_trainable_elements, one.adapter.values()))
    gradient = one.gradient
    updates, _ = optimizer.update(gradient, state, one.adapter)
    after = optax.apply_updates(one.adapter, updates)
    chex.assert_trees_all_equal(jlora.partition(after)[1], jlora.partition(one.adapter)[1])
    for now, before in zip(
        jax.tree.leaves(jlora.partition(after)[0]),
        jax.tree.leaves(jlora.partition(one.adapter)[0]),
        strict=True,
    ):
        assert not np.array_equal(now, before)


@pytest.mark.parametrize("family", REST)
@pytest.mark.parametrize("layer", ["dense_general", "linen_scan_remat", "conv_groups", "embed"])
@pytest.mark.thin(6)
def test_vmap_over_adapters_equals_single(family: str, layer: str) -> None:
    one = case_or_skip(family, layer)
    adapters = [moved(one.fresh, seed) for seed in (3, 4, 5)]
    apart = [one.compiled(one.params, adapter, *one.inputs) for adapter in adapters]
    stack = lambda trees: jax.tree.map(lambda *leaves: jax.device_put(np.stack(leaves)), *trees)
    run = jax.jit(jax.vmap(one.lora.apply, in_axes=(None, 0, *(None for _ in one.inputs))))
    close(run(one.params, stack(adapters), *one.inputs), stack(apart))


@pytest.mark.parametrize("family", REST)
@pytest.mark.parametrize("layer", ["dense_general", "linen_scan_remat"])
@pytest.mark.thin(3)
def test_apply_sharded_equals_unsharded(family: str, layer: str) -> None:
    one = case_or_skip(family, layer)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def place(array: jax.Array) -> jax.Array:
        # The first axis of even size, over two devices.
        spec = [None] * array.ndim
        for axis, size in enumerate(array.shape):
            if size % 2 == 0:
                spec[axis] = "data"
                break
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    params, adapter, inputs = jax.tree.map(place, (one.params, one.adapter, one.inputs))
    close(jax.jit(one.lora.apply)(params, adapter, *inputs), one.output)


@pytest.mark.parametrize("family", REST)
@pytest.mark.thin(3)
def test_apply_second_adapter_does_not_recompile(family: str) -> None:
    one = case("embed" if family == "token_rows" else "attention", "float32", family)
    run = jax.jit(one.lora.apply)
    run(one.params, one.adapter, *one.inputs)
    run(one.params, moved(one.fresh, 9), *one.inputs)
    run(
        one.params,
        jax.tree.map(lambda leaf: jax.device_put(np.array(leaf)), one.adapter),
        *one.inputs,
    )
    assert run._cache_size() == 1


@pytest.mark.parametrize("family", REST)
@pytest.mark.parametrize("layer", ["attention", "linen_scan", "conv_2d"])
@pytest.mark.thin(2)
def test_save_load_is_bitwise_equal(family: str, layer: str, tmp_path: Any) -> None:
    one = case_or_skip(family, layer)
    path = tmp_path / "adapter.safetensors"
    jlora.save_adapter(path, one.adapter, one.params)
    loaded = jlora.load_adapter(path, one.params)
    chex.assert_trees_all_equal_structs(loaded, one.adapter)
    chex.assert_trees_all_equal(loaded, one.adapter)


def formula_num_params(family: str) -> Any:
    """The number of parameters by the table's formula, for a weight (6, 10)."""
    config = FAMILIES[family].config
    names = {"d": 6, "k": 10, "r": getattr(config, "rank", None), "n": 0, "e": 0, "h": 0, "b": 1}
    names |= {"n": getattr(config, "num_frequencies", 0), "e": getattr(config, "num_experts", 0)}
    names |= {"h": getattr(config, "num_vectors", 0)}
    if family == "token_rows":
        names["n"] = len(config.token_indices)
    names |= {"d1": 2, "d2": 3, "k1": 2, "k2": 5}
    return eval(config.info.num_params_formula, {"__builtins__": {}}, names)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"lokr_pairs", "ia3_inputs"}))
def test_num_params_match_formula(family: str) -> None:
    params, x = {"w": ones(6, 10)}, ones(4, 6)
    fn = lambda p, x: x @ p["w"]
    if family == "token_rows":
        fn, x = lambda p, x: p["w"][x], jax.device_put(np.arange(4))
    lora = jlora.lora_transform(fn, {"w": FAMILIES[family].config})
    adapter = lora.init(jax.random.key(0), params, x)
    assert count_trainable_elements(adapter["w"]) == formula_num_params(family)
    explanation = lora.explain(params, x)
    assert explanation.trainable_params == sum(map(count_trainable_elements, adapter.values()))


def test_readme_methods_table_is_current() -> None:
    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    assert format_families_table() in readme


# --- shared arrays -------------------------------------------------------------------------------


def test_vera_shared_pair_is_stored_once() -> None:
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    params, x = {"a": ones(6, 10), "b": ones(10, 3)}, ones(4, 6)
    lora = jlora.lora_transform(fn, jlora.VeRA(rank=4))
    adapter = lora.init(jax.random.key(0), params, x)
    assert set(adapter) == {"a", "b", "vera"}
    assert adapter["vera"].a.shape == (10, 4)
    assert adapter["vera"].b.shape == (4, 10)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == 2 * 40 + (4 + 10) + (4 + 3)


def test_share_name_clash_raises() -> None:
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    params, x = {"a": ones(6, 10), "b": ones(10, 3)}, ones(4, 6)
    rules = {"a": jlora.VeRA(rank=4), "b": jlora.VeRA(rank=2)}
    with pytest.raises(ValueError, match=r"'vera', which VeRA\(rank=4.*another name"):
        jlora.lora_transform(fn, rules).init(jax.random.key(0), params, x)
    rules = {"a": jlora.VeRA(rank=4), "b": jlora.VeRA(rank=2, share="small")}
    adapter = jlora.lora_transform(fn, rules).init(jax.random.key(0), params, x)
    assert set(adapter) == {"a", "b", "vera", "small"}
    rules = {"a": jlora.VeRA(rank=4, share="b")}
    with pytest.raises(ValueError, match=r"'b', which a weight of that path has"):
        jlora.lora_transform(fn, rules).init(jax.random.key(0), params, x)
    rules = {"a": jlora.VeRA(rank=4), "b": jlora.VeRA(rank=4, share="b")}
    (error,) = jlora.lora_transform(fn, rules).explain(params, x).errors
    assert "'b', which a weight of that path has" in error


def test_apply_missing_shared_arrays_raises() -> None:
    one = case("dense_general", "float32", "vera")
    part = get_adapter_leaves(one.adapter)
    with pytest.raises(ValueError, match=r"shares arrays under 'vera', which the adapter lacks"):
        one.lora.apply(one.params, part, *one.inputs)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jlora.DyLoRA(rank=2, alpha=1, min_rank=3), "min_rank=3 exceeds rank=2"),
        (
            lambda: jlora.DyLoRA(rank=2, alpha=1, init=jlora.initializers.pissa()),
            "takes an update of all ranks",
        ),
        (lambda: jlora.HiRA(rank=2, init=jlora.initializers.olora()), "starts at zero"),
        (lambda: jlora.FourierFT(num_frequencies=0), "frequencies=0 must be a positive integer"),
        (
            lambda: jlora.FourierFT(num_frequencies=2, std=-1.0),
            "std=-1.0 must be a standard deviation",
        ),
        (lambda: jlora.IA3(apply_to="values"), "apply_to='values' must be"),
        (lambda: jlora.VBLoRA(num_vectors=2, top_k=3), "top_k=3 exceeds num_vectors=2"),
        (lambda: jlora.LoRAMoE(num_experts=2, rank=2, alpha=1, top_k=3), "exceeds num_experts=2"),
        (lambda: jlora.LoKr(rank=2, alpha=1, factor=0), "factor=0 must be a positive integer"),
        (lambda: jlora.LoHa(rank=2, alpha=1, tucker=1), "tucker=1 must be True or False"),
        (lambda: jlora.VeRA(rank=2, share=""), "share='' must be a nonempty string"),
        (lambda: jlora.VeRA(rank=2, d_initial=0), "d_initial=0 must be positive and finite"),
        (lambda: jlora.LoRA(rank=2, alpha=1, init="pissa"), "must be one of jlora.initializers"),
    ],
)
def test_config_invalid_field_raises_with_fix(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        make()


def test_init_shapes_only_raises_if_values_needed() -> None:
    shapes = {"w": jax.ShapeDtypeStruct((6, 5), jnp.float32)}
    x = jax.ShapeDtypeStruct((4, 6), jnp.float32)
    for config in (
        jlora.DoRA(rank=2, alpha=1),
        jlora.LoRA(rank=2, alpha=1, init=jlora.initializers.pissa()),
    ):
        lora = jlora.lora_transform(lambda p, x: x @ p["w"], config)
        with pytest.raises(
            TypeError, match=r"values of 'w', got only its shape.*loaded parameters"
        ):
            lora.init(jax.random.key(0), shapes, x)
        assert lora.explain(shapes, x).trainable_params  # explain needs no values.


def test_vb_lora_indivisible_length_raises() -> None:
    lora = jlora.lora_transform(
        lambda p, x: x @ p["w"], {"w": jlora.VBLoRA(rank=2, num_vectors=4, vector_length=4)}
    )
    with pytest.raises(
        ValueError, match=r"vector_length=4 does not divide its 6 inputs and 8 outputs"
    ):
        lora.init(jax.random.key(0), {"w": ones(6, 8)}, ones(2, 6))


def test_bitfit_adapts_only_biases() -> None:
    one = case("attention", "float32")
    lora = jlora.lora_transform(one.fn, jlora.BitFit())
    adapter = lora.init(jax.random.key(0), one.params, *one.inputs)
    assert {path.rsplit("/", 1)[-1] for path in adapter} == {"bias"}
    assert len(adapter) == 4
    close(
        lora.apply(one.params, moved(adapter), *one.inputs),
        one.fn(lora.merge(one.params, moved(adapter)), *one.inputs),
    )
    named = jlora.lora_transform(one.fn, {"query": jlora.BitFit()})
    with pytest.raises(ValueError, match=r"query/kernel.*not a bias.*used by: dot_general"):
        named.init(jax.random.key(0), one.params, *one.inputs)
    with pytest.raises(ValueError, match="None of the 1 weights is a bias"):
        jlora.lora_transform(lambda p, x: x @ p["w"], jlora.BitFit()).init(
            jax.random.key(0), {"w": ones(6, 5)}, ones(4, 6)
        )


def test_full_delta_norms_with_lora() -> None:
    one = case("linen_scan", "float32")
    rules = {"LayerNorm": jlora.FullDelta(), "kernel": jlora.LoRA(rank=2, alpha=3)}
    lora = jlora.lora_transform(one.fn, rules)
    adapter = moved(lora.init(jax.random.key(0), one.params, *one.inputs))
    assert len(adapter) == 4
    merged = jax.jit(one.fn)(lora.merge(one.params, adapter), *one.inputs)
    close(jax.jit(lora.apply)(one.params, adapter, *one.inputs), merged)
    assert set(jax.tree.leaves(jlora.param_labels(adapter))) == {"a", "b", "full"}
