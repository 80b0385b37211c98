"""Text from a decoder: a prefill, then a compiled loop with a cache of keys and values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora._quantized_array import is_quantized
from jlora.models.decoder import Decoder, KVCache, init_cache

ModelApplyFn = Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen.

    Attributes:
        temperature: What logits are divided by; 0 takes the likeliest token, without a draw.
        top_k: How many of the likeliest tokens are drawn from; all when None.
        top_p: The least share of probability that is drawn from, the likeliest tokens first.
        eos_token_ids: Those that end a text. They are part of it.
        pad_token_id: What follows the end.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"SamplingParams.temperature={self.temperature} is no temperature. Give 0 for the "
                f"likeliest token, or a positive number."
            )
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(
                f"SamplingParams.top_k={self.top_k} leaves no token to draw. Give a positive count, or "
                f"None for all."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"SamplingParams.top_p={self.top_p} is no share. Give one above 0, up to 1."
            )


class GenerateOutput(NamedTuple):
    """What followed the prompts.

    Attributes:
        tokens: (batch, max_new_tokens); the pad token after a text's end.
        lengths: (batch,), how many of them are text, the stop token included.
    """

    tokens: jax.Array
    lengths: jax.Array


class _DecodeState(NamedTuple):
    """What a step of the loop replaces."""

    step: jax.Array
    cache: KVCache
    last_tokens: jax.Array  # (batch,)
    positions: jax.Array  # (batch,), of `last`
    done: jax.Array  # (batch,)
    tokens: jax.Array
    lengths: jax.Array


def generate(
    model: Decoder,
    params: Any,
    input_ids: jax.typing.ArrayLike,
    attention_mask: jax.typing.ArrayLike | None = None,
    *,
    max_new_tokens: int,
    sampling: SamplingParams = SamplingParams(),
    key: jax.Array | None = None,
    apply: ModelApplyFn | None = None,
    cache_dtype: jax.typing.DTypeLike | None = None,
) -> GenerateOutput:
    """What the model writes after every prompt.

    It is compiled once for each shape of prompts, number of tokens and way of sampling.

    Args:
        model: The decoder.
        params: What `apply` takes first.
        input_ids: (batch, length) prompts.
        attention_mask: (batch, length), 0 for padding, on the left or on the right of every text.
        max_new_tokens: How many tokens are written at most.
        sampling: How they are chosen.
        key: Of the draws; needed at a temperature above 0.
        apply: `model.apply` when left out; `lora.apply` with its adapter as
            `lambda p, *args, **kwargs: lora.apply(p["base"], p["adapter"], *args, **kwargs)`. A
            function of the same identity is compiled once.
        cache_dtype: Of the keys and values held; that of `params` when left out.

    Raises:
        ValueError: No prompt, no key to draw with, no room for the tokens, or a prompt without a
            token.
    """
    ids = jnp.asarray(input_ids, jnp.int32)
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(f"input_ids of shape {ids.shape} are no prompts. Give (batch, length).")
    seen = jnp.ones_like(ids) if attention_mask is None else jnp.asarray(attention_mask, jnp.int32)
    if seen.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {seen.shape}, input_ids {ids.shape}. Give one entry per token."
        )
    empty = [row for row, count in enumerate(jax.device_get(seen.sum(axis=1))) if not count]
    if empty:
        raise ValueError(f"The prompts {empty} have no token. Begin each with one, say the first.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} asks for nothing. Give 1 or more.")
    longest = ids.shape[1] + max_new_tokens
    if longest > model.config.max_seq_length:
        raise ValueError(
            f"Prompts of {ids.shape[1]} tokens and max_new_tokens={max_new_tokens} run past the "
            f"{model.config.max_seq_length} that the model was made for. Shorten one of them."
        )
    if sampling.temperature and key is None:
        raise ValueError(
            f"SamplingParams.temperature={sampling.temperature} draws tokens. Give a key, "
            f"`jax.random.key(0)` say."
        )
    if cache_dtype is None:
        weights = jax.tree.leaves(params, is_leaf=is_quantized)
        leaves = [leaf.dtype for leaf in weights if leaf.ndim > 1]
        cache_dtype = model.dtype or max(leaves, key=leaves.count)
    key = jax.random.key(0) if key is None else key
    same: Any = model  # A frozen dataclass, which hashes by its fields.
    own = _cached_model_apply(same) if apply is None else apply
    made = _compile_generate(same, own, max_new_tokens, sampling, jnp.dtype(cache_dtype))
    return made(params, ids, seen, key)


@functools.cache
def _cached_model_apply(model: Decoder) -> ModelApplyFn:
    """`model.apply`, the same object for equal models."""
    return model.apply


@functools.lru_cache(maxsize=64)
def _compile_generate(
    model: Decoder, apply: ModelApplyFn, max_new_tokens: int, sampling: SamplingParams, dtype: Any
) -> Callable[..., GenerateOutput]:
    return jax.jit(
        functools.partial(_generate_tokens, model, apply, max_new_tokens, sampling, dtype)
    )


def _generate_tokens(
    model: Decoder,
    apply: ModelApplyFn,
    max_new_tokens: int,
    sampling: SamplingParams,
    dtype: Any,
    params: Any,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    key: jax.Array,
) -> GenerateOutput:
    batch, length = input_ids.shape
    attention_mask = (attention_mask != 0).astype(jnp.int32)
    # Padding to the left: what a window reaches back over is text, and all texts end in one slot.
    order = jnp.argsort(attention_mask, axis=1, stable=True)
    input_ids, attention_mask = (
        jnp.take_along_axis(array, order, axis=1) for array in (input_ids, attention_mask)
    )
    positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
    cache = init_cache(model, batch, length + max_new_tokens, dtype)
    logits, cache = apply(params, input_ids, attention_mask, positions, cache)

    def chosen(logits: jax.Array, step: jax.Array, state: _DecodeState | None) -> Any:
        """The next tokens, the pad token for texts that ended."""
        tokens = sample_tokens(logits, jax.random.fold_in(key, step), sampling)
        if state is None:
            return tokens, jnp.zeros(batch, bool)
        return jnp.where(state.done, sampling.pad_token_id, tokens), state.done

    def after(tokens: jax.Array, done: jax.Array) -> jax.Array:
        stops = jnp.array(sampling.eos_token_ids, jnp.int32)
        return done | (tokens[:, None] == stops).any(axis=1)

    first, done = chosen(logits[:, -1], jnp.zeros((), jnp.int32), None)
    written = jnp.full((batch, max_new_tokens), sampling.pad_token_id, jnp.int32)
    state = _DecodeState(
        step=jnp.ones((), jnp.int32),
        cache=cache,
        last_tokens=first,
        positions=positions[:, -1] + 1,
        done=after(first, done),
        tokens=written.at[:, 0].set(first),
        lengths=jnp.ones(batch, jnp.int32),
    )

    def goes_on(state: _DecodeState) -> jax.Array:
        return (state.step < max_new_tokens) & ~state.done.all()

    def step(state: _DecodeState) -> _DecodeState:
        logits, cache = apply(
            params,
            state.last_tokens[:, None],
            jnp.ones((batch, 1), jnp.int32),
            state.positions[:, None],
            state.cache,
        )
        tokens, done = chosen(logits[:, 0], state.step, state)
        return _DecodeState(
            step=state.step + 1,
            cache=cache,
            last_tokens=tokens,
            positions=state.positions + 1,
            done=after(tokens, done),
            tokens=state.tokens.at[:, state.step].set(tokens),
            lengths=state.lengths + ~done,
        )

    state = lax.while_loop(goes_on, step, state)
    return GenerateOutput(state.tokens, state.lengths)


def sample_tokens(logits: jax.Array, key: jax.Array, sampling: SamplingParams) -> jax.Array:
    """The next token of every row (batch,) of logits (batch, vocabulary).

    References:
        Holtzman et al., arXiv:1904.09751, section 3.1 (top-p).
    """
    if not sampling.temperature:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        chances = jax.nn.softmax(ordered, axis=-1)
        # A token stays while those before it have less than the share; the first one always does.
        kept = (jnp.cumsum(chances, axis=-1) - chances < sampling.top_p).sum(axis=-1, keepdims=True)
        least = jnp.take_along_axis(ordered, kept - 1, axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
