"""AdamW with a recipe's learning rate, and what some adapter families need around it."""

from __future__ import annotations

from typing import NamedTuple

import optax

from jlora.optim.budget import adalora_budget
from jlora.optim.labels import lora_optimizer
from jlora.optim.penalties import decay_mask
from jlora.optim.proximal import soft_threshold
from jlora.training.recipe.sections import Optimizer


class Optimizing(NamedTuple):
    """How gradients become steps.

    Attributes:
        transform: Of a mean loss's gradients, clipped or not.
        schedule: From the number of updates made to the learning rate.
        offloaded: Whether a step takes the state from the host's memory and leaves it there.
    """

    transform: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    offloaded: bool = False


def schedule(options: Optimizer, steps: int) -> optax.Schedule:
    """The learning rate at every one of so many steps."""
    warmup = int(options.warmup_share * steps)
    peak, last = options.learning_rate, options.learning_rate * options.final_share
    falling = max(steps - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, falling, options.final_share),
        "linear": optax.linear_schedule(peak, last, falling),
        "constant": optax.constant_schedule(peak),
    }[options.schedule]
    if not warmup:
        return after
    # The first step has a rate above zero.
    rising = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rising, after], [warmup])


def optimizing(options: Optimizer, steps: int, *, gates: bool = False) -> Optimizing:
    """The optimizer of a run of so many steps.

    Args:
        options: Of the recipe.
        steps: How many are made in all.
        gates: Whether the adapter has SoRA's, which are then pulled to zero.
    """
    rate = schedule(options, steps)
    adam = optax.adamw(
        rate,
        b1=options.beta1,
        b2=options.beta2,
        eps=options.epsilon,
        weight_decay=options.weight_decay,
        mask=decay_mask,
    )
    transform = lora_optimizer(adam, ratios=options.ratios or None)
    if gates:
        pull = soft_threshold(lambda step: rate(step) * options.sparsity)
        transform = optax.with_extra_args_support(optax.chain(transform, pull))
    if options.budget is not None:
        transform = adalora_budget(
            transform,
            target_rank=options.budget.target_rank,
            total_steps=steps,
            warmup_steps=int(options.budget.warmup_share * steps),
            final_steps=int(options.budget.final_share * steps),
            interval=options.budget.interval,
        )
    return Optimizing(transform, rate, options.offload)
