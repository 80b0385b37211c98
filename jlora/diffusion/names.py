"""What the keys of these files mean: which module's factor or alpha each one is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from jlora import tree

# What kohya's keys of a model begin with. Those of Stable Diffusion XL have numbers.
KOHYA = {
    "unet": ("lora_unet",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
}
Role = Literal["down", "up", "alpha"]
_DIFFUSERS: dict[str, Role] = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "alpha": "alpha",
}
_KOHYA: dict[str, Role] = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
# The oldest keys belong to an attention's processor, and call its projections as the UNet does.
_PROCESSOR = re.compile(r"(.+?)\.(?:processor\.)?to_(q|k|v|out)_lora\.(down|up)\.weight")
_OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoRA with a core between its factors",
    "oft_": "OFT",
    "diff": "a whole difference",
}
_ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks)_\d")


class Entry(NamedTuple):
    """What a key names.

    Attributes:
        module: As the model has it.
        role: Which of its tensors.
    """

    module: str
    role: Role


def flat(module: str) -> str:
    """A module's name as kohya writes it."""
    return module.replace(".", "_")


def by_flat_name(modules: Iterable[str]) -> dict[str, list[str]]:
    """The modules that each of kohya's names may mean."""
    found: dict[str, list[str]] = {}
    for module in modules:
        found.setdefault(flat(module), []).append(module)
    return found


class Names:
    """The names of one model in a file.

    Args:
        prefix: The model's.
        modules: Those that it has.
        problem: What is wrong, to the error that says so.
    """

    def __init__(
        self, prefix: str, modules: Iterable[str], problem: Callable[[str], ValueError]
    ) -> None:
        self.modules = tuple(modules)
        self.by_flat = by_flat_name(self.modules)
        self.dotted = f"{prefix}."
        self.heads = tuple(f"{head}_" for head in KOHYA.get(prefix, ()))
        self.problem = problem

    def has(self, key: str) -> bool:
        """Whether a key is of this model."""
        return key.startswith((self.dotted, *self.heads))

    def entry(self, key: str) -> Entry:
        """What one of the model's keys names.

        Raises:
            ValueError: It is not LoRA's, or the model has no such module.
        """
        if key.startswith(self.dotted):
            return self._of_diffusers(key, key.removeprefix(self.dotted))
        head = next(head for head in self.heads if key.startswith(head))
        return self._of_kohya(key, key.removeprefix(head))

    def _of_diffusers(self, key: str, name: str) -> Entry:
        old = _PROCESSOR.fullmatch(name)
        if old:
            parent, letter, role = old.groups()
            last = "to_out.0" if letter == "out" else f"to_{letter}"
            both = [f"{parent}.{last}", f"{parent}.{letter}_proj"]
            module = next((one for one in both if one in self.modules), both[0])
            return Entry(self._known(key, module), "down" if role == "down" else "up")
        for suffix, role in _DIFFUSERS.items():
            if name.endswith(f".{suffix}"):
                return Entry(self._known(key, name.removesuffix(f".{suffix}")), role)
        raise self._strange(key)

    def _known(self, key: str, module: str) -> str:
        if module in self.modules:
            return module
        raise self.problem(
            f"{key} belongs to a module {module!r} that the model has not. The nearest are "
            f"{tree.nearest(module, self.modules)}."
        )

    def _of_kohya(self, key: str, name: str) -> Entry:
        name, _, suffix = name.partition(".")
        if suffix not in _KOHYA:
            raise self._strange(key)
        found = self.by_flat.get(name, [])
        if len(found) > 1:
            raise self.problem(f"{key} may be any of {found}, which kohya's names do not tell.")
        if not found:
            hint = (
                " It has the names of the original Stable Diffusion: convert it to those of "
                "diffusers first."
                if _ORIGINAL.match(name)
                else f" The nearest are {tree.nearest(name, tuple(self.by_flat))}."
            )
            raise self.problem(f"{key} belongs to no module of the model.{hint}")
        return Entry(found[0], _KOHYA[suffix])

    def _strange(self, key: str) -> ValueError:
        parts = key.split(".")
        for start, method in _OTHERS.items():
            if any(part.startswith(start) for part in parts[1:]):
                return self.problem(
                    f"{key} is of {method}, and LoRA alone is read from these files. Merge it in "
                    f"the program that wrote it."
                )
        return self.problem(f"{key} is neither a factor of LoRA nor its alpha.")
