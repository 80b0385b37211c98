"""The training step, its optimizer (AdamW), and the learning rate schedule."""

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
from jlora.optim.multi_transform import lora_optimizer, weight_decay_mask
from jlora.optim.offload import offload
from jlora.optim.regularizers import soft_threshold
from jlora.training.recipe.sections import OptimizerSection


class LossSums(NamedTuple):
    """Sums of a loss function over a batch; each is a mean once divided by `num_targets`.

    Attributes:
        loss: Sum of losses, in nats.
        num_targets: Number of target tokens, pairs or texts.
        extra_sums: Further sums by name.
    """

    loss: jax.Array
    num_targets: jax.Array
    extra_sums: dict[str, jax.Array]


class LossFn(Protocol):
    """Function `(trainable, frozen, batch, key)` to the sums over one forward pass.

    The key is for dropout; None: no dropout.
    """

    def __call__(
        self, trainable: PyTree, frozen: PyTree, batch: PyTree, key: jax.Array | None
    ) -> LossSums: ...


class TrainState(NamedTuple):
    """Training state, which a step replaces.

    Attributes:
        trainable: Trainable arrays: "adapter", and "head" if the objective adds one.
        opt_state: State of the optimizer.
        step: Number of steps, skipped ones included.
        update_count: Number of steps that were not skipped.
        consecutive_skips: Number of skipped steps at the end of the run so far.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora.training import TrainState
        >>> step, update_count, consecutive_skips = jnp.array([10, 8, 2])
        >>> state = TrainState({"adapter": {}}, (), step, update_count, consecutive_skips)
        >>> int(state.step - state.update_count)  # Skipped steps.
        2
    """

    trainable: PyTree
    opt_state: PyTree
    step: jax.Array
    update_count: jax.Array
    consecutive_skips: jax.Array


class StepMetrics(NamedTuple):
    """Metrics of one training step.

    Attributes:
        loss: Mean loss over all targets.
        num_targets: Number of target tokens, pairs or texts.
        gradient_norm: Global norm of the gradient before clipping.
        learning_rate: Learning rate of the step.
        is_finite: Whether loss, gradient, and the arrays and optimizer state after the step are
            finite. If not, the step is skipped.
        consecutive_skips: Number of skipped steps in a row, this one included.
        extra_metrics: Further means by name.
    """

    loss: jax.Array
    num_targets: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array
    is_finite: jax.Array
    consecutive_skips: jax.Array
    extra_metrics: dict[str, jax.Array]


TrainStepFn = Callable[[TrainState, PyTree, PyTree, jax.Array], tuple[TrainState, StepMetrics]]


class ScheduledOptimizer(NamedTuple):
    """An optimizer and its learning rate schedule.

    Attributes:
        transform: Gradient transformation of Optax for the gradients of a mean loss.
        schedule: Function from the number of updates to the learning rate.
        offload_state: Whether the state is in host memory between steps.

    Example:
        >>> import optax
        >>> from jlora.training import ScheduledOptimizer
        >>> ScheduledOptimizer(optax.sgd(0.1), optax.constant_schedule(0.1)).offload_state
        False
    """

    transform: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    offload_state: bool = False


# --- the step -------------------------------------------------------------------------------------


def init_train_state(trainable: PyTree, scheduled_optimizer: ScheduledOptimizer) -> TrainState:
    """Returns the training state before the first step.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from jlora.training import init_train_state
        >>> from jlora.training import ScheduledOptimizer
        >>> optimizer = ScheduledOptimizer(optax.adam(1e-3), optax.constant_schedule(1e-3))
        >>> state = init_train_state({"adapter": {"w": jnp.ones((6, 2))}}, optimizer)
        >>> int(state.step), state.trainable["adapter"]["w"].shape
        (0, (6, 2))
    """
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return TrainState(trainable, scheduled_optimizer.transform.init(trainable), *zeros)


