"""Runs on a quantized base: QLoRA as a section of a recipe."""

from __future__ import annotations

import importlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.training_fixtures import ANIMALS, Make
from _support.training_runs import After, measured, output, run, stop

import jlora
from jlora import _tree, cli, models
from jlora.quantization.quantize import choose_block_axis
from jlora.training import recipe
from jlora.training.setup import build_setup, schemes_from_recipe
from jlora.training.sharding import make_mesh
from jlora.training.signals import TrainingInterrupted

# The package has a function of this name.
train = importlib.import_module("jlora.training.train")

NF4 = {"scheme": "nf4", "block_size": 4}
TOKENS = jnp.array([[3, 9, 17, 30]])


def on_quantized(raw: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The model, the base as the run has it, and the adapter that it wrote."""
    base = raw["model"]["path"]
    model = models.model_from_config(base, scan_layers=True)
    schemes = schemes_from_recipe(recipe.validate(raw), model)
    model, params = models.load(base, dtype="float32", scan_layers=True, quantize=schemes)
    return model, params, jlora.load_adapter(output(raw) / "adapter.safetensors", params)


# --- outputs --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_quantized_exports_the_trained(recipe_of: Make, monkeypatch: Any) -> None:
    made: list[Any] = []
    original = train.build_setup
    monkeypatch.setattr(
        train, "build_setup", lambda *a, **k: made.append(original(*a, **k)) or made[-1]
    )
    raw = recipe_of(
        quantize=NF4,
        training={"steps": 24},
        report={"sample_prompts": ["who sees the cat?"], "max_new_tokens": 2},
        export={"merged": True, "merged_dtype": "float32", "peft": True},
    )
    run(raw)
    losses = [line["train/loss"] for line in measured(raw)]
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.5

    # The base is the same after as before, and nothing of its size is trained.
    model, params, adapter = on_quantized(raw)
    assert {str(leaf) for leaf in packed(params).values()} == {"nf4"}
    jax.tree.map(np.testing.assert_array_equal, made[0].frozen["base"], params)

    # The exports compute the trained model, up to rounding in float32.
    adapted = jlora.lora_transform(model.apply).apply(params, adapter, TOKENS)
    _, merged = models.load(output(raw) / "merged", dtype="float32", scan_layers=True)
    np.testing.assert_allclose(model.apply(merged, TOKENS), adapted, atol=2e-5)
    loaded = jlora.peft.load(output(raw) / "peft", model, params)
    out = jlora.lora_transform(model.apply).apply(*loaded, TOKENS)
    np.testing.assert_allclose(out, adapted, atol=2e-5)

    # The report and result.json contain it.
    page = (output(raw) / "report.html").read_text()
    assert "7 of 12 weights as nf4: " in page
    assert "into the dequantized weights: the model that was trained" in page
    told = json.loads((output(raw) / "result.json").read_text())
    found = _tree.flatten_with_paths(params).leaves
    assert told["base"] == sum(leaf.size for leaf in found)
    sizes = packed(params).values()
    bits = sum(leaf.bits * leaf.size for leaf in sizes) / sum(leaf.size for leaf in sizes)
    assert told["quantized"]["bits_per_param"] == pytest.approx(bits)
    assert (told["quantized"]["num_quantized"], told["quantized"]["schemes"]) == (7, ["nf4"])

    # The finished run can also export onto the original weights.
    raw["export"] |= {"merge_into": "original"}
    run(raw, resume=True)
    _, wide = models.load(raw["model"]["path"], dtype="float32", scan_layers=True)
    on_wide = jlora.load_adapter(output(raw) / "adapter.safetensors", wide)
    expected = jlora.lora_transform(model.apply).apply(wide, on_wide, TOKENS)
    _, merged = models.load(output(raw) / "merged", dtype="float32", scan_layers=True)
    np.testing.assert_allclose(model.apply(merged, TOKENS), expected, atol=2e-5)
    assert float(jnp.abs(expected - adapted).max()) > 1e-2
    assert "into the original weights, which are not" in (output(raw) / "report.html").read_text()


def packed(params: Any) -> dict[str, Any]:
    """The quantized weights by path."""
    flat = _tree.flatten_with_paths(params)
    pairs = zip(flat.paths, flat.leaves, strict=True)
    return {path: leaf for path, leaf in pairs if hasattr(leaf, "bits")}


@pytest.mark.slow
def test_resume_quantized_is_bit_exact(recipe_of: Make, tmp_path: pathlib.Path) -> None:
    saving = {"save_steps": 2, "save_interval_minutes": None, "save_total_limit": 9}
    whole = recipe_of(quantize=NF4, training={"steps": 4, **saving})
    run(whole)
    raw = {**whole, "output": str(tmp_path / "cut")}
    with pytest.raises(TrainingInterrupted):
        run(raw, callbacks=[After(2, stop)])
    for other, message in (
        (
            {"scheme": "int8", "block_size": 4},
            r"recipe \(quantize.scheme: nf4 in the checkpoint, int8 now; ",
        ),
        ({**NF4, "target_pattern": "/mlp/"}, "target_pattern: None in the checkpoint, /mlp/ now"),
        (None, r"recipe \(quantize.* in the checkpoint, None now"),
    ):
        with pytest.raises(ValueError, match=message):
            run({**raw, "quantize": other}, resume=True)
    run(raw, resume=True)
    assert measured(raw) == measured(whole)
    one, two = ((output(r) / "adapter.safetensors").read_bytes() for r in (raw, whole))
    assert one == two


@pytest.mark.slow
def test_mesh_keeps_quantized_losses(recipe_of: Make, tmp_path: pathlib.Path) -> None:
    losses, adapters = [], []
    for number, (devices, sizes) in enumerate(((1, {}), (8, {"fsdp": 4, "tensor": 2}))):
        raw = recipe_of(
            output=str(tmp_path / f"run-{number}"),
            quantize=NF4,
            batch={"size": 8},
            mesh=sizes,
            training={"steps": 3},
        )
        run(raw, devices=devices)
        losses.append([line["train/loss"] for line in measured(raw)])
        adapters.append(on_quantized(raw)[2])  # It refuses another base.
    # Sums in another order, in float32, over three steps that each build on the last.
    np.testing.assert_allclose(*losses, rtol=2e-5)


# --- shapes alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scanned", "quantize"),
    [
        (True, NF4),
        (False, {**NF4, "double_quantization": False}),
        (True, {"scheme": "int8", "block_size": 3, "target_pattern": "mlp|embed"}),
        pytest.param(True, {"scheme": "fp8"}, marks=pytest.mark.slow),
        pytest.param(True, {"scheme": "int4", "block_size": 2, "axis": -1}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_build_setup_abstract_has_the_shapes(
    recipe_of: Make, scanned: bool, quantize: dict[str, Any]
) -> None:
    sizes = {"fsdp": 4, "tensor": 2}
    raw = recipe_of(
        quantize=quantize, model={"scan_layers": scanned}, mesh=sizes, batch={"size": 8}
    )
    real, shapes = (
        build_setup(recipe.validate(raw), make_mesh(sizes), total_steps=3, abstract=abstract)
        for abstract in (False, True)
    )
    pairs = ((one.frozen, one.state) for one in (real, shapes))
    flat, treedefs = zip(*map(jax.tree.flatten, pairs), strict=True)
    assert treedefs[0] == treedefs[1]  # The scheme, axis, and length of every weight, too.
    for array, shape in zip(*flat, strict=True):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
        assert array.sharding.is_equivalent_to(shape.sharding, array.ndim)
    # Weights are quantized, split over both axes, and have the dtype of the computation.
    found = packed(shapes.frozen["base"])
    assert found
    split = {entry for leaf in found.values() for entry in leaf.codes.sharding.spec}
    assert {"fsdp", "tensor"} <= split
    assert {str(leaf.dtype) for leaf in found.values()} == {"float32"}


def test_abstract_params_of_an_encoder(encoder: pathlib.Path) -> None:
    rules = {"layer.*kernel$": jlora.NF4(block_size=4)}
    model, params = models.load(encoder, dtype="float32", quantize=rules)
    found = models.abstract_params(model, "float32", quantize=rules)
    jax.tree.map(
        lambda a, s: np.testing.assert_equal((a.shape, a.dtype), (s.shape, s.dtype)), params, found
    )


def test_abstract_params_blocks_skip_the_stack(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = json.loads((base / "config.json").read_text())
    # More layers than any other axis is long, and as many as a block.
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 64}))
    model = models.model_from_config(tmp_path, scan_layers=True)
    found = packed(models.abstract_params(model, "bfloat16", quantize={"kernel$": jlora.NF4()}))
    for leaf in found.values():
        assert leaf.axis == choose_block_axis(leaf.shape[1:], leaf.scheme)
        assert leaf.codes.shape[0] == 64


def test_explain_reports_quantization(base: pathlib.Path) -> None:
    model = models.model_from_config(base, scan_layers=True)
    params = models.abstract_params(
        model, "bfloat16", quantize={"mlp.*kernel$": jlora.Int8(block_size=2)}
    )
    told = jlora.lora_transform(model.apply, {"q/kernel": None}).explain(params, TOKENS)
    # A byte for each number, and 32 bits for every two.
    assert "3 of 12 weights quantized, 24.00 bits per parameter." in str(told)
    assert {row.bits_per_param for row in told.rows if row.quantization == "int8"} == {24.0}
    wide = models.abstract_params(model, "bfloat16")
    assert "quantized" not in str(
        jlora.lora_transform(model.apply, {"q/kernel": None}).explain(wide, TOKENS)
    )


@pytest.mark.slow
def test_generate_cache_has_the_weights_dtype(base: pathlib.Path) -> None:
    model, params = models.load(base, dtype="bfloat16", scan_layers=True)
    held = jlora.quantize(params, {"layers.*kernel|embed|head": jlora.NF4(block_size=2)})
    lora, kinds = jlora.lora_transform(model.apply), set()

    def apply(params: Any, *inputs: Any) -> Any:
        kinds.update(array.dtype for array in jax.tree.leaves(inputs[-1]) if array.ndim > 3)
        return lora.apply(params, {}, *inputs)

    models.generate(model, held, TOKENS, max_new_tokens=3, apply=apply)
    assert kinds == {jnp.dtype("bfloat16")}  # Not that of the scales, which are float32.


def test_cli_export_reports_quantized_base(
    base: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, wide = models.load(base)
    lora = jlora.lora_transform(model.apply, {"q/kernel": jlora.LoRA(rank=2, alpha=4)})
    fresh = lora.init(jax.random.key(0), wide, TOKENS)
    bases = {"wide": wide, "quantized": jlora.quantize(wide, {"q/kernel": jlora.NF4()})}
    for name, params in bases.items():
        jlora.save_adapter(tmp_path / f"{name}.safetensors", fresh, params)
        arguments = [str(base), str(tmp_path / f"{name}.safetensors"), str(tmp_path / name)]
        assert cli.main(["export", *arguments]) == 0
        told = "trained on weights quantized as nf4, but is merged into the original weights"
        assert (told in capsys.readouterr().out) == (name == "quantized")


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        (
            {"target_pattern": "/layers/atention/"},
            "'/layers/atention/' matches none of .* nearest paths",
        ),
        (
            {"block_size": 4, "axis": -3, "target_pattern": "norm/scale"},
            "axis=-3 of NF4.*must be an axis of the weight",
        ),
    ],
)
def test_build_setup_unquantizable_raises(
    recipe_of: Make, quantize: dict[str, Any], message: str
) -> None:
    made, mesh = recipe.validate(recipe_of(quantize=quantize)), make_mesh({}, jax.devices()[:1])
    for abstract in (True, False):
        with pytest.raises(ValueError, match=message):
            build_setup(made, mesh, total_steps=1, abstract=abstract)


# --- other tasks and families ---------------------------------------------------------------------


@pytest.mark.slow
def test_train_dpo_quantized_reference(recipe_of: Make, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"the {a} is", "chosen": " good.", "rejected": " bad!"} for a in ANIMALS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = recipe_of(
        quantize=NF4,
        data={"train": [{"path": str(path), "format": "preference"}], "max_seq_length": 32},
        training={"epochs": 4, "steps": None},
        dpo={"beta": 0.5},
    )
    run(raw)
    lines = measured(raw)
    # A fresh adapter changes nothing of either side.
    np.testing.assert_allclose(lines[0]["train/loss"], np.log(2), rtol=1e-5)
    assert lines[-1]["train/loss"] < 0.5


@pytest.mark.parametrize(
    "lora",
    [
        {"family": "DoRA", "rank": 2},
        pytest.param({"family": "HiRA", "rank": 2}, marks=pytest.mark.slow),
        pytest.param({"family": "IA3"}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_train_classification_quantized(
    recipe_of: Make, encoder: pathlib.Path, tmp_path: pathlib.Path, lora: dict[str, Any]
) -> None:
    path = tmp_path / "labels.jsonl"
    rows = [{"text": f"{a} {v}", "label": v} for v in ("sees", "eats") for a in ANIMALS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = recipe_of(
        model={"path": str(encoder)},
        quantize={"scheme": "int8", "block_size": 4},
        data={"train": [{"path": str(path), "format": "classification"}], "max_seq_length": 16},
        training={"epochs": 4, "steps": None},
        export={"merged": True, "merged_dtype": "float32"},
    ) | {"adapter": lora}
    run(raw)
    losses = [line["train/loss"] for line in measured(raw)]
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.1
    rules = schemes_from_recipe(recipe.validate(raw), models.model_from_config(encoder))
    model, params = models.load(encoder, dtype="float32", quantize=rules)
    adapter = jlora.load_adapter(output(raw) / "adapter.safetensors", params)
    inputs = (TOKENS, jnp.ones_like(TOKENS))
    adapted = jlora.lora_transform(model.apply).apply(params, adapter, *inputs)
    _, merged = models.load(output(raw) / "merged", dtype="float32")
    out = model.apply(merged, *inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), out, adapted)
