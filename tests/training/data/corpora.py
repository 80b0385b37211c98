"""Datasets of synthetic tokens, whose examples differ in their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jlora.training.data.tokenized_dataset import (
    TokenizeConfig,
    TokenizedDataset,
    TokenizedDatasetBuilder,
    TokenSequence,
)


def made(
    sizes: Sequence[int], *, first: int = 10, sequences: int = 1, labelled: bool = False
) -> TokenizedDataset:
    """Examples of these sizes; token k is first + k, two of three and the last are loss tokens."""
    builder = TokenizedDatasetBuilder(TokenizeConfig(max_seq_length=10_000))
    token = first
    for row, size in enumerate(sizes):
        parts = []
        for part in range(sequences):
            ids = np.arange(token, token + size + part)
            learn = (ids % 3 > 0) | (ids == ids[-1])
            parts.append(TokenSequence(ids, learn, [0] * (size // 2) + [1] * (size - size // 2)))
            token += size + part
        if labelled:
            builder.add_labeled(row, parts[0], row % 3, truncated=False)
        else:
            builder.add(row, *(TokenSequence(ids, learn) for ids, learn, _ in parts))
    names = ["a", "b", "c"] if labelled else None
    return builder.build(sequences_per_example=sequences, label_names=names)


def realistic(count: int, length: int, seed: int = 0) -> np.ndarray:
    """Sizes as instructions have them: many short, some long, none too long."""
    drawn = np.random.default_rng(seed).lognormal(5.2, 0.8, count).astype(np.int64)
    return np.clip(drawn, 3, length)
