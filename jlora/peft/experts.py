"""Adapters with one module for each expert, as transformers 4 and vLLM name them.

transformers 5 and jlora have two parameters for all experts of a layer: `gate_up_proj`, in which
gate and up are concatenated, and `down_proj`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.peft.leaf_conversion import ErrorFactory, ModuleTensors
from jlora.peft.methods import ConfigFields
from jlora.peft.tensor_layouts import ModuleParameter


class ExpertTensors(NamedTuple):
    """The tensors of the module of one expert.

    Attributes:
        module: Name of the module.
        number: Number of the expert.
        projection: "gate_proj", "up_proj" or "down_proj".
        fields: Fields of the config, with the module's own rank and alpha.
        tensors: Tensors, by the suffix of their names.
    """

    module: str
    number: int
    projection: str
    fields: ConfigFields
    tensors: dict[str, np.ndarray]

    @property
    def scaling(self) -> float:
        """Scale of the product of the factors."""
        rank = self.fields["r"]
        return self.fields["lora_alpha"] / (rank**0.5 if self.fields["use_rslora"] else rank)


def join_expert_modules(
    parameter: ModuleParameter,
    experts: Sequence[ExpertTensors],
    num_experts: int,
    make_error: ErrorFactory,
) -> ModuleTensors:
    """Joins the modules of the experts to the tensors of one parameter.

    The factors of gate and up are joined block by block, to twice the rank, unless both have the
    same `A`. Smaller ranks are padded with zeros.

    Args:
        parameter: Parameter of all experts of a layer.
        experts: Modules of the experts; those that are missing are not adapted.
        num_experts: Number of experts.
        make_error: Function from a reason to the error to raise.

    Raises:
        ValueError: A module is not a LoRA, or has factors of other shapes.
    """
    for expert in experts:
        if set(expert.tensors) != {"lora_A.weight", "lora_B.weight"}:
            raise make_error(
                f"{expert.module} has {sorted(expert.tensors)}, and an expert can only have "
                f"lora_A.weight and lora_B.weight."
            )
    shapes = [(e.tensors["lora_A.weight"].shape, e.tensors["lora_B.weight"].shape) for e in experts]
    for expert, (a_shape, b_shape) in zip(experts, shapes, strict=True):
        widths = (a_shape[1:], b_shape[:1])
        if (
            widths != (shapes[0][0][1:], shapes[0][1][:1])
            or len(a_shape) != 2
            or a_shape[:1] != b_shape[1:]
            or type(expert.fields["r"]) is not int
            or a_shape[0] != expert.fields["r"]
        ):
            raise make_error(
                f"{expert.module} has factors of shapes {a_shape} and {b_shape}, which do not "
                f"match r={expert.fields['r']} and the other experts."
            )
    projections = ("down_proj",)
    if parameter.name == "gate_up_proj":
        projections = ("gate_proj", "up_proj")
    by_place = {(expert.number, expert.projection): expert for expert in experts}
    scale = max(expert.scaling for expert in experts)
    rank = max(expert.fields["r"] for expert in experts)
    (fan_in,), (fan_out,) = shapes[0][0][1:], shapes[0][1][:1]
    a = np.zeros((len(projections), num_experts, rank, fan_in), np.float32)
    b = np.zeros((len(projections), num_experts, fan_out, rank), np.float32)
    for (number, projection), expert in by_place.items():
        place, own = projections.index(projection), expert.fields["r"]
        gain = np.float32(expert.scaling / scale)
        a[place, number, :own] = expert.tensors["lora_A.weight"]
        b[place, number, :, :own] = expert.tensors["lora_B.weight"].astype(np.float32) * gain
    if len(projections) == 2 and np.array_equal(a[0], a[1]):
        a, b = a[:1], b.reshape(1, 2, num_experts, fan_out, rank).transpose(0, 2, 1, 3, 4)
        b = b.reshape(1, num_experts, 2 * fan_out, rank)
    blocks, height = len(a), b.shape[2]
    joined_b = np.zeros((num_experts, blocks, height, blocks, rank), np.float32)
    for block in range(blocks):
        joined_b[:, block, :, block] = b[block]
    joined_a = a.transpose(1, 0, 2, 3).reshape(num_experts * blocks * rank, fan_in)
    joined_b = joined_b.reshape(num_experts, blocks * height, blocks * rank)
    total: int = blocks * rank
    fields: dict[str, Any] = {
        **experts[0].fields,
        "r": total,
        "lora_alpha": scale * total,
        "use_rslora": False,
        "is_feedforward": False,
    }
    tensors = {
        "lora_A.weight": joined_a,  # (e * r, in)
        "lora_B.weight": joined_b.transpose(1, 2, 0).reshape(blocks * height, -1),  # (out, r * e)
    }
    return ModuleTensors(parameter, fields, tensors)
