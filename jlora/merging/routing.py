"""Routing: mixing weights that depend on an embedding of the input."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _tree, _validation
from jlora._serialization import register_serialization
from jlora._tree import PyTree
from jlora.interpreter.weight import promote_to_float32
from jlora.merging.weighted import adapter_names, check_mixing_finite, with_weights
from jlora.transform import LoraTransform


@dataclasses.dataclass(frozen=True)
class Router:
    """Parameters of a router: a pytree, so it can be trained as well.

    Attributes:
        centroids: Centroid of each adapter's prompt embeddings, (n, width), of unit norm.
        log_temperature: Logarithm of the softmax temperature, so that training cannot make the
            temperature negative.
        names: Names of the n adapters.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora.merging import Router, routing_weights
        >>> router = Router(jnp.eye(2), jnp.log(0.1), ("law", "news"))
        >>> routing_weights(router, jnp.array([[1.0, 0.0]])).argmax().item()
        0
    """

    centroids: jax.Array
    log_temperature: jax.Array
    names: tuple[str, ...]


jax.tree_util.register_dataclass(
    Router, data_fields=["centroids", "log_temperature"], meta_fields=["names"]
)
register_serialization(Router, ["centroids", "log_temperature"], ["names"])


def fit_router(
    embeddings: Mapping[str, Any], weighted_adapter: Mapping[str, Any], *, temperature: float = 0.1
) -> Router:
    """Fits a router that represents each adapter by the mean embedding of its prompts.

    Args:
        embeddings: Embeddings of a few training prompts, (m, width), by the name of each adapter;
            from any encoder. Each one is normalized to unit norm first.
        weighted_adapter: Result of `weighted_sum`, which sets the order of the adapters.
        temperature: Temperature of the softmax, above 0. A lower one gives the nearest adapter a
            higher weight.

    Returns:
        The router, for `routing_weights`.

    Raises:
        ValueError: The names are not those of `weighted_adapter`; embeddings have the wrong shape,
            a non-finite entry or a mean of zero; or `temperature` is out of its range.

    References:
        Zhao et al., LoraRetriever, arXiv:2402.09997, section 4.1: an adapter is represented by the
        mean embedding of some of its training samples and retrieved by cosine similarity.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora.merging import fit_router, weighted_sum
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=1))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> mix = weighted_sum({"law": adapter, "news": adapter})
        >>> fit_router({"law": [[3.0, 0.0]], "news": [[0.0, 2.0]]}, mix).centroids
        Array([[1., 0.],
               [0., 1.]], dtype=float32)
    """
    names = adapter_names(weighted_adapter)
    other = sorted(set(embeddings) ^ set(names))
    if other:
        raise ValueError(
            f"embeddings must have the names of weighted_adapter, and the two differ in {other}. "
            f"Pass embeddings for each of {list(names)}."
        )
    _validation.check_positive("temperature", temperature)
    centroids = []
    for name in names:
        vectors = np.asarray(embeddings[name], np.float64)
        width = _embedding_width(embeddings[names[0]])
        if vectors.ndim != 2 or 0 in vectors.shape or vectors.shape[1] != width:
            raise ValueError(
                f"embeddings[{name!r}] must have shape (m, width) with at least one prompt and the "
                f"width of the others, got shape {vectors.shape}; embeddings[{names[0]!r}] has "
                f"shape {np.shape(embeddings[names[0]])}."
            )
        check_mixing_finite(f"embeddings[{name!r}]", vectors)
        centroids.append(np.asarray(_normalize_vectors(_normalize_vectors(vectors).mean(0))))
        if not centroids[-1].any():
            raise ValueError(
                f"embeddings[{name!r}] has a mean of zero, which has no direction. Pass more "
                f"prompts of this adapter."
            )
    return Router(jnp.asarray(np.stack(centroids), float), jnp.log(jnp.asarray(temperature)), names)


def routing_weights(router: Router, embedding: Any, *, top_k: int | None = None) -> jax.Array:
    """Returns each adapter's weight for each input: `softmax(cosine / temperature)`, (batch, n).

    The function is differentiable with respect to both arguments.

    Args:
        router: Result of `fit_router`, trained further or not.
        embedding: Embeddings of the inputs, (batch, width), from the encoder of the router's
            prompts. An embedding of norm zero gets equal weights.
        top_k: Number of nearest adapters in the softmax, the others having weight 0; all when
            None. With 1, the nearest adapter is retrieved.

    Raises:
        ValueError: `embedding` has the wrong shape or a non-finite entry, or `top_k` is out of its
            range.

    References:
        Zhao et al., LoraRetriever, arXiv:2402.09997, section 4.2, where the nearest adapters have
        equal weights. Wu et al., MoLE, arXiv:2404.13628, section 3, for a softmax with a learned
        temperature, over the features of each layer.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora.merging import Router, routing_weights
        >>> router = Router(jnp.eye(2), jnp.log(0.1), ("law", "news"))
        >>> routing_weights(router, jnp.array([[1.0, 0.0]]), top_k=1)
        Array([[1., 0.]], dtype=float32)
    """
    num_adapters, width = router.centroids.shape
    embedding = promote_to_float32(jnp.asarray(embedding))  # Squares of float16 overflow at 256.
    if embedding.ndim != 2 or embedding.shape[1] != width:
        raise ValueError(
            f"embedding must have shape (batch, {width}), the width of the router, got shape "
            f"{embedding.shape}."
        )
    if top_k is not None:
        _validation.check_positive_int("top_k", top_k)
    if top_k is not None and top_k > num_adapters:
        raise ValueError(f"top_k={top_k} must be at most the number of adapters, {num_adapters}.")
    check_mixing_finite("embedding", embedding)
    exact = jax.lax.Precision.HIGHEST
    cosines = jnp.matmul(
        _normalize_vectors(embedding), _normalize_vectors(router.centroids).T, precision=exact
    )
    scores = cosines / jnp.exp(router.log_temperature)
    if top_k is None:
        return jax.nn.softmax(scores, axis=-1)
    _, nearest = jax.lax.top_k(scores, top_k)
    selected = jax.nn.one_hot(nearest, num_adapters, dtype=bool).any(-2)
    return jax.nn.softmax(scores, axis=-1, where=selected)


def apply_routed(
    lora: LoraTransform,
    params: PyTree,
    weighted_adapter: Mapping[str, Any],
    weights: Any,
    *inputs: Any,
    **kwargs: Any,
) -> Any:
    """Applies the model to a batch in which each example has its own mixing weights.

    The output for example `i` equals that of
    `lora.apply(params, with_weights(weighted_adapter, weights[i]), ...)` for the example alone. All
    examples share the base and the factors; only the weights differ.

    Args:
        lora: Transform of the model's function.
        params: The base.
        weighted_adapter: Result of `weighted_sum`.
        weights: Mixing weights of each example, (batch, n), such as those of `routing_weights`.
        *inputs: Inputs of the model. The first axis of each array must be the batch; bind an array
            without a batch axis to the model's function. Other values are passed through.
        **kwargs: Keyword inputs, likewise.

    Returns:
        The model's outputs, with the batch as the first axis.

    Raises:
        ValueError: `weights` has the wrong shape or a non-finite entry, or an input or output has
            no batch axis.

    References:
        Zhao et al., LoraRetriever, arXiv:2402.09997, section 4.3, for batches whose examples have
        different adapters.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora.merging import apply_routed, weighted_sum
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=1))
        >>> mix = weighted_sum({"law": lora.init(jax.random.key(0), params, x)})
        >>> apply_routed(lora, params, mix, jnp.ones((2, 1)), x).shape
        (2, 3)
    """
    weights = jnp.asarray(weights)
    num_adapters = len(adapter_names(weighted_adapter))
    if weights.ndim != 2 or weights.shape[1] != num_adapters:
        raise ValueError(
            f"weights must have shape (batch, {num_adapters}), got shape {weights.shape}. Pass the "
            f"result of routing_weights."
        )
    check_mixing_finite("weights", weights)
    batch_size = weights.shape[0]
    leaves, treedef = jax.tree.flatten((inputs, kwargs))
    arrays = [leaf for leaf in leaves if _tree.is_array(leaf)]
    shapes = [tuple(leaf.shape) for leaf in arrays]
    if not arrays or any(shape[:1] != (batch_size,) for shape in shapes):
        raise ValueError(
            f"The first axis of each input array must be the batch of {batch_size} of the weights, "
            f"got shapes {shapes}. Bind an array without a batch axis with functools.partial."
        )

    def apply_one(example_weights: jax.Array, example: list[jax.Array]) -> Any:
        arrays = iter(example)
        filled = [next(arrays)[None] if _tree.is_array(leaf) else leaf for leaf in leaves]
        positional, keywords = jax.tree.unflatten(treedef, filled)
        adapter = with_weights(weighted_adapter, example_weights)
        outputs = lora.apply(params, adapter, *positional, **keywords)
        return jax.tree.map(_squeeze_example, outputs)

    return jax.vmap(apply_one)(weights, arrays)


def _squeeze_example(output: jax.Array) -> jax.Array:
    """Removes the batch axis of an output for a batch of one."""
    if output.shape[:1] != (1,):
        raise ValueError(
            f"The first axis of each output must be the batch, got shape {output.shape} for a "
            f"batch of one. Return outputs with a batch axis from the model's function."
        )
    return output[0]


def _embedding_width(embeddings: Any) -> int:
    return np.shape(embeddings)[-1] if np.ndim(embeddings) else 0


def _normalize_vectors(vectors: Any) -> jax.Array:
    """Scales the last axis to unit norm; vectors of zero stay zero."""
    squares = (vectors**2).sum(-1, keepdims=True)
    # The gradient of a norm at zero is infinite, and NaN even where it is not used.
    norms = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    return jnp.where(squares > 0, vectors / norms, 0)
