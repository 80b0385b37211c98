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

from jlora._tree import PyTree
from jlora.adapters.adalora import AdaLoRALeaf
from jlora.adapters.base import is_adapter_node
from jlora.adapters.lora_moe import LoRAMoELeaf
from jlora.models.decoder import Decoder
from jlora.models.encoder import Encoder, mean_pool
from jlora.optim.multi_transform import combine
from jlora.optim.regularizers import orthogonal_regularizer
from jlora.training.recipe.sections import ClassificationSection, DPOSection, OptimizerSection
from jlora.training.train_step import LossFn, LossSums
from jlora.transform import LoraTransform, Rules, lora_transform


class Objective(NamedTuple):
    """A function that is adapted and what it is trained for.

    Attributes:
        lora: The transform of the model's part in the loss.
        example_inputs: Shapes of what it takes after the parameters.
        loss_fn: Sums of the loss; `trained` is `{"adapter"}` and perhaps a `"head"`, `frozen` is
            `{"base", "adapter"}`, the latter with the adapter's frozen arrays.
        init_head: From a key to a new head, for models that come without one.
    """

    lora: LoraTransform
    example_inputs: tuple[Any, ...]
    loss_fn: LossFn
    init_head: Callable[[jax.Array], PyTree] | None = None


def make_lm_objective(model: Any, rules: Rules, options: OptimizerSection) -> Objective:
    """The next token's cross entropy, over the tokens that `batch.loss_mask` counts."""
    if not isinstance(model, Decoder):
        raise ValueError(
            f"data.train.0.format asks for text, which a {type(model).__name__} does not write. "
            f"Give a decoder, or data of the format classification."
        )
    lora = lora_transform(_make_token_losses_fn(model), rules)

    def loss(trainable: PyTree, frozen: PyTree, batch: Any, key: jax.Array | None) -> LossSums:
        adapter = combine(trainable["adapter"], frozen["adapter"])
        losses, balance = lora.apply_with_aux_loss(
            frozen["base"],
            adapter,
            batch.tokens,
            batch.targets,
            batch.segment_ids,
            batch.positions,
            dropout_key=key,
        )
        return _add_regularizers(
            LossSums((losses * batch.loss_mask).sum(), batch.loss_mask.sum(), {}),
            adapter,
            balance,
            options,
        )

    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return Objective(lora, (tokens,) * 4, loss)


def make_dpo_objective(
    model: Any, rules: Rules, options: OptimizerSection, dpo_options: DPOSection
) -> Objective:
    """Direct preference optimisation; the reference is the base, without the adapter.

    References:
        Rafailov et al., arXiv:2305.18290, equation 7. Label smoothing is that of Mitchell, "A note
        on DPO with noisy preferences".
    """
    inner = make_lm_objective(model, rules, options)

    def loss(trainable: PyTree, frozen: PyTree, batch: Any, key: jax.Array | None) -> LossSums:
        adapter = combine(trainable["adapter"], frozen["adapter"])
        # (rows, 2, length) as twice as many rows: the chosen one and the rejected one of each.
        texts = [x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.targets)]
        places = [x.reshape(-1, x.shape[-1]) for x in (batch.segment_ids, batch.positions)]
        losses, balance = inner.lora.apply_with_aux_loss(
            frozen["base"], adapter, *texts, *places, dropout_key=key
        )
        # Without an adapter; through the transform all the same, which knows quantised weights.
        reference = jax.lax.stop_gradient(inner.lora.apply(frozen["base"], {}, *texts, *places))
        learned = batch.loss_mask.reshape(losses.shape)
        # Log-probabilities under the policy over those under the reference, (rows, 2).
        ratios = ((reference - losses) * learned).sum(axis=-1).reshape(-1, 2)
        real = (batch.loss_mask.sum(axis=(1, 2)) > 0).astype(jnp.float32)
        margin = dpo_options.beta * (ratios[:, 0] - ratios[:, 1])
        wrong = dpo_options.label_smoothing
        errors = -(1 - wrong) * jax.nn.log_sigmoid(margin) - wrong * jax.nn.log_sigmoid(-margin)
        others = {"accuracy": ((margin > 0) * real).sum(), "margin": (margin * real).sum()}
        sums = LossSums((errors * real).sum(), real.sum(), others)
        return _add_regularizers(sums, adapter, balance, options)

    return inner._replace(loss_fn=loss)


