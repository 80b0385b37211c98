"""LoRA for JAX and Flax: a transform of a function and its parameter tree."""

from jlora.adapters.lora import LoRA as LoRA
from jlora.nnx import from_nnx as from_nnx
from jlora.nnx import update_nnx as update_nnx
from jlora.transform import LoraTransform as LoraTransform
from jlora.transform import lora_transform as lora_transform
from jlora.transform import merge as merge
