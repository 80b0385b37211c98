"""Training objectives: language modeling, direct preference optimization, and classification.

An objective has an adapted function and a loss around it. Losses are sums over the batch of a
forward pass, so that those of several passes and devices add up to one mean.
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
from jlora.models.splash_attention import SPLASH_BLOCK_SIZE
from jlora.optim.multi_transform import combine
from jlora.optim.regularizers import orthogonal_regularizer
from jlora.training.recipe.sections import ClassificationSection, DPOSection, OptimizerSection
from jlora.training.train_step import LossFn, LossSums
from jlora.transform import LoraTransform, Rules, lora_transform


class Objective(NamedTuple):
    """An adapted function and its loss.

    Attributes:
        lora: LoRA transform of the model's part of the loss.
        example_inputs: Shapes of the inputs after the parameters.
        loss_fn: Loss function `(trainable, frozen, batch, key)`. `trainable` has "adapter", and
            "head" for a new head; `frozen` has "base", "adapter" with the frozen arrays, and
            "reference" with the adapter that makes the base the checkpoint.
        token_mask: Function from a batch to the mask of its tokens, false for padding, in the shape
            that they have in the model.
        init_head: Function from a key to a new head; None unless the objective adds one.
    """

    lora: LoraTransform
    example_inputs: tuple[Any, ...]
    loss_fn: LossFn
    token_mask: Callable[[Any], jax.Array]
    init_head: Callable[[jax.Array], PyTree] | None = None


def make_lm_objective(model: Any, rules: Rules, options: OptimizerSection) -> Objective:
    """Returns the objective of next-token cross entropy over the tokens of `batch.loss_mask`.

    Raises:
        ValueError: The model is not a decoder.
    """
    if not isinstance(model, Decoder):
        raise ValueError(
            f"data.train.0.format is for language modeling, which needs a decoder, got a model of "
            f"type {type(model).__name__}. Use a decoder, or data of the format classification."
        )
    lora = lora_transform(_make_token_losses_fn(model), rules)

    def loss(trainable: PyTree, frozen: PyTree, batch: Any, key: jax.Array | None) -> LossSums:
        adapter = combine(trainable["adapter"], frozen["adapter"])
        losses, aux_loss = lora.apply_with_aux_loss(
            frozen["base"],
            adapter,
            batch.tokens,
            batch.targets,
            batch.segment_ids,
            batch.positions,
            dropout_key=key,
            token_mask=_lm_token_mask(batch),
        )
        return _add_regularizers(
            LossSums((losses * batch.loss_mask).sum(), batch.loss_mask.sum(), {}),
            adapter,
            aux_loss,
            options,
        )

    # Kernels take no shorter text.
    length = SPLASH_BLOCK_SIZE if _has_attention_kernel(model) else 2
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return Objective(lora, (tokens,) * 4, loss, _lm_token_mask)


def _has_attention_kernel(model: Any) -> bool:
    return getattr(model, "attention_implementation", None) in ("splash", "tokamax")


def _lm_token_mask(batch: Any) -> jax.Array:
    """Returns the mask of a batch of texts or of pairs, (texts, length)."""
    return batch.segment_ids.reshape(-1, batch.segment_ids.shape[-1]) > 0


def make_dpo_objective(
    model: Any, rules: Rules, options: OptimizerSection, dpo_options: DPOSection
) -> Objective:
    """Returns the objective of direct preference optimization.

    The reference policy is the checkpoint: the base with `frozen["reference"]`, an adapter that is
    empty unless initial updates were subtracted from the base.

    Raises:
        ValueError: The model is not a decoder.

    References:
        Rafailov et al., arXiv:2305.18290, equation 7. Label smoothing is that of Mitchell, "A note
        on DPO with noisy preferences".
    """
    inner = make_lm_objective(model, rules, options)

    def loss(trainable: PyTree, frozen: PyTree, batch: Any, key: jax.Array | None) -> LossSums:
        adapter = combine(trainable["adapter"], frozen["adapter"])
        # (batch, 2, length) to (2 * batch, length): chosen and rejected texts alternate.
        texts = [x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.targets)]
        layout = [x.reshape(-1, x.shape[-1]) for x in (batch.segment_ids, batch.positions)]
        losses, aux_loss = inner.lora.apply_with_aux_loss(
            frozen["base"],
            adapter,
            *texts,
            *layout,
            dropout_key=key,
            token_mask=_lm_token_mask(batch),
        )
        # An empty adapter goes through the transform too, which dequantizes weights.
        reference = inner.lora.apply(frozen["base"], frozen["reference"], *texts, *layout)
        reference = jax.lax.stop_gradient(reference)
        loss_mask = batch.loss_mask.reshape(losses.shape)
        # Log-probability ratios of policy and reference, (batch, 2).
        ratios = ((reference - losses) * loss_mask).sum(axis=-1).reshape(-1, 2)
        is_pair = (batch.loss_mask.sum(axis=(1, 2)) > 0).astype(jnp.float32)  # (batch,)
        margin = dpo_options.beta * (ratios[:, 0] - ratios[:, 1])  # (batch,)
        eps = dpo_options.label_smoothing
        errors = -(1 - eps) * jax.nn.log_sigmoid(margin) - eps * jax.nn.log_sigmoid(-margin)
        extra = {"accuracy": ((margin > 0) * is_pair).sum(), "margin": (margin * is_pair).sum()}
        sums = LossSums((errors * is_pair).sum(), is_pair.sum(), extra)
        return _add_regularizers(sums, adapter, aux_loss, options)

    return inner._replace(loss_fn=loss)


def make_classification_objective(
    model: Any,
    rules: Rules,
    options: OptimizerSection,
    head_options: ClassificationSection,
    num_labels: int,
) -> Objective:
    """Returns the objective of cross entropy over the labels of a text.

    A model with its own head keeps it. Other models get a new linear head on pooled hidden states,
    which is trained together with the adapter.

    Raises:
        ValueError: The model's head has another number of labels.
    """
    head_labels = getattr(model.config, "num_labels", None)
    if head_labels is not None and head_labels != num_labels:
        raise ValueError(
            f"The model's head has {head_labels} labels, but the data has {num_labels}. Set "
            f"classification.labels to those of the head, or use a checkpoint without a head."
        )
    has_head, is_decoder = head_labels is not None, isinstance(model, Decoder)
    has_types = isinstance(model, Encoder) and model.config.type_vocab_size > 1

    def hidden(params: PyTree, *inputs: jax.Array) -> Any:
        return model.apply(params, *inputs, method="hidden_states")

    lora = lora_transform(model.apply if has_head else hidden, rules)
    pooling = head_options.pooling or ("last" if is_decoder else "mean")

    def loss(trainable: PyTree, frozen: PyTree, batch: Any, key: jax.Array | None) -> LossSums:
        adapter = combine(trainable["adapter"], frozen["adapter"])
        token_types = (batch.token_type_ids,) if has_types else ()
        inputs = (batch.tokens, batch.attention_mask, *token_types)
        out, aux_loss = lora.apply_with_aux_loss(
            frozen["base"], adapter, *inputs, dropout_key=key, token_mask=token_mask(batch)
        )
        logits = (
            out
            if has_head
            else classifier_head_logits(trainable["head"], out, batch.attention_mask, pooling)
        )
        targets = optax.smooth_labels(
            jax.nn.one_hot(batch.labels, num_labels), head_options.label_smoothing
        )
        errors = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
        correct = logits.argmax(axis=-1) == batch.labels
        sums = LossSums(
            (errors * batch.example_mask).sum(),
            batch.example_mask.sum(),
            {"accuracy": (correct * batch.example_mask).sum()},
        )
        return _add_regularizers(sums, adapter, aux_loss, options)

    def token_mask(batch: Any) -> jax.Array:
        return batch.attention_mask > 0

    def init_head(key: jax.Array) -> PyTree:
        del key  # A head of zeros gives all labels the same logit.
        width = model.config.hidden_size
        return {"kernel": jnp.zeros((width, num_labels)), "bias": jnp.zeros(num_labels)}

    length = SPLASH_BLOCK_SIZE if _has_attention_kernel(model) else 2
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    example_inputs = (tokens,) * (3 if has_types else 2)
    return Objective(lora, example_inputs, loss, token_mask, None if has_head else init_head)


def classifier_head_logits(
    head: PyTree, hidden_states: jax.Array, mask: jax.Array, pooling: str
) -> jax.Array:
    """Returns the logits (batch, labels) of a new head.

    Args:
        head: Kernel (hidden, labels) and bias (labels,).
        hidden_states: Hidden states (batch, length, hidden).
        mask: Attention mask (batch, length), 0 for padding.
        pooling: "mean", "first" or "last" of the tokens.
    """
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
    """Adds the regularization losses that LoRA-MoE and AdaLoRA need."""
    types = {type(leaf) for leaf in jax.tree.leaves(adapter, is_leaf=is_adapter_node)}
    regularizer: Any = 0.0
    if any(issubclass(leaf, LoRAMoELeaf) for leaf in types):
        regularizer = regularizer + options.aux_loss_coef * aux_loss
    if any(issubclass(leaf, AdaLoRALeaf) for leaf in types):
        regularizer = regularizer + options.orth_reg_weight * orthogonal_regularizer(adapter)
    if isinstance(regularizer, float):
        return sums
    # Times the number of targets, because the sums are divided by it.
    penalty = sums.num_targets * regularizer
    return sums._replace(
        loss=sums.loss + penalty, extra_sums={**sums.extra_sums, "penalty": penalty}
    )
