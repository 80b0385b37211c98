"""Plans of recipes, as users ask for them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from jlora import cli
from jlora.planning.plan import plan
from jlora.training import recipe

pytest.importorskip("libtpu")

# Multiples of the TPU's tiles, so that there is no padding.
CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@pytest.fixture
def raw(tmp_path: pathlib.Path) -> dict[str, Any]:
    """A recipe whose base is a config.json alone, and whose data is not there."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIG))
    return {
        "output": "run",
        "model": {"path": str(tmp_path / "base"), "remat_policy": "full"},
        "adapter": {"rank": 8},
        "data": {"train": [{"path": "nowhere.jsonl", "format": "chat"}], "max_seq_length": 1024},
        "batch": {"size": 4, "gradient_accumulation_steps": 2},
        "mesh": {"fsdp": 4},
    }


@pytest.mark.slow
def test_plan_is_of_the_training_step(raw: dict[str, Any]) -> None:
    found = plan(recipe.validate(raw), "v5e:2x2")
    assert found.fits
    assert found.mesh_shape == {"data": 1, "fsdp": 4, "tensor": 1}
    width, inner, kv = 512, 1536, 256
    layer = 2 * width * width + 2 * width * kv + 3 * width * inner
    weights = 3 * layer + 2 * 2048 * width
    norms = 7 * width
    held = found.memory.arguments
    # bfloat16, a quarter on each chip; norms are replicated.
    assert held["weights"] == (weights // 4 + norms) * 2
    ranks = 8 * 3 * (2 * 2 * width + 2 * (width + kv) + 3 * (width + inner))
    # In float32; an adapter's axes of the width are split, those of the others are not.
    assert ranks * 4 / 4 < held["adapter"] < ranks * 4
    # Two moments of each, and counts.
    assert 2 * held["adapter"] <= held["optimizer"] < 2 * held["adapter"] + 200
    assert held["batch"] == 2 * 4 * 1024 * 5 * 4 // 4
    assert found.cost is not None
    tokens = 2 * 4 * 1024
    products = 3 * layer + 2048 * width
    arithmetic = tokens * (4 * products + 2 * 3 * layer) / 4
    # And factors, attention, and the head's products, which a chunked loss makes again.
    assert 1.0 < found.cost.flops / arithmetic < 1.35
    text = str(found)
    for part in (
        "4 chips of 16.00 GiB",
        "weights",
        "fits",
        "all-gather",
        "tokens/s without overlap",
    ):
        assert part in text


@pytest.mark.slow
def test_plan_offload_frees_the_chip(raw: dict[str, Any]) -> None:
    raw = {**raw, "adapter": {"rank": 256}}
    here = plan(recipe.validate(raw), "v5e:2x2")
    there = plan(recipe.validate({**raw, "optimizer": {"offload": True}}), "v5e:2x2")
    held = there.memory.arguments
    assert held == {**here.memory.arguments, "optimizer": held["optimizer"]}
    assert held["optimizer"] < 100  # Counts of steps.
    state = here.memory.arguments["optimizer"] - held["optimizer"]
    assert (here.memory.host, there.memory.host) == (0, state)
    assert abs(there.memory.padding - here.memory.padding) < 2**20
    # It is there while it is updated, and not while the layers run.
    assert there.memory.temporaries < here.memory.temporaries + state
    assert there.memory.peak < here.memory.peak
    assert "on the host" in str(there)
    assert "on the host" not in str(here)


@pytest.mark.parametrize(
    ("quantize", "bits"),
    [
        # A scale of 8 bits for 64 numbers, and one of 32 for 256 of those.
        ({"scheme": "nf4"}, 4 + 8 / 64 + 32 / (64 * 256)),
        pytest.param({"scheme": "int8", "block_size": 32}, 8 + 32 / 32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_plan_quantized_has_the_schemes_bits(
    raw: dict[str, Any], quantize: dict[str, Any], bits: float
) -> None:
    found = plan(recipe.validate({**raw, "quantize": quantize}), "v5e:2x2")
    width, inner, kv = 512, 1536, 256
    layer = 2 * width * width + 2 * width * kv + 3 * width * inner
    # Embedding, head and norms stay in bfloat16; all but norms is split over four chips.
    rest = (2 * 2048 * width // 4 + 7 * width) * 2
    quantised = found.memory.arguments["weights"] - rest
    # Scales of scales have too few entries for four chips and are replicated.
    np.testing.assert_allclose(quantised, 3 * layer * bits / 8 / 4, rtol=5e-3)
    assert found.quantization is not None
    assert found.quantization.bits_per_param == pytest.approx(bits, rel=1e-3)
    # The arguments are the quantized weights, which are not dequantized all at once.
    assert found.memory.padding < 0.1 * quantised
    assert f"quantized: 7 of 12 weights as {quantize['scheme']}: {bits:.2f} bits" in str(found)


@pytest.mark.slow
def test_cli_plan_too_large_suggests_changes(
    raw: dict[str, Any], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**raw, "mesh": {}, "batch": {"size": 16384}}))
    status = cli.main(["plan", str(path), "--topology", "v5e:2x2", "--model.remat_policy", "none"])
    out = capsys.readouterr().out
    assert status == 1
    for part in ("does not fit", "suggested changes", "sufficient", "a batch size of"):
        assert part in out


@pytest.mark.parametrize(
    ("topology", "changes", "message"),
    [
        ("v5e:3", {}, "must have 2 positive dimensions"),
        ("v9:2x2", {}, "must be a chip and the shape"),
        ("v5e:2x2", {"mesh": {"fsdp": 3}}, "has 3 devices, but 4 are available"),
        ("v5e:2x2", {"batch": {"size": 3}}, "batch size of 3 must be divisible by"),
        ("v5e:2x2", {"model": {"path": "nowhere"}}, "nowhere"),
    ],
)
def test_plan_invalid_raises(
    raw: dict[str, Any], topology: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plan(recipe.validate({**raw, **changes}), topology)
