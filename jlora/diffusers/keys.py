"""Parses the keys of LoRA files: the module, and the role of its tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from jlora import _tree

# Prefixes of kohya's keys by model. Those of Stable Diffusion XL have numbers.
KOHYA_PREFIXES = {
    "unet": ("lora_unet",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
}

TensorRole = Literal["down", "up", "alpha"]

_DIFFUSERS_SUFFIXES: dict[str, TensorRole] = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "alpha": "alpha",
}

_KOHYA_SUFFIXES: dict[str, TensorRole] = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "alpha": "alpha",
}

# The oldest keys belong to an attention processor and use the UNet's names of its projections.
_ATTN_PROCESSOR_KEY = re.compile(r"(.+?)\.(?:processor\.)?to_(q|k|v|out)_lora\.(down|up)\.weight")

_UNSUPPORTED_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoRA with a core between its factors",
    "oft_": "OFT",
    "diff": "a full update",
}

_ORIGINAL_SD_KEY = re.compile(r"(input_blocks|middle_block|output_blocks)_\d")


class ParsedKey(NamedTuple):
    """A parsed key.

    Attributes:
        module: Name of the module in the model.
        role: Role of the tensor: "down", "up" or "alpha".
    """

    module: str
    role: TensorRole


def to_kohya_name(module: str) -> str:
    """Returns the name of a module in kohya's keys."""
    return module.replace(".", "_")


def group_by_kohya_name(modules: Iterable[str]) -> dict[str, list[str]]:
    """Groups modules by their name in kohya's keys, which may be ambiguous."""
    groups: dict[str, list[str]] = {}
    for module in modules:
        groups.setdefault(to_kohya_name(module), []).append(module)
    return groups


class KeyParser:
    """Parser of the keys of one model.

    Args:
        prefix: Prefix of the model.
        modules: Names of the model's modules.
        make_error: Function from a reason to the error to raise.
    """

    def __init__(
        self, prefix: str, modules: Iterable[str], make_error: Callable[[str], ValueError]
    ) -> None:
        self.modules = tuple(modules)
        self.by_kohya_name = group_by_kohya_name(self.modules)
        self.diffusers_prefix = f"{prefix}."
        self.kohya_prefixes = tuple(f"{head}_" for head in KOHYA_PREFIXES.get(prefix, ()))
        self.make_error = make_error

    def matches(self, key: str) -> bool:
        """Returns True for a key of this model."""
        return key.startswith((self.diffusers_prefix, *self.kohya_prefixes))

    def parse(self, key: str) -> ParsedKey:
        """Parses a key of the model.

        Raises:
            ValueError: The key is not a key of LoRA, or the model does not have its module.
        """
        if key.startswith(self.diffusers_prefix):
            return self._parse_diffusers_key(key, key.removeprefix(self.diffusers_prefix))
        head = next(head for head in self.kohya_prefixes if key.startswith(head))
        return self._parse_kohya_key(key, key.removeprefix(head))

    def _parse_diffusers_key(self, key: str, name: str) -> ParsedKey:
        match = _ATTN_PROCESSOR_KEY.fullmatch(name)
        if match:
            attention, projection, role = match.groups()
            unet_name = "to_out.0" if projection == "out" else f"to_{projection}"
            candidates = [f"{attention}.{unet_name}", f"{attention}.{projection}_proj"]
            module = next((m for m in candidates if m in self.modules), candidates[0])
            return ParsedKey(self._require_module(key, module), "down" if role == "down" else "up")
        for suffix, role in _DIFFUSERS_SUFFIXES.items():
            if name.endswith(f".{suffix}"):
                return ParsedKey(self._require_module(key, name.removesuffix(f".{suffix}")), role)
        raise self._unsupported_key_error(key)

    def _require_module(self, key: str, module: str) -> str:
        if module in self.modules:
            return module
        raise self.make_error(
            f"{key} belongs to the module {module!r}, which the model does not have. The nearest "
            f"are {_tree.closest_matches(module, self.modules)}."
        )

    def _parse_kohya_key(self, key: str, name: str) -> ParsedKey:
        name, _, suffix = name.partition(".")
        if suffix not in _KOHYA_SUFFIXES:
            raise self._unsupported_key_error(key)
        modules = self.by_kohya_name.get(name, [])
        if len(modules) > 1:
            raise self.make_error(f"{key} is ambiguous: it may be any of {modules}.")
        if not modules:
            hint = (
                "It has the names of the original Stable Diffusion: convert it to those of "
                "diffusers first."
                if _ORIGINAL_SD_KEY.match(name)
                else f"The nearest are {_tree.closest_matches(name, tuple(self.by_kohya_name))}."
            )
            raise self.make_error(f"{key} belongs to a module that the model does not have. {hint}")
        return ParsedKey(modules[0], _KOHYA_SUFFIXES[suffix])

    def _unsupported_key_error(self, key: str) -> ValueError:
        parts = key.split(".")
        for start, method in _UNSUPPORTED_METHODS.items():
            if any(part.startswith(start) for part in parts[1:]):
                return self.make_error(
                    f"{key} is of {method}, and only LoRA is supported in these files. Merge it "
                    f"with the program that wrote it."
                )
        return self.make_error(f"{key} must be a factor or the alpha of LoRA.")