def make_train_step(
    loss_fn: LossFn, scheduled_optimizer: ScheduledOptimizer, max_grad_norm: float | None
) -> TrainStepFn:
    """Returns the function `(state, frozen, batch, key)` to the next state and the metrics.

    Jit it with the state donated. A step whose loss, gradient or result is NaN or infinite leaves
    the trainable arrays and the optimizer state unchanged.

    Args:
        loss_fn: Loss function of one forward pass.
        scheduled_optimizer: Optimizer and its schedule.
        max_grad_norm: Global norm to which larger gradients are scaled down; None: no clipping.
    """
    transform = _apply_only_if_finite(scheduled_optimizer.transform)
    if scheduled_optimizer.offload_state:
        transform = offload(transform)

    def step(
        state: TrainState, frozen: PyTree, batch: PyTree, key: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        sums, gradient = _accumulate_gradients(
            loss_fn, state.trainable, frozen, batch, jax.random.fold_in(key, state.step)
        )
        num_targets = jnp.maximum(sums.num_targets, 1)
        loss = sums.loss / num_targets
        gradient = jax.tree.map(lambda g: g / num_targets, gradient)
        norm = optax.tree.norm(gradient)
        # Before clipping, which would turn the entries beside an infinite one into zeros.
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        if max_grad_norm is not None:
            factor = jnp.minimum(1, max_grad_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
            gradient = jax.tree.map(lambda g: g * factor, gradient)
        updates, opt_state = transform.update(
            gradient, state.opt_state, state.trainable, finite=is_finite
        )
        updated = optax.apply_updates(state.trainable, updates)
        is_finite &= _is_tree_finite(updated)
        consecutive_skips = jnp.where(is_finite, 0, state.consecutive_skips + 1)
        metrics = StepMetrics(
            loss=loss,
            num_targets=sums.num_targets,
            gradient_norm=norm,
            learning_rate=jnp.asarray(scheduled_optimizer.schedule(state.update_count)),
            is_finite=is_finite,
            consecutive_skips=consecutive_skips,
            extra_metrics={name: value / num_targets for name, value in sums.extra_sums.items()},
        )
        new_state = TrainState(
            trainable=_select_tree(is_finite, updated, state.trainable),
            opt_state=opt_state,
            step=state.step + 1,
            update_count=state.update_count + is_finite.astype(jnp.int32),
            consecutive_skips=consecutive_skips,
        )
        return new_state, metrics

    return step


def _apply_only_if_finite(
    transform: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation with an argument `finite`; if false, its state is unchanged.

    The state is also unchanged, and all updates are NaN, where the new state or the updated
    parameters would not be finite.
    """

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> Any:
        updates, new_state = transform.update(updates, state, params)
        finite = extra["finite"] & _is_tree_finite(new_state)
        finite &= _is_tree_finite(optax.apply_updates(params, updates))
        updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.nan), updates)
        return updates, _select_tree(finite, new_state, state)

    return optax.GradientTransformationExtraArgs(transform.init, update)


def _is_tree_finite(tree: PyTree) -> jax.Array:
    """Returns whether all floats of a tree are finite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.array([jnp.isfinite(x).all() for x in floats]).all()


def _select_tree(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(functools.partial(jnp.where, condition), new, old)


def _accumulate_gradients(
    loss_fn: LossFn, trainable: PyTree, frozen: PyTree, batch: PyTree, key: jax.Array
) -> tuple[LossSums, PyTree]:
    """Returns the sums over all accumulation steps and the gradient of the summed loss.

    The arrays of the batch are (accumulation steps, batch, ...). The gradient is that of the sum of
    losses and not of their means: passes have different numbers of tokens, and a mean of means
    would give a larger weight to the tokens of a short pass.
    """

    def loss_and_sums(
        trainable: PyTree, microbatch: PyTree, key: jax.Array
    ) -> tuple[jax.Array, LossSums]:
        sums = loss_fn(trainable, frozen, microbatch, key)
        return sums.loss, sums

    grad_fn = jax.grad(loss_and_sums, has_aux=True)
    num_passes = jax.tree.leaves(batch)[0].shape[0]
    first = jax.tree.map(lambda array: array[0], batch)
    if num_passes == 1:
        gradient, sums = grad_fn(trainable, first, jax.random.fold_in(key, 0))
        return sums, gradient

    def add_pass(total: Any, numbered_microbatch: tuple[PyTree, jax.Array]) -> tuple[Any, None]:
        microbatch, number = numbered_microbatch
        result = grad_fn(trainable, microbatch, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, total, result), None

    shapes = jax.eval_shape(grad_fn, trainable, first, key)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    (gradient, sums), _ = lax.scan(add_pass, zeros, (batch, jnp.arange(num_passes)))
    return sums, gradient


def make_eval_step(loss_fn: LossFn) -> Callable[[PyTree, PyTree, PyTree], LossSums]:
    """Returns the function `(trainable, frozen, batch)` to the sums over a batch.

    There is no dropout, and penalties are subtracted from the loss.
    """

    def evaluate(trainable: PyTree, frozen: PyTree, batch: PyTree) -> LossSums:
        def evaluate_pass(_: None, microbatch: PyTree) -> tuple[None, LossSums]:
            sums = loss_fn(trainable, frozen, microbatch, None)
            extra = dict(sums.extra_sums)
            return None, LossSums(sums.loss - extra.pop("penalty", 0), sums.num_targets, extra)

        _, sums = lax.scan(evaluate_pass, None, batch)
        return jax.tree.map(lambda array: array.sum(axis=0), sums)

    return evaluate


# --- the optimizer --------------------------------------------------------------------------------


def make_lr_schedule(options: OptimizerSection, total_steps: int) -> optax.Schedule:
    """Returns the learning rate schedule of a run: linear warm-up, then the decay of the recipe.

    Args:
        options: Section `optimizer` of the recipe.
        total_steps: Steps of the run.
    """
    warmup = int(options.warmup_ratio * total_steps)
    peak, last = options.learning_rate, options.learning_rate * options.min_lr_ratio
    decay_steps = max(total_steps - warmup, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, options.min_lr_ratio),
        "linear": optax.linear_schedule(peak, last, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[options.schedule]
    if not warmup:
        return decay
    # The learning rate of the first step is above zero.
    increase = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([increase, decay], [warmup])


def make_optimizer(
    options: OptimizerSection, total_steps: int, *, has_gates: bool = False
) -> ScheduledOptimizer:
    """Returns the optimizer of a run.

    Args:
        options: Section `optimizer` of the recipe.
        total_steps: Steps of the run.
        has_gates: Whether the adapter has gates of SoRA, which get a soft threshold.
    """
    schedule = make_lr_schedule(options, total_steps)
    adamw = optax.adamw(
        schedule,
        b1=options.beta1,
        b2=options.beta2,
        eps=options.epsilon,
        weight_decay=options.weight_decay,
        mask=weight_decay_mask,
    )
    transform = lora_optimizer(adamw, lr_multipliers=options.lr_multipliers or None)
    if has_gates:
        threshold = soft_threshold(lambda step: schedule(step) * options.l1_gate)
        transform = optax.with_extra_args_support(optax.chain(transform, threshold))
    if options.budget is not None:
        transform = adalora_rank_allocator(
            transform,
            target_rank=options.budget.target_rank,
            total_steps=total_steps,
            warmup_steps=int(options.budget.warmup_ratio * total_steps),
            final_steps=int(options.budget.final_ratio * total_steps),
            interval=options.budget.interval,
        )
    return ScheduledOptimizer(transform, schedule, options.offload)
