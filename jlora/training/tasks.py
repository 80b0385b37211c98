"""What a run learns: the next token, which of two answers is preferred, or a text's label.

Each task is a function that is adapted and a loss around it. The losses are sums over the rows of a
forward pass, so that several passes, and several devices, add up to one mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora.adapters.adalora import AdaLoRALeaf
from jlora.adapters.mixture import LoRAMixtureLeaf
from jlora.adapters.protocol import is_leaf
from jlora.models.decoder import Decoder
from jlora.models.encoder import Encoder, mean_pool
from jlora.optim.labels import combine
from jlora.optim.penalties import orthogonality
from jlora.training.recipe.sections import Classification, Optimizer, Preference
from jlora.training.step import LossFn, Sums
from jlora.transform import LoraTransform, Rules, lora_transform

PyTree = Any


class Task(NamedTuple):
    """A function that is adapted and what it is trained for.

    Attributes:
        lora: The transform of the model's part in the loss.
        inputs: Shapes of what it takes after the parameters.
        loss: Sums of the loss; `trained` is `{"adapter"}` and perhaps a `"head"`, `frozen` is
            `{"base", "adapter"}`, the latter with the adapter's frozen arrays.
        head: From a key to a new head, for models that come without one.
    """

    lora: LoraTransform
    inputs: tuple[Any, ...]
    loss: LossFn
    head: Callable[[jax.Array], PyTree] | None = None


def language(model: Any, rules: Rules, options: Optimizer) -> Task:
    """The next token's cross entropy, over the tokens that `batch.learn` counts."""
    if not isinstance(model, Decoder):
        raise ValueError(
            f"data.train.0.format asks for text, which a {type(model).__name__} does not write. "
            f"Give a decoder, or data of the format classification."
        )
    lora = lora_transform(_losses(model), rules)

    def loss(trained: PyTree, frozen: PyTree, batch: Any, key: jax.Array | None) -> Sums:
        adapter = combine(trained["adapter"], frozen["adapter"])
        losses, balance = lora.apply_with_balance(
            frozen["base"],
            adapter,
            batch.tokens,
            batch.targets,
            batch.segments,
            batch.positions,
            dropout_key=key,
        )
        return _penalised(
            Sums((losses * batch.learn).sum(), batch.learn.sum(), {}), adapter, balance, options
        )

    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return Task(lora, (tokens,) * 4, loss)


def preference(model: Any, rules: Rules, options: Optimizer, asked: Preference) -> Task:
    """Direct preference optimisation; the reference is the base, without the adapter.

    References:
        Rafailov et al., arXiv:2305.18290, equation 7. Label smoothing is that of Mitchell, "A note
        on DPO with noisy preferences".
    """
    inner = language(model, rules, options)

    def loss(trained: PyTree, frozen: PyTree, batch: Any, key: jax.Array | None) -> Sums:
        adapter = combine(trained["adapter"], frozen["adapter"])
        # (rows, 2, length) as twice as many rows: the chosen one and the rejected one of each.
        texts = [x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.targets)]
        places = [x.reshape(-1, x.shape[-1]) for x in (batch.segments, batch.positions)]
        losses, balance = inner.lora.apply_with_balance(
            frozen["base"], adapter, *texts, *places, dropout_key=key
        )
        # Without an adapter; through the transform all the same, which knows quantised weights.
        reference = jax.lax.stop_gradient(inner.lora.apply(frozen["base"], {}, *texts, *places))
        learned = batch.learn.reshape(losses.shape)
        # Log-probabilities under the policy over those under the reference, (rows, 2).
        ratios = ((reference - losses) * learned).sum(axis=-1).reshape(-1, 2)
        real = (batch.learn.sum(axis=(1, 2)) > 0).astype(jnp.float32)
        margin = asked.beta * (ratios[:, 0] - ratios[:, 1])
        wrong = asked.label_smoothing
        errors = -(1 - wrong) * jax.nn.log_sigmoid(margin) - wrong * jax.nn.log_sigmoid(-margin)
        others = {"accuracy": ((margin > 0) * real).sum(), "margin": (margin * real).sum()}
        sums = Sums((errors * real).sum(), real.sum(), others)
        return _penalised(sums, adapter, balance, options)

    return inner._replace(loss=loss)


