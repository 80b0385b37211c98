"""The benchmark script of PEFT, with the tiny shape on the CPU."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest

for package, version in (("torch", None), ("transformers", "5.0"), ("peft", None)):
    pytest.importorskip(package, minversion=version)

import torch  # noqa: E402

from benchmarks.speed import _common  # noqa: E402
from benchmarks.speed.peers import peft as peer_peft  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("default")]

TINY = _common.SHAPES["tiny"]
BASE = sum(inputs * outputs for inputs, outputs in TINY.projections.values()) * TINY.layers
EMBEDDINGS = 2 * TINY.vocabulary * TINY.width  # And the head, which is not tied to them.
NORMS = (2 * TINY.layers + 1) * TINY.width


@pytest.mark.parametrize("method", ["eager", "bitsandbytes"])
def test_peft_main_trains_and_writes_row(
    method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    if method == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    output = tmp_path / "row.json"
    words = ["--shape", "tiny", "--method", method, "--steps", "2", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["peft", *words, "--output", str(output)])
    peer_peft.main()
    row = json.loads(output.read_text())
    assert row["method"] == f"peft {method}"
    assert row["trained"] == TINY.lora_size()
    bits = 4 if method == "bitsandbytes" else 16
    expected = BASE * bits / 8 + 2 * (EMBEDDINGS + NORMS)
    assert row["details"]["base_gib"] * 2**30 == expected


@pytest.mark.parametrize(("name", "dtype"), peer_peft.DTYPES.items())
def test_peft_adapters_have_dtype_and_gradient(name: str, dtype: torch.dtype) -> None:
    model = peer_peft.adapted(peer_peft.llama(TINY), TINY, dtype)
    parameters = peer_peft.trainable_parameters(model)
    assert {parameter.dtype for parameter in parameters} == {dtype}
    before = [parameter.detach().clone() for parameter in parameters]
    tokens = torch.randint(TINY.vocabulary, (TINY.batch, TINY.length))
    step = peer_peft.training_step(model, tokens, dtype, torch.optim.Adam(parameters, lr=0.1))
    for _ in range(2):  # `A` has no gradient before `B` has left zero.
        step()
    assert not [now for now, was in zip(parameters, before, strict=True) if torch.equal(now, was)]


def test_to_4bit_is_nf4_with_quantized_scales() -> None:
    pytest.importorskip("bitsandbytes")
    names = tuple(f"{name}_proj" for name in TINY.projections)
    model = peer_peft.to_4bit(peer_peft.llama(TINY), names)
    model = peer_peft.adapted(model, TINY, torch.bfloat16)
    for block in model.base_model.model.model.layers:
        layer = block.mlp.down_proj
        assert type(layer).__module__ == "peft.tuners.lora.bnb"
        state = layer.base_layer.weight.quant_state
        assert (state.quant_type, state.nested, state.dtype) == ("nf4", True, torch.bfloat16)
