"""Weights of a mix that depend on the input: a gate on an embedding of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _tree, _validation
from jlora._tree import PyTree
from jlora.interpreter.weight import promote_to_float32
from jlora.merging.weighted import adapter_names, check_mixing_finite, with_weights
from jlora.transform import LoraTransform


@dataclasses.dataclass(frozen=True)
class Router:
    """What `routing_weights` compares an embedding with: a pytree, so it can be trained too.

    Attributes:
        centroids: (n, width), of length one: where the prompts of each adapter lie.
        log_temperature: The logarithm of what cosines are divided by, so that no step of training
            can turn its sign.
        names: Of the adapters.
    """

    centroids: jax.Array
    log_temperature: jax.Array
    names: tuple[str, ...]


jax.tree_util.register_dataclass(
    Router, data_fields=["centroids", "log_temperature"], meta_fields=["names"]
)


def fit_router(
    embeddings: Mapping[str, Any], weighted_adapter: Mapping[str, Any], *, temperature: float = 0.1
) -> Router:
    """A gate that knows each adapter by the mean of its prompts' embeddings.

    Args:
        embeddings: For each adapter of the mix its name and (m, width): a few prompts of what it
            was trained on, embedded by any encoder. Each is scaled to length one first.
        weighted_adapter: What `mixed` returned; its adapters' order becomes that of the weights.
        temperature: Of the softmax; the lower, the more the nearest adapter gets. Positive.

    Raises:
        ValueError: For other names than the mix has, for embeddings of other shapes, that are not
            finite, or whose mean is zero, and for a temperature out of its range.

    References:
        Zhao et al., LoraRetriever, arXiv:2402.09997, section 4.1: an adapter is represented by the
        mean embedding of some of its training samples, and found by the cosine.
    """
    names = adapter_names(weighted_adapter)
    other = sorted(set(embeddings) ^ set(names))
    if other:
        raise ValueError(
            f"embeddings and the mix differ in {other}. Give prompts of each of {list(names)}."
        )
    _validation.check_positive("temperature", temperature)
    centroids = []
    for name in names:
        rows = np.asarray(embeddings[name], np.float64)
        if (
            rows.ndim != 2
            or 0 in rows.shape
            or rows.shape[1] != _embedding_width(embeddings[names[0]])
        ):
            raise ValueError(
                f"embeddings[{name!r}] have shape {rows.shape}, and those of {names[0]!r} "
                f"{np.shape(embeddings[names[0]])}. Give at least one row for each, all as wide."
            )
        check_mixing_finite(f"The embeddings of {name!r}", rows)
        centroids.append(np.asarray(_normalize_vectors(_normalize_vectors(rows).mean(0))))
        if not centroids[-1].any():
            raise ValueError(
                f"The embeddings of {name!r} have the mean zero, which lies in no direction. Give "
                f"more prompts of it."
            )
    return Router(jnp.asarray(np.stack(centroids), float), jnp.log(jnp.asarray(temperature)), names)


def routing_weights(router: Router, embedding: Any, *, top_k: int | None = None) -> jax.Array:
    """The weight of every adapter for every input: `softmax(cosine / temperature)`, (rows, n).

    Args:
        router: From `fit_router`, as it is or trained: this can be differentiated.
        embedding: (rows, width), by the encoder that the gate's prompts were embedded by. One of
            length zero is as near to all, and gets equal weights.
        top_k: How many of the nearest adapters are used, the softmax being of those alone; all when
            None. With 1 it is the retrieval of the nearest.

    Raises:
        ValueError: For an embedding of another shape or that is not finite, and for a `top_k` out
            of its range.

    References:
        Zhao et al., LoraRetriever, arXiv:2402.09997, section 4.2: there the nearest few all have
        the same weight. Wu et al., MoLE, arXiv:2404.13628, section 3, for a softmax with a learned
        temperature, there of each layer's own features.
    """
    count, width = router.centroids.shape
    embedding = promote_to_float32(jnp.asarray(embedding))  # Squares of float16 overflow at 256.
    if embedding.ndim != 2 or embedding.shape[1] != width:
        raise ValueError(
            f"embedding has shape {embedding.shape}, and the gate compares rows of {width} "
            f"numbers. Give (rows, {width})."
        )
    if top_k is not None:
        _validation.check_positive_int("top_k", top_k)
    if top_k is not None and top_k > count:
        raise ValueError(f"top_k={top_k} exceeds the {count} adapters. Use at most that.")
    check_mixing_finite("The embeddings", embedding)
    exact = jax.lax.Precision.HIGHEST
    cosines = jnp.matmul(
        _normalize_vectors(embedding), _normalize_vectors(router.centroids).T, precision=exact
    )
    scores = cosines / jnp.exp(router.log_temperature)
    if top_k is None:
        return jax.nn.softmax(scores, axis=-1)
    _, nearest = jax.lax.top_k(scores, top_k)
    kept = jax.nn.one_hot(nearest, count, dtype=bool).any(-2)
    return jax.nn.softmax(scores, axis=-1, where=kept)


def apply_routed(
    lora: LoraTransform,
    params: PyTree,
    weighted_adapter: Mapping[str, Any],
    weights: Any,
    *inputs: Any,
    **kwargs: Any,
) -> Any:
    """What the model computes for a batch whose every row has its own weights of the adapters.

    Row `i` is what `lora.apply(params, with_weights(mix, weights[i]), ...)` returns for that row
    alone. The base and the factors are shared by all rows; only the weights differ.

    Args:
        lora: Around the model's function.
        params: The base.
        weighted_adapter: What `mixed` returned.
        weights: (rows, n), such as `routing_weights` returns.
        *inputs: Of the model. The first axis of every array runs over the rows; what has none is
            bound to the model's function instead. What is no array is passed on.
        **kwargs: As `inputs`.

    Raises:
        ValueError: For weights of another shape, and for inputs or outputs without the rows.
    """
    weights = jnp.asarray(weights)
    count = len(adapter_names(weighted_adapter))
    if weights.ndim != 2 or weights.shape[1] != count:
        raise ValueError(
            f"weights have shape {weights.shape} instead of (rows, {count}): one number for each "
            f"row and adapter. Give what gate_weights returns."
        )
    check_mixing_finite("The weights", weights)
    rows = weights.shape[0]
    leaves, treedef = jax.tree.flatten((inputs, kwargs))
    arrays = [leaf for leaf in leaves if _tree.is_array(leaf)]
    shapes = [tuple(leaf.shape) for leaf in arrays]
    if not arrays or any(shape[:1] != (rows,) for shape in shapes):
        raise ValueError(
            f"inputs have the shapes {shapes}, and the weights are of {rows} rows. The first axis "
            f"of every array must run over those; bind what has no rows with functools.partial."
        )

    def one(numbers: jax.Array, row: list[jax.Array]) -> Any:
        rest = iter(row)
        filled = [next(rest)[None] if _tree.is_array(leaf) else leaf for leaf in leaves]
        positional, named = jax.tree.unflatten(treedef, filled)
        outputs = lora.apply(params, with_weights(weighted_adapter, numbers), *positional, **named)
        return jax.tree.map(_squeeze_example, outputs)

    return jax.vmap(one)(weights, arrays)


def _squeeze_example(output: jax.Array) -> jax.Array:
    """The one row of an output."""
    if output.shape[:1] != (1,):
        raise ValueError(
            f"An output of one row has shape {output.shape}, so its first axis runs over no rows. "
            f"Let the model's function return what belongs to rows alone."
        )
    return output[0]


def _embedding_width(embeddings: Any) -> int:
    return np.shape(embeddings)[-1] if np.ndim(embeddings) else 0


def _normalize_vectors(vectors: Any) -> jax.Array:
    """The rows at length one; zero where they are."""
    squares = (vectors**2).sum(-1, keepdims=True)
    # Of a length of zero the gradient would be infinite, and NaN even where it is not used.
    length = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    return jnp.where(squares > 0, vectors / length, 0)
