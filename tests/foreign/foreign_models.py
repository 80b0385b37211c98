"""Small models of other people's packages, wrapped as a user would wrap them.

A package is imported when a model of it is made, so that runs which deselect this group pay nothing
and a missing one skips the test.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import Case, moved

import jlora

# What these packages warn of is theirs to mend; a warning from jlora is still an error.
THEIRS = ("transformers", "tunix", "torch", "peft", "flax")
FOREIGN = [
    pytest.mark.foreign,
    *(pytest.mark.filterwarnings(f"ignore:::{package}") for package in THEIRS),
]

# Such that the shape of a frozen weight is that of nothing else in the program.
BATCH, LENGTH = 2, 7
WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD = 24, 28, 2, 4, 2, 6
VOCABULARY, POSITIONS, LABELS, KINDS_OF_TOKEN, EXPERTS = 38, 16, 11, 9, 4
STD = 0.3  # Activations near one: with the packages' own 0.02 no layer would do much.

LORA = jlora.LoRA(rank=3, alpha=4)
DORA = jlora.DoRA(rank=3, alpha=4)
VERA = jlora.VeRA(rank=13)


@dataclasses.dataclass(frozen=True)
class Model:
    """A forward function, its parameters and its inputs.

    Attributes:
        adapted: A pattern for every weight that is multiplied with or looked up in.
        module: The package's own object.
    """

    fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    adapted: str
    module: Any


MODELS: dict[str, Callable[[], Model]] = {}


def model(make: Callable[[], Model]) -> Callable[[], Model]:
    """Registers a model, which is then made once."""
    MODELS[make.__name__] = functools.cache(make)
    return MODELS[make.__name__]


@functools.cache
def foreign_case(name: str, family: str) -> Case:
    made = MODELS[name]()
    rules = {
        "lora": {made.adapted: LORA},
        "dora": {made.adapted: DORA},
        "vera": VERA,  # Which is not defined for embeddings and convolutions.
    }
    lora = jlora.lora_transform(made.fn, rules[family])
    fresh = lora.init(jax.random.key(1), made.params, *made.inputs)
    return Case(made, made.fn, made.params, made.inputs, lora, fresh, moved(fresh))


def tokens(seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, VOCABULARY, (BATCH, LENGTH)))


# --- transformers --------------------------------------------------------------------------------


def from_transformers(model: str, config: str, inputs: tuple[Any, ...], **sizes: Any) -> Model:
    """A Flax model, whose call takes its parameters by name and returns a dataclass."""
    transformers = pytest.importorskip("transformers")
    module = getattr(transformers, model)(
        getattr(transformers, config)(initializer_range=STD, **sizes), seed=0
    )

    def fn(params: Any, *args: Any, **kwargs: Any) -> Any:
        return module(*args, params=params, **kwargs)

    return Model(fn, module.params, inputs, r"(kernel|embedding)$", module)


@model
def gpt2() -> Model:
    return from_transformers(
        "FlaxGPT2LMHeadModel",
        "GPT2Config",
        (tokens(),),
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_inner=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.5),
    )


@model
def llama() -> Model:
    return from_transformers(
        "FlaxLlamaForCausalLM",
        "LlamaConfig",
        (tokens(),),
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )


BERT = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": KINDS_OF_TOKEN,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}


@model
def bert() -> Model:
    """Two texts of different lengths, each a pair, in layers that are rematerialised."""
    attended = jnp.asarray([[1] * LENGTH, [1] * 4 + [0] * 3])
    kinds = jnp.asarray([[0] * 3 + [1] * 4] * BATCH)
    made = from_transformers(
        "FlaxBertForSequenceClassification",
        "BertConfig",
        (tokens(), attended, kinds),
        num_labels=LABELS,
        **BERT,
    )
    made.module.enable_gradient_checkpointing()
    return made


@model
def vit() -> Model:
    image = jax.random.normal(jax.random.key(0), (BATCH, 3, 6, 6))
    return from_transformers(
        "FlaxViTForImageClassification",
        "ViTConfig",
        (image,),
        image_size=6,
        patch_size=2,
        num_labels=LABELS,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
    )


# --- google-tunix --------------------------------------------------------------------------------


def from_tunix(name: str, cls: str, *, mesh: Any = None, **sizes: Any) -> Model:
    """An NNX decoder, whose call takes tokens, positions, a cache or None, and a mask."""
    pytest.importorskip("tunix")
    package = importlib.import_module(f"tunix.models.{name}.model")
    # The constructors leave the MLP at zero.
    dummy = importlib.import_module("tunix.models.dummy_model_creator")
    sizes = {
        "num_layers": LAYERS,
        "embed_dim": WIDTH,
        "hidden_dim": HIDDEN,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": HEAD,
        **sizes,
    }
    for field, enum in (("remat_config", "RematConfig"), ("attention_types", "AttentionType")):
        match sizes.get(field):
            case str(member):
                sizes[field] = getattr(package, enum)[member]
            case [*members]:
                sizes[field] = [getattr(package, enum)[member] for member in members]
    config = package.ModelConfig(**sizes)
    module = dummy.create_dummy_model(getattr(package, cls), config, mesh=mesh, scale=STD)
    fn, params = jlora.from_nnx(module)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    mask = jnp.broadcast_to(jnp.tri(LENGTH, dtype=bool), (BATCH, LENGTH, LENGTH))
    inputs = (tokens(), positions, None, mask)
    return Model(fn, params, inputs, "embedding|kernel|_proj|einsum|lm_head", module)


QWEN3 = {"vocab_size": VOCABULARY, "rope_theta": 10_000, "norm_eps": 1e-6}


@model
def qwen3() -> Model:
    return from_tunix("qwen3", "Qwen3", **QWEN3)


@model
def qwen3_experts() -> Model:
    """Experts taken one by one from their stack, in layers that are rematerialised."""
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": 2}
    return from_tunix("qwen3", "Qwen3", remat_config="DECODER", **experts, **QWEN3)


@model
def llama3() -> Model:
    """Llama 3.2: embedding and head are one weight."""
    return from_tunix("llama3", "Llama3", weight_tying=True, remat_config="BLOCK", **QWEN3)


@model
def gemma2() -> Model:
    """Keys and values in one weight; a window, soft caps, norms behind every layer."""
    return from_tunix(
        "gemma",
        "Gemma",
        num_embed=VOCABULARY,
        attention_types=["LOCAL_SLIDING", "GLOBAL"],
        sliding_window_size=3,
        final_logit_softcap=30.0,
        attn_logits_soft_cap=50.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
    )


@model
def gemma3() -> Model:
    """Queries, keys and values in one weight."""
    return from_tunix(
        "gemma3",
        "Gemma3",
        num_embed=VOCABULARY,
        num_kv_heads=HEADS,
        sliding_window_size=3,
        param_dtype=jnp.float32,
    )
