"""A model of every kind of weight, and its gradients written out in NumPy, float64.

Lengths differ everywhere: 6 inputs, 5 wide, 3 experts, 4 and 2 x 7 outputs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GAINS = np.array([1.0, 2.0, -0.5])


def _for_each(h: Any, numpy: Any) -> Any:
    """What each expert meets, (rows, 4, 3, 5)."""
    return numpy.stack([h * gain for gain in GAINS], 2)


def model(params: Any, batch: Any) -> jax.Array:
    """(rows, 4, 3, 2, 7): a plain weight, a scanned stack, experts along the last axis, two axes of
    outputs; and an embedding and a bias, which LoRA leaves alone.
    """
    x = batch["x"] + params["embed"][batch["tokens"]]
    h = jnp.tanh(x @ params["first"] + params["bias"])
    h, _ = lax.scan(
        lambda c, w: (jnp.tanh(jnp.einsum("rtd,fd->rtf", c, w)), None), h, params["layers"]
    )
    z = jnp.einsum("rted,dfe->rtef", _for_each(h, jnp), params["experts"])
    return jnp.einsum("rtef,fhk->rtehk", z, params["out"])


def loss(params: Any, batch: Any) -> jax.Array:
    """Half of the mean over rows of summed squares."""
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


def batches(*rows: int) -> list[dict[str, jax.Array]]:
    """A batch of so many rows each."""
    found = []
    for number, count in enumerate(rows):
        one, two = jax.random.split(jax.random.key(number + 1))
        tokens = jax.random.randint(two, (count, 4), 0, 9)
        found.append({"x": jax.random.normal(one, (count, 4, 6)), "tokens": tokens})
    return found


def inputs(params: Any, batch: Any) -> dict[str, np.ndarray]:
    """What each weight meets, (its matrices, inputs, fan_in)."""
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
    """Of the loss, by hand."""
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
    found = {
        "out": np.einsum("rtef,rtehk->fhk", z, dy),
        "experts": np.einsum("rted,rtef->dfe", each, dz),
    }
    dh = np.einsum("rtef,dfe,e->rtd", dz, p["experts"], GAINS)
    layers = []
    for number in (1, 0):
        dpre = dh * (1 - h[number + 1] ** 2)
        layers.append(np.einsum("rtf,rtd->fd", dpre, h[number]))
        dh = dpre @ p["layers"][number]
    found["layers"] = np.stack(layers[::-1])
    found["first"] = np.einsum("rtd,rtf->df", x, dh * (1 - h[0] ** 2))
    return found


def by_matrix(name: str, array: Any) -> np.ndarray:
    """An array laid out like a weight, its matrices first."""
    array = np.float64(array)
    if name == "experts":
        return np.moveaxis(array, -1, 0)
    return array if name == "layers" else array[None]
