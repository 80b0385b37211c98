"""AdamW with a recipe's learning rate, and what some adapter families need around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jlora._tree import PyTree
from jlora.optim.adalora import adalora_rank_allocator
from jlora.optim.multi_transform import lora_optimizer
from jlora.optim.offload import offload
from jlora.optim.regularizers import soft_threshold, weight_decay_mask
from jlora.training.recipe.sections import OptimizerSection


class LossSums(NamedTuple):
    """What a loss function measured on some rows; divided by `num_targets`, each is a mean.

    Attributes:
        loss: In nats.
        num_targets: How many tokens, pairs or texts count.
        extra_sums: Further sums by name.
    """

    loss: jax.Array
    num_targets: jax.Array
    extra_sums: dict[str, jax.Array]


class LossFn(Protocol):
    """`(trained, frozen, batch, key)` to sums over the rows of one forward pass."""

    def __call__(
        self, trainable: PyTree, frozen: PyTree, batch: PyTree, key: jax.Array | None
    ) -> LossSums: ...


class TrainState(NamedTuple):
    """What a step replaces.

    Attributes:
        trainable: `{"adapter": ...}`, and a `"head"` if the task adds one.
        opt_state: Its state.
        step: How many steps were made, skipped ones too.
        update_count: How many of them changed something.
        consecutive_skips: How many steps in a row, the last one included, were not finite.
    """

    trainable: PyTree
    opt_state: PyTree
    step: jax.Array
    update_count: jax.Array
    consecutive_skips: jax.Array


class StepMetrics(NamedTuple):
    """What one step measured.

    Attributes:
        loss: The mean over all that counts.
        num_targets: How many tokens, pairs or texts counted.
        gradient_norm: Before clipping.
        learning_rate: That was used.
        is_finite: Whether loss and gradient were. If not, the step changed nothing.
        consecutive_skips: How many steps in a row were not.
        extra_metrics: Further means.
    """

    loss: jax.Array
    num_targets: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array
    is_finite: jax.Array
    consecutive_skips: jax.Array
    extra_metrics: dict[str, jax.Array]


TrainStepFn = Callable[[TrainState, PyTree, PyTree, jax.Array], tuple[TrainState, StepMetrics]]


def init_train_state(trainable: PyTree, scheduled_optimizer: ScheduledOptimizer) -> TrainState:
    """The state before the first step."""
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return TrainState(trainable, scheduled_optimizer.transform.init(trainable), *zeros)


def make_train_step(
    loss_fn: LossFn, scheduled_optimizer: ScheduledOptimizer, max_grad_norm: float | None
) -> TrainStepFn:
    """The function `(state, frozen, batch, key)` to the next state and what was measured.

    Compile it with the state donated. A step whose loss or gradient is NaN or infinite leaves all
    but its counts as they were.

    Args:
        loss_fn: Of the rows of one forward pass.
        scheduled_optimizer: What makes steps of gradients.
        max_grad_norm: Gradients of a larger global norm are scaled down to it.
    """
    made_by = _apply_only_if_finite(scheduled_optimizer.transform)
    if scheduled_optimizer.offload_state:
        made_by = offload(made_by)

    def step(
        state: TrainState, frozen: PyTree, batch: PyTree, key: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        sums, gradient = _accumulate_gradients(
            loss_fn, state.trainable, frozen, batch, jax.random.fold_in(key, state.step)
        )
        weight = jnp.maximum(sums.num_targets, 1)
        mean = sums.loss / weight
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        norm = optax.tree.norm(gradient)
        # Looked at before clipping, which would make zeros of what is beside an infinite entry.
        finite = jnp.isfinite(mean) & jnp.isfinite(norm)
        if max_grad_norm is not None:
            factor = jnp.minimum(1, max_grad_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
            gradient = jax.tree.map(lambda g: g * factor, gradient)
        updates, optimizer = made_by.update(
            gradient, state.opt_state, state.trainable, finite=finite
        )
        moved = optax.apply_updates(state.trainable, updates)
        trained = _select_tree(finite, moved, state.trainable)
        skipped = jnp.where(finite, 0, state.consecutive_skips + 1)
        measured = StepMetrics(
            loss=mean,
            num_targets=sums.num_targets,
            gradient_norm=norm,
            learning_rate=jnp.asarray(scheduled_optimizer.schedule(state.update_count)),
            is_finite=finite,
            consecutive_skips=skipped,
            extra_metrics={name: value / weight for name, value in sums.extra_sums.items()},
        )
        made = state.update_count + finite.astype(jnp.int32)
        return TrainState(trained, optimizer, state.step + 1, made, skipped), measured

    return step


def _apply_only_if_finite(
    transform: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The same transformation, whose state stays as it was where it is told `finite=False`."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> Any:
        updates, new = transform.update(updates, state, params)
        return updates, _select_tree(extra["finite"], new, state)

    return optax.GradientTransformationExtraArgs(transform.init, update)


def _select_tree(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(functools.partial(jnp.where, condition), new, old)


def _accumulate_gradients(
    loss_fn: LossFn, trainable: PyTree, frozen: PyTree, batch: PyTree, key: jax.Array
) -> tuple[LossSums, PyTree]:
    """The sums over all passes of a batch, whose arrays have them as first axis, and the gradient.

    The gradient is that of the sum of losses: the passes may hold different numbers of tokens, and
    a mean of their means would give each token of a short one more say.
    """

    def one(trainable: PyTree, part: PyTree, key: jax.Array) -> tuple[jax.Array, LossSums]:
        sums = loss_fn(trainable, frozen, part, key)
        return sums.loss, sums

    gradient_of = jax.grad(one, has_aux=True)
    passes = jax.tree.leaves(batch)[0].shape[0]
    first = jax.tree.map(lambda array: array[0], batch)
    if passes == 1:
        gradient, sums = gradient_of(trainable, first, jax.random.fold_in(key, 0))
        return sums, gradient

    def add(carry: Any, given: tuple[PyTree, jax.Array]) -> tuple[Any, None]:
        part, number = given
        made = gradient_of(trainable, part, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, carry, made), None

    shapes = jax.eval_shape(gradient_of, trainable, first, key)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    (gradient, sums), _ = lax.scan(add, zeros, (batch, jnp.arange(passes)))
    return sums, gradient


def make_eval_step(loss_fn: LossFn) -> Callable[[PyTree, PyTree, PyTree], LossSums]:
    """The function `(trained, frozen, batch)` to the sums over a batch.

    Nothing is dropped, and penalties do not count.
    """

    def evaluate(trainable: PyTree, frozen: PyTree, batch: PyTree) -> LossSums:
        def one(_: None, part: PyTree) -> tuple[None, LossSums]:
            sums = loss_fn(trainable, frozen, part, None)
            others = dict(sums.extra_sums)
            return None, LossSums(sums.loss - others.pop("penalty", 0), sums.num_targets, others)

        _, sums = lax.scan(one, None, batch)
        return jax.tree.map(lambda array: array.sum(axis=0), sums)

    return evaluate


class ScheduledOptimizer(NamedTuple):
    """How gradients become steps.

    Attributes:
        transform: Of a mean loss's gradients, clipped or not.
        schedule: From the number of updates made to the learning rate.
        offload_state: Whether a step takes the state from the host's memory and leaves it there.
    """

    transform: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    offload_state: bool = False


def make_lr_schedule(options: OptimizerSection, total_steps: int) -> optax.Schedule:
    """The learning rate at every one of so many steps."""
    warmup = int(options.warmup_ratio * total_steps)
    peak, last = options.learning_rate, options.learning_rate * options.min_lr_ratio
    falling = max(total_steps - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, falling, options.min_lr_ratio),
        "linear": optax.linear_schedule(peak, last, falling),
        "constant": optax.constant_schedule(peak),
    }[options.schedule]
    if not warmup:
        return after
    # The first step has a rate above zero.
    rising = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(
    options: OptimizerSection, total_steps: int, *, has_gates: bool = False
) -> ScheduledOptimizer:
    """The optimizer of a run of so many steps.

    Args:
        options: Of the recipe.
        total_steps: How many are made in all.
        has_gates: Whether the adapter has SoRA's, which are then pulled to zero.
    """
    rate = make_lr_schedule(options, total_steps)
    adam = optax.adamw(
        rate,
        b1=options.beta1,
        b2=options.beta2,
        eps=options.epsilon,
        weight_decay=options.weight_decay,
        mask=weight_decay_mask,
    )
    transform = lora_optimizer(adam, lr_multipliers=options.lr_multipliers or None)
    if has_gates:
        pull = soft_threshold(lambda step: rate(step) * options.l1_gate)
        transform = optax.with_extra_args_support(optax.chain(transform, pull))
    if options.budget is not None:
        transform = adalora_rank_allocator(
            transform,
            target_rank=options.budget.target_rank,
            total_steps=total_steps,
            warmup_steps=int(options.budget.warmup_ratio * total_steps),
            final_steps=int(options.budget.final_ratio * total_steps),
            interval=options.budget.interval,
        )
    return ScheduledOptimizer(transform, rate, options.offload)
