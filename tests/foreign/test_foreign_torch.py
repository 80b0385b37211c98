"""Adapters from JAX in PyTorch: merged in transformers, and as adapters of PEFT."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from _support.cases import Case, moved
from foreign_models import DORA, FOREIGN, LAYERS, LORA, VERA, foreign_case

import jlora
from jlora.adapters.base import get_adapter_leaves

pytestmark = FOREIGN

# The two packages sum in other orders (float32, at most 72 products) and round exponentials and
# roots otherwise, through two layers; the largest logit is near 20, whose spacing is 2e-6.
LOGITS = {"rtol": 1e-5, "atol": 2e-5}

TORCH = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}


def in_torch(one: Case, name: str, params: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.modeling_flax_pytorch_utils import load_flax_weights_in_pytorch_model

    model = getattr(transformers, TORCH[name])(one.layer.module.config)
    return load_flax_weights_in_pytorch_model(model, params).eval()


def logits_of(model: Any, one: Case) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.array(one.inputs[0]))).logits.numpy()


@pytest.mark.parametrize("family", ["lora", "dora", "vera"])
@pytest.mark.parametrize("name", TORCH)
def test_merge_has_the_same_logits_in_torch(name: str, family: str) -> None:
    one = foreign_case(name, family)
    model = in_torch(one, name, one.lora.merge(one.params, one.adapter))
    np.testing.assert_allclose(logits_of(model, one), one.output.logits, **LOGITS)


def lora_arrays(leaf: Any) -> dict[str, Any]:
    return {"lora_A.default.weight": leaf.a.T, "lora_B.default.weight": leaf.b.T}


def dora_arrays(leaf: Any) -> dict[str, Any]:
    return lora_arrays(leaf) | {"lora_magnitude_vector.default.weight": leaf.magnitude}


def vera_arrays(leaf: Any) -> dict[str, Any]:
    return {"vera_lambda_d.default": leaf.d, "vera_lambda_b.default": leaf.b}


# Per family: the config of jlora and of PEFT, and the leaf's arrays by PEFT's names.
FAMILIES: dict[str, tuple[Any, str, dict[str, Any], Any]] = {
    "lora": (LORA, "LoraConfig", {"r": 3, "lora_alpha": 4}, lora_arrays),
    "dora": (DORA, "LoraConfig", {"r": 3, "lora_alpha": 4, "use_dora": True}, dora_arrays),
    "vera": (VERA, "VeraConfig", {"r": 13, "projection_prng_key": 0}, vera_arrays),
}
# Several sizes, since VeRA's weights share arrays. GPT-2 keeps its kernels as (in, out) in PyTorch.
PROJECTIONS = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "k_proj", "down_proj"]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TORCH)
def test_peft_has_the_same_logits(name: str, family: str) -> None:
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    config, theirs, fields, arrays = FAMILIES[family]
    one = foreign_case(name, family)
    projections = PROJECTIONS[name]
    rules = {f"({'|'.join(projections)})/kernel": config}
    lora = jlora.lora_transform(one.fn, rules)
    adapter = moved(lora.init(jax.random.key(1), one.params, *one.inputs))
    assert len(get_adapter_leaves(adapter)) == LAYERS * len(projections)

    settings = getattr(peft, theirs)(
        target_modules=projections, fan_in_fan_out=name == "gpt2", **fields
    )
    model = peft.get_peft_model(in_torch(one, name, one.params), settings).eval()
    tensors: dict[str, Any] = {}
    for path, leaf in adapter.items():
        if path == "vera":
            tensors |= {
                "base_model.vera_A.default": leaf.a.T,
                "base_model.vera_B.default": leaf.b.T,
            }
            continue
        layer = "base_model.model." + path.removesuffix("/kernel").replace("/", ".")
        tensors |= {f"{layer}.{key}": array for key, array in arrays(leaf).items()}
    state = {key: torch.from_numpy(np.array(array)) for key, array in tensors.items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    ours = jax.jit(lora.apply)(one.params, adapter, *one.inputs).logits
    np.testing.assert_allclose(logits_of(model, one), ours, **LOGITS)
    assert not np.allclose(ours, one.fn(one.params, *one.inputs).logits, atol=0.1)
