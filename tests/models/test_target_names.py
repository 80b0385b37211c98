"""Targets by the names of a checkpoint's modules: those that PEFT's matching gives."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest

from jlora import models

DATA = pathlib.Path(__file__).parent / "data"


def matched(model: Any, targets: Any) -> set[str]:
    pattern = models.find_target_pattern(model, targets)
    return {path for path in models.checkpoint_mapping(model)[0] if re.search(pattern, path)}


def modules_of(model: Any, paths: set[str]) -> set[str]:
    mapping = models.checkpoint_mapping(model)[0]
    return {part.key.removesuffix(".weight") for path in paths for part in mapping[path].slices}


def peft_targets(model: Any, names: list[str]) -> set[str]:
    """Modules that end with `.name`, as PEFT matches a list."""
    keys = (p.key for w in models.checkpoint_mapping(model)[0].values() for p in w.slices)
    modules = {key.removesuffix(".weight") for key in keys if key.endswith(".weight")}
    return {m for m in modules if any(m == n or m.endswith(f".{n}") for n in names)}


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(
    "names", [["q_proj", "v_proj"], ["self_attn.o_proj"], ["gate_proj", "up_proj", "down_proj"]]
)
def test_module_names_match_as_in_peft(names: list[str], scan_layers: bool) -> None:
    model = models.model_from_config(DATA / "decoders" / "qwen2", scan_layers=scan_layers)
    assert modules_of(model, matched(model, names)) == peft_targets(model, names) != set()


def test_spellings_of_peft_match() -> None:
    model = models.model_from_config(DATA / "decoders" / "llama")
    expected = matched(model, ["q_proj", "v_proj"])
    lists = [
        "['q_proj', 'v_proj']",
        '["q_proj","v_proj"]',
        "[q_proj, v_proj]",
        "('q_proj', 'v_proj',)",
    ]
    regular = [r".*\.(q_proj|v_proj)", "/[qv]/", "(q|v)/kernel"]
    for spelling in ("q_proj|v_proj", "q_proj,v_proj", "q_proj, v_proj", *lists, *regular):
        assert matched(model, spelling) == expected, spelling
    assert matched(model, "['q_proj']") == matched(model, "q_proj")
    assert matched(model, "ALL-LINEAR") == matched(model, "all-linear")


def test_one_name_is_a_list_of_one() -> None:
    model = models.model_from_config(DATA / "decoders" / "llama")
    assert matched(model, "q_proj") == matched(model, ["q_proj"]) != set()


def test_own_module_names_leave_biases_out() -> None:
    model = models.model_from_config(DATA / "decoders" / "qwen2", scan_layers=True)
    assert matched(model, "q") == {"params/layers/attention/q/kernel"}


def test_encoder_names_of_either_side_match() -> None:
    model = models.model_from_config(DATA / "encoders" / "bert")
    assert modules_of(model, matched(model, ["query"])) == peft_targets(model, ["query"])
    assert modules_of(model, matched(model, ["attention.output.dense"])) == peft_targets(
        model, ["attention.output.dense"]
    )


def test_regular_expressions_and_all_linear() -> None:
    model = models.model_from_config(DATA / "decoders" / "llama", scan_layers=True)
    kernels = {p for p in models.checkpoint_mapping(model)[0] if "/layers/" in p and "kernel" in p}
    assert matched(model, "all-linear") == kernels
    assert matched(model, ["/(q|v)/kernel$", "down_proj"]) == {
        f"params/layers/{name}/kernel" for name in ("attention/q", "attention/v", "mlp/down")
    }


def test_pattern_with_two_meanings_raises() -> None:
    # The router to PEFT, and the experts' projections by their paths here.
    model = models.model_from_config(DATA / "decoders" / "qwen3_moe", scan_layers=True)
    message = (
        r"searched in the paths .* 'params/layers/moe/down', .*mlp.gate' and not the same.*gate'"
    )
    with pytest.raises(ValueError, match=message):
        models.find_target_pattern(model, ".*(gate|up|down)")
    assert modules_of(model, matched(model, r".*\.gate")) == peft_targets(model, ["gate"])
    projections = ["gate_proj", "up_proj", "down_proj"]
    assert modules_of(model, matched(model, "moe/(gate_up|down)$")) == peft_targets(
        model, projections
    )


@pytest.mark.parametrize(
    "pattern", [".*", r".*(proj|attn).*", r".*\.(q|k|v)_.*", r".*(q|v).*", "layers"]
)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_patterns_match_as_in_peft(name: str, pattern: str) -> None:
    model = models.model_from_config(DATA / "decoders" / name, scan_layers=True)
    keys = (p.key for w in models.checkpoint_mapping(model)[0].values() for p in w.slices)
    modules = {key.removesuffix(".weight") for key in keys if key.endswith(".weight")}
    matrices = {module for module in modules if "norm" not in module}
    expected = {module for module in matrices if re.fullmatch(pattern, module)}
    found = modules_of(model, matched(model, pattern)) & matrices
    assert found == (expected or {module for module in matrices if pattern in module})


def test_one_layer_of_a_stack_raises() -> None:
    name = "model.layers.0.self_attn.q_proj"
    stacked = models.model_from_config(DATA / "decoders" / "llama", scan_layers=True)
    with pytest.raises(
        ValueError,
        match=r"name 1 of the 2 tensors that are one weight here.*layers.1.self_attn.q_proj",
    ):
        models.find_target_pattern(stacked, name)
    apart = models.model_from_config(DATA / "decoders" / "llama", scan_layers=False)
    assert modules_of(apart, matched(apart, name)) == {name}


def test_names_together_cover_a_fused_weight() -> None:
    model = models.model_from_config(DATA / "decoders" / "qwen3_moe", scan_layers=True)
    names = ["gate_proj", "up_proj", "down_proj"]
    assert modules_of(model, matched(model, names)) == peft_targets(model, names) != set()
    with pytest.raises(ValueError, match=r"Name all of them, such as '.*up_proj' too"):
        models.find_target_pattern(model, ["gate_proj"])
    stacked = models.model_from_config(DATA / "decoders" / "llama", scan_layers=True)
    layers = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert matched(stacked, layers) == {"params/layers/attention/q/kernel"}


def test_names_of_any_release_match() -> None:
    model = models.model_from_config(DATA / "encoders" / "vit")
    known: set[str] = set()
    for mapping in models.checkpoint_mapping(model):
        for path, weight in mapping.items():
            if any(part.key.endswith(".dense.weight") for part in weight.slices):
                known.add(path)
    assert matched(model, "dense") == known
    assert len(known) > 3


def test_unknown_targets_name_the_nearest() -> None:
    model = models.model_from_config(DATA / "decoders" / "llama")
    with pytest.raises(ValueError, match=r"'q_prj' matches nothing.*\['q_proj'.*all-linear"):
        models.find_target_pattern(model, ["q_prj"])
    with pytest.raises(ValueError, match=r"'\(query' is neither the name of a module"):
        models.find_target_pattern(model, "(query")
    with pytest.raises(ValueError, match=r"'no.such' matches nothing.*nearest modules"):
        models.find_target_pattern(model, r"no.such")
    with pytest.raises(ValueError, match=r"targets=\[\] must be one name"):
        models.find_target_pattern(model, [])