def make_classification_objective(
    model: Any,
    rules: Rules,
    options: OptimizerSection,
    head_options: ClassificationSection,
    num_labels: int,
) -> Objective:
    """The cross entropy of a text's label.

    A model that comes with a head for as many labels keeps it; others get a new linear one on
    pooled hidden states, which is trained beside the adapter.
    """
    own = getattr(model.config, "num_labels", None)
    if own is not None and own != num_labels:
        raise ValueError(
            f"The model's head chooses between {own} labels, and the data has {num_labels}. Give "
            f"classification.labels as the head has them, or a checkpoint without a head."
        )
    decoder = isinstance(model, Decoder)
    typed = isinstance(model, Encoder) and model.config.type_vocab_size > 1

    def hidden(params: PyTree, *inputs: jax.Array) -> Any:
        return model.apply(params, *inputs, method="hidden_states")

    lora = lora_transform(hidden if own is None else model.apply, rules)
    pooling = head_options.pooling or ("last" if decoder else "mean")

    def loss(trainable: PyTree, frozen: PyTree, batch: Any, key: jax.Array | None) -> LossSums:
        adapter = combine(trainable["adapter"], frozen["adapter"])
        inputs = (batch.tokens, batch.attention_mask, *((batch.token_type_ids,) if typed else ()))
        out, balance = lora.apply_with_aux_loss(frozen["base"], adapter, *inputs, dropout_key=key)
        scores = (
            out
            if own is not None
            else classifier_head_logits(trainable["head"], out, batch.attention_mask, pooling)
        )
        targets = optax.smooth_labels(
            jax.nn.one_hot(batch.labels, num_labels), head_options.label_smoothing
        )
        errors = optax.softmax_cross_entropy(scores.astype(jnp.float32), targets)
        correct = scores.argmax(axis=-1) == batch.labels
        sums = LossSums(
            (errors * batch.example_mask).sum(),
            batch.example_mask.sum(),
            {"accuracy": (correct * batch.example_mask).sum()},
        )
        return _add_regularizers(sums, adapter, balance, options)

    def head(key: jax.Array) -> PyTree:
        del key  # It starts at equal scores for all labels.
        width = model.config.hidden_size
        return {"kernel": jnp.zeros((width, num_labels)), "bias": jnp.zeros(num_labels)}

    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return Objective(lora, (tokens,) * (3 if typed else 2), loss, head if own is None else None)


def classifier_head_logits(
    head: PyTree, hidden_states: jax.Array, mask: jax.Array, pooling: str
) -> jax.Array:
    """The scores (rows, labels) that a new head gives hidden states (rows, length, width)."""
    if pooling == "mean":
        pooled = mean_pool(hidden_states, mask)
    elif pooling == "first":
        pooled = hidden_states[:, 0]
    else:
        last = jnp.maximum(mask.astype(jnp.int32).sum(axis=1) - 1, 0)
        pooled = jnp.take_along_axis(hidden_states, last[:, None, None], axis=1)[:, 0]
    return pooled.astype(jnp.float32) @ head["kernel"] + head["bias"]


def _make_token_losses_fn(model: Decoder) -> Callable[..., jax.Array]:
    def losses(params: PyTree, *inputs: jax.Array) -> jax.Array:
        return model.apply(params, *inputs, method="losses")  # type: ignore[return-value]

    return losses


def _add_regularizers(
    sums: LossSums, adapter: PyTree, aux_loss: jax.Array, options: OptimizerSection
) -> LossSums:
    """With what keeps some families in shape; nothing for all others."""
    kinds = {type(leaf) for leaf in jax.tree.leaves(adapter, is_leaf=is_adapter_node)}
    extra: Any = 0.0
    if any(issubclass(kind, LoRAMoELeaf) for kind in kinds):
        extra = extra + options.aux_loss_coef * aux_loss
    if any(issubclass(kind, AdaLoRALeaf) for kind in kinds):
        extra = extra + options.orth_reg_weight * orthogonal_regularizer(adapter)
    if isinstance(extra, float):
        return sums
    # It counts once, however many tokens there are.
    penalty = sums.num_targets * extra
    return sums._replace(
        loss=sums.loss + penalty, extra_sums={**sums.extra_sums, "penalty": penalty}
    )
