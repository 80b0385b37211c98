"""Importance of weights: scores, ranks allocated by score, and recipes with these ranks."""

from __future__ import annotations

from jlora.importance.allocate import allocate_ranks, trainable_params
from jlora.importance.calibration import input_moments
from jlora.importance.measure import ImportanceMethod, measure_importance
from jlora.importance.methods import (
    ActivationVariance,
    ConditionNumber,
    Fisher,
    GradientNorm,
    Sensitivity,
    StableRank,
)
from jlora.importance.recipes import to_recipe
from jlora.importance.scores import Importance, WeightScore

# Methods that use the weights alone.
DATA_FREE_METHODS: tuple[type[ImportanceMethod], ...] = (ConditionNumber, StableRank)

# All methods.
METHODS: tuple[type[ImportanceMethod], ...] = (
    GradientNorm,
    Fisher,
    Sensitivity,
    ActivationVariance,
    *DATA_FREE_METHODS,
)

__all__ = [
    "DATA_FREE_METHODS",
    "METHODS",
    "ActivationVariance",
    "ConditionNumber",
    "Fisher",
    "GradientNorm",
    "Importance",
    "ImportanceMethod",
    "Sensitivity",
    "StableRank",
    "WeightScore",
    "allocate_ranks",
    "input_moments",
    "measure_importance",
    "to_recipe",
    "trainable_params",
]
