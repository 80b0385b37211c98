"""A 4-layer transformer in Linen, scanned Linen and NNX, also callable on embedded tokens.

Parameters are shapes: the tests compile programs and do not run them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jlora

LAYERS, WIDTH, HIDDEN, HEADS, VOCABULARY = 4, 64, 200, 2, 80
TOKENS = jax.device_put(np.arange(2 * 24, dtype=np.int32).reshape(2, 24))


class Transformer(NamedTuple):
    """A transformer.

    Attributes:
        forward: Function of parameters and tokens.
        body: Function of parameters and embedded tokens.
        params: Shapes of the parameters.
        adapted: Pattern of every kernel and the embedding, so that gradients reach the bottom.
    """

    forward: Callable[..., jax.Array]
    body: Callable[..., jax.Array]
    params: Any
    adapted: str


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> Any:
        y = nn.RMSNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, use_bias=False)(y)
        y = nn.Dense(HIDDEN, use_bias=False)(nn.RMSNorm()(x))
        return x + nn.Dense(WIDTH, use_bias=False)(jnp.maximum(y, 0)), None


class Linen(nn.Module):
    scanned: bool

    def setup(self) -> None:
        self.embed = nn.Embed(VOCABULARY, WIDTH)
        if self.scanned:
            stack = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
            )
            self.layers = stack()
        else:
            self.blocks = [Block() for _ in range(LAYERS)]

    def body(self, x: jax.Array) -> jax.Array:
        if self.scanned:
            return self.layers(x, None)[0]
        for block in self.blocks:
            x, _ = block(x)
        return x

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.body(self.embed(tokens))


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, use_bias=False, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norms[0](x))
        return x + self.down(jnp.maximum(self.up(self.norms[1](x)), 0))


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])

    def body(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.body(self.embed(tokens))


def make(kind: str) -> Transformer:
    """The transformer as `"linen"`, `"scanned"` or `"nnx"`."""
    if kind == "nnx":
        module = nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))
        forward, params = jlora.from_nnx(module)
        body, _ = jlora.from_nnx(module, method="body")
    else:
        model = Linen(scanned=kind == "scanned")
        forward, params = model.apply, jax.eval_shape(model.init, jax.random.key(0), TOKENS)
        body = lambda params, x: model.apply(params, x, method="body")
    return Transformer(forward, body, params, "embedding|kernel")
