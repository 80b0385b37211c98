"""What the keys of these files mean: which module's factor or alpha each one is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from jlora import _tree

# What kohya's keys of a model begin with. Those of Stable Diffusion XL have numbers.
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

# The oldest keys belong to an attention's processor, and call its projections as the UNet does.
_ATTN_PROCESSOR_KEY = re.compile(r"(.+?)\.(?:processor\.)?to_(q|k|v|out)_lora\.(down|up)\.weight")

_UNSUPPORTED_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoRA with a core between its factors",
    "oft_": "OFT",
    "diff": "a whole difference",
}

_ORIGINAL_SD_KEY = re.compile(r"(input_blocks|middle_block|output_blocks)_\d")


class ParsedKey(NamedTuple):
    """What a key names.

    Attributes:
        module: As the model has it.
        role: Which of its tensors.
    """

    module: str
    role: TensorRole


def to_kohya_name(module: str) -> str:
    """A module's name as kohya writes it."""
    return module.replace(".", "_")


def group_by_kohya_name(modules: Iterable[str]) -> dict[str, list[str]]:
    """The modules that each of kohya's names may mean."""
    found: dict[str, list[str]] = {}
    for module in modules:
        found.setdefault(to_kohya_name(module), []).append(module)
    return found


class KeyParser:
    """The names of one model in a file.

    Args:
        prefix: The model's.
        modules: Those that it has.
        make_error: What is wrong, to the error that says so.
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
        """Whether a key is of this model."""
        return key.startswith((self.diffusers_prefix, *self.kohya_prefixes))

    def parse(self, key: str) -> ParsedKey:
        """What one of the model's keys names.

        Raises:
            ValueError: It is not LoRA's, or the model has no such module.
        """
        if key.startswith(self.diffusers_prefix):
            return self._parse_diffusers_key(key, key.removeprefix(self.diffusers_prefix))
        head = next(head for head in self.kohya_prefixes if key.startswith(head))
        return self._parse_kohya_key(key, key.removeprefix(head))

    def _parse_diffusers_key(self, key: str, name: str) -> ParsedKey:
        old = _ATTN_PROCESSOR_KEY.fullmatch(name)
        if old:
            parent, letter, role = old.groups()
            last = "to_out.0" if letter == "out" else f"to_{letter}"
            both = [f"{parent}.{last}", f"{parent}.{letter}_proj"]
            module = next((one for one in both if one in self.modules), both[0])
            return ParsedKey(self._require_module(key, module), "down" if role == "down" else "up")
        for suffix, role in _DIFFUSERS_SUFFIXES.items():
            if name.endswith(f".{suffix}"):
                return ParsedKey(self._require_module(key, name.removesuffix(f".{suffix}")), role)
        raise self._unsupported_key_error(key)

    def _require_module(self, key: str, module: str) -> str:
        if module in self.modules:
            return module
        raise self.make_error(
            f"{key} belongs to a module {module!r} that the model has not. The nearest are "
            f"{_tree.closest_matches(module, self.modules)}."
        )

    def _parse_kohya_key(self, key: str, name: str) -> ParsedKey:
        name, _, suffix = name.partition(".")
        if suffix not in _KOHYA_SUFFIXES:
            raise self._unsupported_key_error(key)
        found = self.by_kohya_name.get(name, [])
        if len(found) > 1:
            raise self.make_error(f"{key} may be any of {found}, which kohya's names do not tell.")
        if not found:
            hint = (
                " It has the names of the original Stable Diffusion: convert it to those of "
                "diffusers first."
                if _ORIGINAL_SD_KEY.match(name)
                else f" The nearest are {_tree.closest_matches(name, tuple(self.by_kohya_name))}."
            )
            raise self.make_error(f"{key} belongs to no module of the model.{hint}")
        return ParsedKey(found[0], _KOHYA_SUFFIXES[suffix])

    def _unsupported_key_error(self, key: str) -> ValueError:
        parts = key.split(".")
        for start, method in _UNSUPPORTED_METHODS.items():
            if any(part.startswith(start) for part in parts[1:]):
                return self.make_error(
                    f"{key} is of {method}, and LoRA alone is read from these files. Merge it in "
                    f"the program that wrote it."
                )
        return self.make_error(f"{key} is neither a factor of LoRA nor its alpha.")
