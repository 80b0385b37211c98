"""Allocated ranks as the part of a recipe that says what is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jlora.adapters.base import AdapterConfig


def to_recipe(rules: Mapping[str, AdapterConfig | None]) -> dict[str, Any]:
    """The sections `lora`, `more` and `frozen` of a recipe that trains by these rules.

    Put into a recipe's mapping in place of its own, they make the same rules again. Dump them with
    `yaml.safe_dump(..., sort_keys=False)`.

    Args:
        rules: What `allocate` returned, or any such mapping whose patterns with None come first.

    Raises:
        ValueError: When no rule trains anything, one with None comes later, or a rule says what a
            recipe cannot: a start of one's own making, or one with options.
        TypeError: For a family that recipes do not have.
    """
    frozen = [pattern for pattern, config in rules.items() if config is None]
    if list(rules)[: len(frozen)] != frozen:
        raise ValueError(
            f"The rule {frozen[-1]!r}: None comes after one with a config, and a recipe's frozen "
            f"weights come first. Put it before them."
        )
    sections = [
        {**_config_to_recipe_section(config), "target_pattern": pattern}
        for pattern, config in rules.items()
        if config is not None
    ]
    if not sections:
        raise ValueError("rules adapt nothing, and a recipe trains something. Give a config.")
    return {
        "adapter": sections[-1],
        **({"adapters": sections[:-1]} if sections[:-1] else {}),
        **({"frozen_modules": frozen} if frozen else {}),
    }


def _config_to_recipe_section(config: AdapterConfig) -> dict[str, Any]:
    """A config's family and those of its fields that are not at the recipe's defaults."""
    from jlora.training.recipe.config_sections import ADAPTER_SECTIONS  # Loads pydantic.

    family = type(config).__name__
    if family not in ADAPTER_SECTIONS:
        raise TypeError(
            f"{config!r} is of no family that recipes have: {', '.join(ADAPTER_SECTIONS)}."
        )
    rule = ADAPTER_SECTIONS[family]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if field.name not in rule.config_fields:
            continue
        value = getattr(config, field.name)
        if field.name == "init":
            value = value.name
        elif field.name == "dtype":
            value = jnp.dtype(value).name
        values[field.name] = value
    try:
        again = rule(**values).to_config()
    except ValueError as error:
        raise ValueError(f"{config!r} says what a recipe cannot: {error}") from error
    if again != config:
        raise ValueError(
            f"{config!r} starts in a way that a recipe has no name for. Allocate with a config "
            f"that starts as a recipe's do, such as the default, and set init in the recipe."
        )
    defaults = {name: field.default for name, field in rule.model_fields.items()}
    kept = {name: value for name, value in values.items() if value != defaults[name]}
    always = {name: values[name] for name in ("rank", "alpha") if name in values}
    return {"family": family, **always, **kept}
