"""VB-LoRA's files with the largest logits alone (`save_only_topk_weights`)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from jlora.peft.leaf_conversion import ErrorFactory

INDICES_SUFFIX, _WEIGHTS_SUFFIX = "_topk_indices", "_topk_weights"

# Logits of vectors that are not in a mixture, and of those with a weight of zero. Adapters have
# finite numbers, and the exponentials of both are zero beside that of any other one.
_LOGIT_OF_OTHERS, _LOGIT_OF_ZERO = -2_000, -1_000


# Those of all modules of an 8B model together are fewer.
_MAX_LOGITS = 100_000_000


def restore_logits(
    tensors: Mapping[str, np.ndarray], num_vectors: int, make_error: ErrorFactory
) -> dict[str, np.ndarray]:
    """Returns the tensors of a file, with logits instead of indices and weights.

    The file has all weights of a mixture but the last one; their sum is one.

    Args:
        tensors: Tensors of the file, by name.
        num_vectors: Number of vectors of the bank.
        make_error: Function from a reason to the error to raise.

    Raises:
        ValueError: Indices have no weights or the reverse, one of them is out of range, or the
            logits are too many.
    """
    restored = {name: tensor for name, tensor in tensors.items() if "_topk_" not in name}
    modules = {name.rpartition("_topk_")[0] for name in tensors if "_topk_" in name}
    num_logits = 0
    for module in sorted(modules):
        indices, weights = (tensors.get(module + s) for s in (INDICES_SUFFIX, _WEIGHTS_SUFFIX))
        if indices is None or weights is None:
            raise make_error(f"{module} lacks {INDICES_SUFFIX} or {_WEIGHTS_SUFFIX}.")
        indices, weights = indices.astype(np.int64), weights.astype(np.float32)
        if indices.ndim != 3 or weights.shape != (*indices.shape[:2], indices.shape[2] - 1):
            raise make_error(
                f"{module} has indices of shape {indices.shape} and weights of shape "
                f"{weights.shape}; the weights must have one number less."
            )
        num_logits += math.prod(indices.shape[:2]) * num_vectors
        if num_logits > _MAX_LOGITS:
            raise make_error(
                f"the file has the largest of {num_logits:,} logits, more than the {_MAX_LOGITS:,} "
                f"that an adapter may have."
            )
        rows = np.sort(indices, axis=-1)
        if (
            (rows < 0).any()
            or (rows >= num_vectors).any()
            or (rows[..., 1:] == rows[..., :-1]).any()
            or (weights < 0).any()
            or (weights.sum(-1) > 1.01).any()
        ):
            raise make_error(
                f"{module} must have different indices below num_vectors={num_vectors}, and "
                f"weights of 0 or more with a sum of at most 1."
            )
        last = np.maximum(1 - weights.sum(-1, keepdims=True), 0)
        mixture = np.concatenate([weights, last], axis=-1)
        logits = np.full((*indices.shape[:2], num_vectors), _LOGIT_OF_OTHERS, np.float32)
        chosen = np.where(mixture > 0, np.log(np.maximum(mixture, 1e-38)), _LOGIT_OF_ZERO)
        np.put_along_axis(logits, indices, chosen.astype(np.float32), axis=-1)
        restored[module] = logits
    return restored
