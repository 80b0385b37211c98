"""A model with every kind of weight, and its gradients derived by hand in NumPy float64.

All axis lengths differ: 6 inputs, width 5, 3 experts, 4 and 2 x 7 outputs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GAINS = np.array([1.0, 2.0, -0.5])


def _for_each(h: Any, numpy: Any) -> Any:
    """Inputs of the experts, (batch, 4, 3, 5)."""
    return numpy.stack([h * gain for gain in GAINS], 2)


def model(params: Any, batch: Any) -> jax.Array:
    """Output, (batch, 4, 3, 2, 7).

    The weights are a matrix, a scanned stack, experts along the last axis, and a weight with two
    output axes; also an embedding and a bias, which LoRA does not adapt.
    """
    x = batch["x"] + params["embed"][batch["tokens"]]
    h = jnp.tanh(x @ params["first"] + params["bias"])
    h, _ = lax.scan(
        lambda c, w: (jnp.tanh(jnp.einsum("rtd,fd->rtf", c, w)), None), h, params["layers"]
    )
    z = jnp.einsum("rted,dfe->rtef", _for_each(h, jnp), params["experts"])
    return jnp.einsum("rtef,fhk->rtehk", z, params["out"])


def loss(params: Any, batch: Any) -> jax.Array:
    """Half the mean over the batch of summed squares."""
    return jnp.mean(jnp.sum((model(params, batch) - 1) ** 2, axis=(1, 2, 3, 4))) / 2


def params(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    shapes = {
        "embed": (9, 6),
        "first": (6, 5),
        "bias": (5,),
        "layers": (2, 5, 5),
        "experts": (5, 4, 3),
        "out": (4, 2, 7),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    drawn = zip(shapes.items(), keys, strict=True)
    return {n: (jax.random.normal(k, s) / 2).astype(dtype) for (n, s), k in drawn}


def batches(*sizes: int) -> list[dict[str, jax.Array]]:
    """Batches of these sizes."""
    result = []
    for number, count in enumerate(sizes):
        x_key, token_key = jax.random.split(jax.random.key(number + 1))
        tokens = jax.random.randint(token_key, (count, 4), 0, 9)
        result.append({"x": jax.random.normal(x_key, (count, 4, 6)), "tokens": tokens})
    return result


def inputs(params: Any, batch: Any) -> dict[str, np.ndarray]:
    """Inputs of each weight, (matrices, inputs, fan_in)."""
    p = {name: np.float64(value) for name, value in params.items()}
    x = np.float64(batch["x"]) + p["embed"][np.asarray(batch["tokens"])]
    h = [np.tanh(x @ p["first"] + p["bias"])]
    for w in p["layers"]:
        h.append(np.tanh(h[-1] @ w.T))
    each = _for_each(h[-1], np)
    z = np.einsum("rted,dfe->rtef", each, p["experts"])
    flat = {"first": [x], "layers": h[:-1], "experts": list(np.moveaxis(each, 2, 0)), "out": [z]}
    return {n: np.stack([v.reshape(-1, v.shape[-1]) for v in vs]) for n, vs in flat.items()}


def gradients(params: Any, batch: Any) -> dict[str, np.ndarray]:
    """Gradients of the loss, derived by hand."""
    p = {name: np.float64(value) for name, value in params.items()}
    rows = len(batch["x"])
    x = np.float64(batch["x"]) + p["embed"][np.asarray(batch["tokens"])]
    h = [np.tanh(x @ p["first"] + p["bias"])]
    for w in p["layers"]:
        h.append(np.tanh(h[-1] @ w.T))
    each = _for_each(h[-1], np)
    z = np.einsum("rted,dfe->rtef", each, p["experts"])
    dy = (np.einsum("rtef,fhk->rtehk", z, p["out"]) - 1) / rows
    dz = np.einsum("rtehk,fhk->rtef", dy, p["out"])
    grads = {
        "out": np.einsum("rtef,rtehk->fhk", z, dy),
        "experts": np.einsum("rted,rtef->dfe", each, dz),
    }
    dh = np.einsum("rtef,dfe,e->rtd", dz, p["experts"], GAINS)
    layers = []
    for number in (1, 0):
        dpre = dh * (1 - h[number + 1] ** 2)
        layers.append(np.einsum("rtf,rtd->fd", dpre, h[number]))
        dh = dpre @ p["layers"][number]
    grads["layers"] = np.stack(layers[::-1])
    grads["first"] = np.einsum("rtd,rtf->df", x, dh * (1 - h[0] ** 2))
    return grads


def by_matrix(name: str, array: Any) -> np.ndarray:
    """Moves the axis of the matrices of a weight to the front."""
    array = np.float64(array)
    if name == "experts":
        return np.moveaxis(array, -1, 0)
    return array if name == "layers" else array[None]
