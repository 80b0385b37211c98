"""Text generation: a prefill, then a compiled decoding loop with a cache of keys and values."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora._tree import is_quantized
from jlora._validation import is_nonnegative_float32
from jlora.models.decoder import Decoder, KVCache, init_cache

ModelApplyFn = Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Configuration of how the next token is sampled.

    Attributes:
        temperature: Divisor of the logits. 0: greedy decoding, without a draw.
        top_k: Number of the most likely tokens to draw from. None: all of them.
        top_p: Probability mass to draw from: the smallest set of most likely tokens that reaches
            it, above 0 and up to 1.
        eos_token_ids: Tokens that end a text; they are part of it.
        pad_token_id: Token that fills the output after the end of a text.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> from jlora import models
        >>> models.SamplingParams(temperature=0.7, top_p=0.9, eos_token_ids=(2,)).top_k is None
        True
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if not is_nonnegative_float32(self.temperature):
            raise ValueError(
                f"SamplingParams.temperature={self.temperature} must be a finite number of at "
                f"least 0, in the range of float32. Use 0 for greedy decoding."
            )
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(
                f"SamplingParams.top_k={self.top_k} must be a positive int, or None for all tokens."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"SamplingParams.top_p={self.top_p} must be above 0 and at most 1. Use 1 for all "
                f"tokens."
            )
        for name, tokens in (
            ("eos_token_ids", self.eos_token_ids),
            ("pad_token_id", (self.pad_token_id,)),
        ):
            if not all(isinstance(i, numbers.Integral) and 0 <= i < 2**31 for i in tokens):
                raise ValueError(
                    f"SamplingParams.{name}={getattr(self, name)!r} must be token ids: integers "
                    f"of at least 0."
                )


class GenerateOutput(NamedTuple):
    """Continuations of the prompts.

    Attributes:
        tokens: (batch, max_new_tokens) token ids; the pad token after the end of a text.
        lengths: (batch,), number of tokens in each text, the end-of-sequence token included.

    Example:
        The texts without padding:

        >>> import jax.numpy as jnp
        >>> from jlora import models
        >>> output = models.GenerateOutput(jnp.array([[5, 2, 0]]), jnp.array([2]))
        >>> [text[:n].tolist() for text, n in zip(output.tokens, output.lengths)]
        [[5, 2]]
    """

    tokens: jax.Array
    lengths: jax.Array


class _DecodeState(NamedTuple):
    """State of the decoding loop."""

    step: jax.Array
    cache: KVCache
    last_tokens: jax.Array  # (batch,)
    positions: jax.Array  # (batch,), of `last_tokens`
    done: jax.Array  # (batch,)
    tokens: jax.Array  # (batch, max_new_tokens)
    lengths: jax.Array  # (batch,)


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
    """Generates a continuation of every prompt.

    It compiles once for each shape of the prompts, `max_new_tokens` and `sampling`.

    Args:
        model: The decoder.
        params: First argument of `apply`.
        input_ids: (batch, length) token ids of the prompts.
        attention_mask: (batch, length), 0 for padding, on the left or on the right of every prompt,
            whose ids do not matter. None: no padding.
        max_new_tokens: Maximum number of tokens per continuation.
        sampling: How tokens are sampled; greedily by default.
        key: Random key of the draws, required at a temperature above 0.
        apply: Replacement for `model.apply`. For `lora.apply` with an adapter, use
            `lambda p, *args, **kwargs: lora.apply(p["base"], p["adapter"], *args, **kwargs)`, and
            pass the same function object to each call to avoid recompilation. None: `model.apply`.
        cache_dtype: dtype of the cached keys and values. None: that of the model, or else of most
            weights.

    Returns:
        The tokens after the prompts, and their number.

    Raises:
        ValueError: There is no prompt, a prompt has no token or one outside the model's
            vocabulary, the tokens do not fit into the model's context, or the key is missing.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jlora import models
        >>> from jlora.models import decoder_config
        >>> config = decoder_config(
        ...     dict(model_type="llama", vocab_size=32, hidden_size=8, intermediate_size=16,
        ...          num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16)
        ... )
        >>> model = models.Decoder(config)
        >>> prompts = jnp.array([[3, 5, 2], [0, 4, 9]])
        >>> mask = jnp.array([[1, 1, 1], [0, 1, 1]])
        >>> params = jax.jit(model.init)(jax.random.key(0), prompts)
        >>> output = models.generate(model, params, prompts, mask, max_new_tokens=4)
        >>> output.tokens.shape, output.lengths.tolist()
        ((2, 4), [4, 4])
    """
    ids = np.asarray(jax.device_get(input_ids))
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(
            f"input_ids must have shape (batch, length) with at least one token, got {ids.shape}. "
            f"Pass a single prompt as input_ids[None]."
        )
    if ids.dtype.kind not in "iu":
        raise ValueError(f"input_ids must be integers, got {ids.dtype}. Pass the token ids.")
    mask = (
        np.ones(ids.shape, bool)
        if attention_mask is None
        else np.asarray(jax.device_get(attention_mask)) != 0
    )
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {mask.shape}, input_ids {ids.shape}. Pass one entry per "
            f"token."
        )
    vocab_size = model.config.vocab_size
    invalid = mask & ((ids < 0) | (ids >= vocab_size))
    if invalid.any():
        row, column = np.argwhere(invalid)[0]
        raise ValueError(
            f"input_ids[{row}, {column}]={ids[row, column]} is outside the model's vocabulary of "
            f"{vocab_size} tokens. Use the tokenizer of this checkpoint without added tokens, or "
            f"a checkpoint whose embedding was resized for them."
        )
    empty = np.flatnonzero(~mask.any(axis=1)).tolist()
    if empty:
        raise ValueError(
            f"The prompts {empty} have no tokens. Begin each one with the beginning-of-sequence "
            f"token."
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if ids.shape[1] + max_new_tokens > model.config.max_seq_length:
        raise ValueError(
            f"Prompts of {ids.shape[1]} tokens and max_new_tokens={max_new_tokens} exceed "
            f"the model's max_seq_length={model.config.max_seq_length}. Shorten one of them."
        )
    if sampling.temperature and key is None:
        raise ValueError(
            f"SamplingParams.temperature={sampling.temperature} needs a random key. Pass "
            f"key=jax.random.key(0), or use temperature=0."
        )
    if cache_dtype is None:
        weights = jax.tree.leaves(params, is_leaf=is_quantized)
        dtypes = [leaf.dtype for leaf in weights if leaf.ndim > 1]
        cache_dtype = model.dtype or max(dtypes, key=dtypes.count)
    key = jax.random.key(0) if key is None else key
    hashable: Any = model  # A frozen dataclass, which hashes by its fields.
    apply = _cached_model_apply(hashable) if apply is None else apply
    run = _compile_generate(hashable, apply, max_new_tokens, sampling, jnp.dtype(cache_dtype))
    ids = np.where(mask, ids, 0)  # Padding may be any id.
    return run(params, ids.astype(np.int32), mask.astype(np.int32), key)


@functools.cache
def _cached_model_apply(model: Decoder) -> ModelApplyFn:
    """Returns `model.apply`, the same object for equal models."""
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
    # Padding moves to the left: a window then reaches back over text alone, and all texts end in
    # the same slot.
    order = jnp.argsort(attention_mask, axis=1, stable=True)
    input_ids, attention_mask = (
        jnp.take_along_axis(array, order, axis=1) for array in (input_ids, attention_mask)
    )
    positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
    cache = init_cache(model, batch, length + max_new_tokens, dtype)
    logits, cache = apply(params, input_ids, attention_mask, positions, cache)

    def next_tokens(logits: jax.Array, step: jax.Array, state: _DecodeState | None) -> Any:
        """Returns the next tokens, the pad token for texts that are done, and which are done."""
        tokens = sample_tokens(logits, jax.random.fold_in(key, step), sampling)
        if state is None:
            return tokens, jnp.zeros(batch, bool)
        return jnp.where(state.done, sampling.pad_token_id, tokens), state.done

    def is_done(tokens: jax.Array, done: jax.Array) -> jax.Array:
        eos = jnp.array(sampling.eos_token_ids, jnp.int32)
        return done | (tokens[:, None] == eos).any(axis=1)

    first, done = next_tokens(logits[:, -1], jnp.zeros((), jnp.int32), None)
    padding = jnp.full((batch, max_new_tokens), sampling.pad_token_id, jnp.int32)
    state = _DecodeState(
        step=jnp.ones((), jnp.int32),
        cache=cache,
        last_tokens=first,
        positions=positions[:, -1] + 1,
        done=is_done(first, done),
        tokens=padding.at[:, 0].set(first),
        lengths=jnp.ones(batch, jnp.int32),
    )

    def should_continue(state: _DecodeState) -> jax.Array:
        return (state.step < max_new_tokens) & ~state.done.all()

    def decode_step(state: _DecodeState) -> _DecodeState:
        logits, cache = apply(
            params,
            state.last_tokens[:, None],
            jnp.ones((batch, 1), jnp.int32),
            state.positions[:, None],
            state.cache,
        )
        tokens, done = next_tokens(logits[:, 0], state.step, state)
        return _DecodeState(
            step=state.step + 1,
            cache=cache,
            last_tokens=tokens,
            positions=state.positions + 1,
            done=is_done(tokens, done),
            tokens=state.tokens.at[:, state.step].set(tokens),
            lengths=state.lengths + ~done,
        )

    state = lax.while_loop(should_continue, decode_step, state)
    return GenerateOutput(state.tokens, state.lengths)


def sample_tokens(logits: jax.Array, key: jax.Array, sampling: SamplingParams) -> jax.Array:
    """Samples the next tokens (batch,) from logits (batch, vocabulary).

    References:
        Holtzman et al., arXiv:1904.09751, section 3.1 (top-p).
    """
    if not sampling.temperature:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        threshold = lax.top_k(logits, sampling.top_k)[0][:, -1:]  # (batch, 1)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        # A token is a candidate while those before it have less mass than top_p; the most likely
        # one always is.
        mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
        num_candidates = (mass_before < sampling.top_p).sum(axis=-1, keepdims=True)
        threshold = jnp.take_along_axis(descending, num_candidates - 1, axis=-1)  # (batch, 1)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
