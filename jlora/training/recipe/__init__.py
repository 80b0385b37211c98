"""Recipes: the typed configuration of a training run, read from one YAML file."""

from __future__ import annotations

from jlora.training.recipe.load import load, validate
from jlora.training.recipe.schema import default_recipe_yaml, json_schema
from jlora.training.recipe.sections import Recipe

__all__ = [
    "Recipe",
    "default_recipe_yaml",
    "json_schema",
    "load",
    "validate",
]