def classification(
    model: Any, rules: Rules, options: Optimizer, asked: Classification, labels: int
) -> Task:
    """The cross entropy of a text's label.

    A model that comes with a head for as many labels keeps it; others get a new linear one on
    pooled hidden states, which is trained beside the adapter.
    """
    own = getattr(model.config, "labels", None)
    if own is not None and own != labels:
        raise ValueError(
            f"The model's head chooses between {own} labels, and the data has {labels}. Give "
            f"classification.labels as the head has them, or a checkpoint without a head."
        )
    decoder = isinstance(model, Decoder)
    typed = isinstance(model, Encoder) and model.config.types > 1

    def hidden(params: PyTree, *inputs: jax.Array) -> Any:
        return model.apply(params, *inputs, method="hidden")

    lora = lora_transform(hidden if own is None else model.apply, rules)
    pooling = asked.pooling or ("last" if decoder else "mean")

    def loss(trained: PyTree, frozen: PyTree, batch: Any, key: jax.Array | None) -> Sums:
        adapter = combine(trained["adapter"], frozen["adapter"])
        inputs = (batch.tokens, batch.mask, *((batch.types,) if typed else ()))
        out, balance = lora.apply_with_balance(frozen["base"], adapter, *inputs, dropout_key=key)
        scores = out if own is not None else scored(trained["head"], out, batch.mask, pooling)
        targets = optax.smooth_labels(jax.nn.one_hot(batch.labels, labels), asked.label_smoothing)
        errors = optax.softmax_cross_entropy(scores.astype(jnp.float32), targets)
        correct = scores.argmax(axis=-1) == batch.labels
        sums = Sums(
            (errors * batch.real).sum(),
            batch.real.sum(),
            {"accuracy": (correct * batch.real).sum()},
        )
        return _penalised(sums, adapter, balance, options)

    def head(key: jax.Array) -> PyTree:
        del key  # It starts at equal scores for all labels.
        width = model.config.hidden_size
        return {"kernel": jnp.zeros((width, labels)), "bias": jnp.zeros(labels)}

    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return Task(lora, (tokens,) * (3 if typed else 2), loss, head if own is None else None)


def scored(head: PyTree, hidden: jax.Array, mask: jax.Array, pooling: str) -> jax.Array:
    """The scores (rows, labels) that a new head gives hidden states (rows, length, width)."""
    if pooling == "mean":
        pooled = mean_pool(hidden, mask)
    elif pooling == "first":
        pooled = hidden[:, 0]
    else:
        last = jnp.maximum(mask.astype(jnp.int32).sum(axis=1) - 1, 0)
        pooled = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return pooled.astype(jnp.float32) @ head["kernel"] + head["bias"]


def _losses(model: Decoder) -> Callable[..., jax.Array]:
    def losses(params: PyTree, *inputs: jax.Array) -> jax.Array:
        return model.apply(params, *inputs, method="losses")  # type: ignore[return-value]

    return losses


def _penalised(sums: Sums, adapter: PyTree, balance: jax.Array, options: Optimizer) -> Sums:
    """With what keeps some families in shape; nothing for all others."""
    kinds = {type(leaf) for leaf in jax.tree.leaves(adapter, is_leaf=is_leaf)}
    extra: Any = 0.0
    if any(issubclass(kind, LoRAMixtureLeaf) for kind in kinds):
        extra = extra + options.balance * balance
    if any(issubclass(kind, AdaLoRALeaf) for kind in kinds):
        extra = extra + options.orthogonality * orthogonality(adapter)
    if isinstance(extra, float):
        return sums
    # It counts once, however many tokens there are.
    penalty = sums.weight * extra
    return sums._replace(loss=sums.loss + penalty, others={**sums.others, "penalty": penalty})
