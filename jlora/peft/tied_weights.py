"""The embedding and the head of a model where both are one weight, and two modules in PEFT.

PEFT adapts each of the two modules by its own tensors. An adapter of the one weight is a pair of
modules with the same update: the factors of the head are those of the embedding, transposed and
exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jlora.peft.tensor_layouts import ModuleParameter

# Suffix of the embedding's tensor with the transpose of each tensor of the head.
_TRANSPOSED_SUFFIXES = {
    "lora_A.weight": "lora_embedding_B",
    "lora_B.weight": "lora_embedding_A",
    "hira_A": "hira_embedding_B",
    "hira_B": "hira_embedding_A",
}

# Suffixes of the complete weight, which is laid out alike in both modules.
_WEIGHT_SUFFIXES = ("weight", "base_layer.weight")


class TiedWeightsError(ValueError):
    """An adapter changes one of two modules that are one weight of the model."""


class TiedPair(NamedTuple):
    """Two modules of a checkpoint that are one weight of the model.

    Attributes:
        head: Name of the head's module.
        embedding: Parameter of the embedding's module.
    """

    head: str
    embedding: ModuleParameter


def find_tied_pairs(
    tied_modules: Mapping[str, str], parameters: Mapping[tuple[str, str], ModuleParameter]
) -> list[TiedPair]:
    """Returns the pairs of modules, from the path of the weight that each tied module shares."""
    return [
        TiedPair(head, parameter)
        for head, path in tied_modules.items()
        for parameter in parameters.values()
        if parameter.path == path
    ]


def head_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """Returns the head's tensors for an embedding's, by suffix.

    Returns:
        The tensors; None if the head's update cannot be that of the embedding, as with a magnitude.
    """
    by_suffix = {theirs: ours for ours, theirs in _TRANSPOSED_SUFFIXES.items()}
    if not set(tensors) <= set(by_suffix):
        return None
    return {by_suffix[suffix]: tensor.T for suffix, tensor in tensors.items()}


def join_tied_tensors(
    folder: Path,
    pair: TiedPair,
    tensors: MutableMapping[str, np.ndarray],
    base_table: np.ndarray,
    scales: tuple[float, float],
    is_tied_by_config: bool,
) -> None:
    """Removes the head's tensors from those of a file, if they have the embedding's update.

    Args:
        folder: Folder of the file, for errors.
        pair: The two modules.
        tensors: Tensors of the file, by name.
        base_table: The base's weight, laid out as the tensors.
        scales: Scales of the factors of the embedding and of the head.
        is_tied_by_config: Whether the config says that both have the same update
            (`ensure_weight_tying`), so that the head's tensors may be missing.

    Raises:
        TiedWeightsError: The two have different updates, which one weight cannot have.
    """
    head, embedding = pair.head, pair.embedding.module
    ours = _collect_changes(tensors, embedding, base_table)
    theirs = {
        _TRANSPOSED_SUFFIXES.get(suffix, suffix): tensor.T
        if suffix in _TRANSPOSED_SUFFIXES
        else tensor
        for suffix, tensor in _collect_changes(tensors, head, base_table).items()
    }
    # Trained tokens of the embedding are those of the head in PEFT as well.
    ours = {suffix: tensor for suffix, tensor in ours.items() if "trainable_tokens" not in suffix}
    is_same = set(ours) == set(theirs) and all(
        np.array_equal(ours[suffix], theirs[suffix]) for suffix in ours
    )
    has_factors = any(suffix in _TRANSPOSED_SUFFIXES.values() for suffix in ours)
    if has_factors and theirs and not math.isclose(*scales):
        is_same = False
    if not is_same and (theirs or not is_tied_by_config):
        change = f"only {embedding}" if not theirs else f"only {head}" if not ours else "each alone"
        raise TiedWeightsError(
            f"{folder}: the model has one weight for {embedding} and {head}, and PEFT's adapter "
            f"changes {change}. Load the base with a weight for each: "
            f"jlora.models.load(..., tie_word_embeddings=False)."
        )
    for name in [name for name in tensors if name.startswith(f"{head}.")]:
        del tensors[name]


def _collect_changes(
    tensors: Mapping[str, np.ndarray], module: str, base_table: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns the tensors of a module that change its weight, by suffix."""
    found = {
        name.removeprefix(f"{module}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{module}.")
    }
    changes = {}
    for suffix, tensor in found.items():
        if suffix not in _WEIGHT_SUFFIXES:
            changes[suffix] = tensor
        elif not np.array_equal(tensor, base_table.astype(tensor.dtype)):
            changes["weight"] = tensor
    factors = {suffix for suffix in changes if suffix.startswith(("lora_", "hira_"))}
    if any(not changes[suffix].any() for suffix in factors):
        changes = {suffix: changes[suffix] for suffix in changes if suffix not in factors}
    return changes
