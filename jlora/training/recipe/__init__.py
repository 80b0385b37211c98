"""Recipes: a training run described in one typed file."""

from jlora.training.recipe.reading import checked as checked
from jlora.training.recipe.reading import load as load
from jlora.training.recipe.sections import Recipe as Recipe
from jlora.training.recipe.showing import commented as commented
from jlora.training.recipe.showing import json_schema as json_schema
