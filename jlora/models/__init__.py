"""Flax models that read and write Hugging Face checkpoints."""

from __future__ import annotations

from jlora.models.decoder import Decoder, KVCache, init_cache
from jlora.models.decoder_config import DecoderConfig, LayerKind, MoEConfig
from jlora.models.encoder import Encoder, EncoderConfig, mean_pool
from jlora.models.generate import GenerateOutput, SamplingParams, generate
from jlora.models.hf.decoder_configs import decoder_config
from jlora.models.hf.load import (
    LoadedModel,
    abstract_params,
    checkpoint_mapping,
    eos_token_ids,
    load,
    model_from_config,
)
from jlora.models.hf.save import save
from jlora.models.hf.target_names import ALL_LINEAR_PATTERN, find_target_pattern
from jlora.models.hf.weight_mapping import (
    concatenate_weights,
    make_tensor_getter,
    single_tensor_weight,
    stack_weights,
)
from jlora.models.vit import ViT, ViTConfig

__all__ = [
    "ALL_LINEAR_PATTERN",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "GenerateOutput",
    "KVCache",
    "LayerKind",
    "LoadedModel",
    "MoEConfig",
    "SamplingParams",
    "ViT",
    "ViTConfig",
    "abstract_params",
    "checkpoint_mapping",
    "concatenate_weights",
    "decoder_config",
    "eos_token_ids",
    "find_target_pattern",
    "generate",
    "init_cache",
    "load",
    "make_tensor_getter",
    "mean_pool",
    "model_from_config",
    "save",
    "single_tensor_weight",
    "stack_weights",
]
