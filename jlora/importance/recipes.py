"""Allocated ranks as the adapter sections of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jlora.adapters.base import AdapterConfig


def to_recipe(rules: Mapping[str, AdapterConfig | None]) -> dict[str, Any]:
    """Returns the sections `adapter`, `adapters` and `frozen_modules` of a recipe with these rules.

    In a recipe's mapping, in place of its own sections, they give the same rules. Write them with
    `yaml.safe_dump(..., sort_keys=False)`.

    Args:
        rules: Result of `allocate_ranks`, or any such mapping whose patterns with None come first.

    Raises:
        ValueError: No rule trains anything, a rule with None comes after one with a config, or a
            rule cannot be expressed in a recipe: it has a custom initializer, or one with options.
        TypeError: A method is not available in recipes.

    Example:
        >>> import jlora
        >>> jlora.importance.to_recipe({r"query/kernel$": jlora.LoRA(rank=4, alpha=8)})
        {'adapter': {'family': 'LoRA', 'rank': 4, 'alpha': 8, 'target_pattern': 'query/kernel$'}}
    """
    frozen = [pattern for pattern, config in rules.items() if config is None]
    if list(rules)[: len(frozen)] != frozen:
        raise ValueError(
            f"The rule {frozen[-1]!r}: None comes after one with a config, but a recipe's frozen "
            f"weights come first. Put it before them."
        )
    sections = [
        {**_config_to_recipe_section(config), "target_pattern": pattern}
        for pattern, config in rules.items()
        if config is not None
    ]
    if not sections:
        raise ValueError(
            "rules must adapt a weight, since a recipe trains something, but they adapt nothing. "
            "Add a config."
        )
    return {
        "adapter": sections[-1],
        **({"adapters": sections[:-1]} if sections[:-1] else {}),
        **({"frozen_modules": frozen} if frozen else {}),
    }


def _config_to_recipe_section(config: AdapterConfig) -> dict[str, Any]:
    """Returns a config's family and those of its fields that differ from the recipe's defaults."""
    from jlora.training.recipe.config_sections import ADAPTER_SECTIONS  # Loads pydantic.

    family = type(config).__name__
    if family not in ADAPTER_SECTIONS:
        raise TypeError(
            f"{config!r} must be of a family that recipes have, {', '.join(ADAPTER_SECTIONS)}, got "
            f"{family}."
        )
    section_cls = ADAPTER_SECTIONS[family]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if field.name not in section_cls.config_fields:
            continue
        value = getattr(config, field.name)
        if field.name == "init":
            value = value.name
        elif field.name == "dtype":
            value = jnp.dtype(value).name
        values[field.name] = value
    try:
        roundtripped = section_cls(**values).to_config()
    except ValueError as error:
        raise ValueError(f"{config!r} cannot be expressed in a recipe: {error}") from error
    if roundtripped != config:
        raise ValueError(
            f"{config!r} has an initializer that recipes have no name for. Allocate with a config "
            f"whose initializer recipes have, such as the default, and set init in the recipe."
        )
    defaults = {name: field.default for name, field in section_cls.model_fields.items()}
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    always = {name: values[name] for name in ("rank", "alpha") if name in values}
    return {"family": family, **always, **changed}
