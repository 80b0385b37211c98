"""LoRA for JAX and Flax: a transform of a function and its parameter tree."""

from jlora.adapters.lora import LoRA as LoRA
from jlora.checkpoints.adapter_file import load_adapter as load_adapter
from jlora.checkpoints.adapter_file import save_adapter as save_adapter
from jlora.explanation import Explanation as Explanation
from jlora.nnx import from_nnx as from_nnx
from jlora.nnx import update_nnx as update_nnx
from jlora.optim.labels import combine as combine
from jlora.optim.labels import labels as labels
from jlora.optim.labels import lora_optimizer as lora_optimizer
from jlora.optim.labels import partition as partition
from jlora.transform import LoraTransform as LoraTransform
from jlora.transform import lora_transform as lora_transform
from jlora.transform import merge as merge
