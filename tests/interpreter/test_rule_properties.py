"""Drawn programs on factored weights equal the same programs on materialized ones.

Each example is a batch of programs that one compilation runs: a weight of drawn axes with drawn
gains and terms, drawn movements of its entries, and a product with drawn dimension numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

from jlora.interpreter import _compat
from jlora.interpreter.eval_jaxpr import make_context
from jlora.interpreter.factored_array import FactoredArray

Draw = Callable[[st.SearchStrategy[Any]], Any]
Move = Callable[[Any], Any]


@dataclasses.dataclass
class Program:
    """A weight, movements of its entries, and a last product with an activation."""

    shape: tuple[int, ...]
    term_labels: list[list[tuple[int | str, ...]]]
    gain_labels: list[tuple[int, ...]]
    moves: list[tuple[str, Move]]
    product: tuple[tuple[int, ...], dict[str, Any]] | None  # Shape of the activation, numbers.
    seed: int

    def build(self) -> tuple[FactoredArray, Any]:
        rng = np.random.default_rng(self.seed)
        sizes = {**dict(enumerate(self.shape)), "r": 2, "s": 3}

        def array(labels: Any) -> Any:
            return jnp.asarray(rng.normal(size=[sizes[label] for label in labels]), jnp.float32)

        weight = FactoredArray.from_weight(array(range(len(self.shape))), "w", self.shape)
        for term in self.term_labels:
            weight = weight.add(*((array(labels), labels) for labels in term))
        for labels in self.gain_labels:
            weight = weight.multiply((array(labels), labels))
        x_shape = () if self.product is None else self.product[0]
        return weight, jnp.asarray(rng.normal(size=x_shape), jnp.float32)

    def run(self, w: Any, x: Any) -> Any:
        for _, move in self.moves:
            w = move(w)
        if self.product is None:
            return w
        _, options = self.product
        sides = (w, x) if options["weight_first"] else (x, w)
        return lax.dot_general(*sides, options["numbers"], precision=lax.Precision.HIGHEST)


# --- drawn movements ------------------------------------------------------------------------------


def draw_transpose(draw: Draw, shape: tuple[int, ...]) -> Move:
    order = draw(st.permutations(range(len(shape))))
    return lambda w: lax.transpose(w, order)


def draw_reshape(draw: Draw, shape: tuple[int, ...]) -> Move:
    place = draw(st.integers(0, len(shape) - 1))
    divisors = [n for n in range(1, shape[place] + 1) if shape[place] % n == 0]
    first = draw(st.sampled_from(divisors))
    split = (*shape[:place], first, shape[place] // first, *shape[place + 1 :])
    merged = (*shape[:place], int(np.prod(shape[place : place + 2])), *shape[place + 2 :])
    new = draw(st.sampled_from([split, merged]))
    return lambda w: lax.reshape(w, new)


def draw_slice(draw: Draw, shape: tuple[int, ...]) -> Move:
    starts = [draw(st.integers(0, min(1, n - 1))) for n in shape]
    strides = [draw(st.integers(1, 2)) for _ in shape]
    return lambda w: lax.slice(w, starts, shape, strides)


def draw_rev(draw: Draw, shape: tuple[int, ...]) -> Move:
    places = draw(st.lists(st.integers(0, len(shape) - 1), unique=True, min_size=1))
    return lambda w: lax.rev(w, places)


def draw_pad(draw: Draw, shape: tuple[int, ...]) -> Move:
    config = [(draw(st.integers(-1 if n > 2 else 0, 2)), draw(st.integers(0, 1)), 0) for n in shape]
    return lambda w: lax.pad(w, jnp.float32(0), config)


def draw_concatenate(draw: Draw, shape: tuple[int, ...]) -> Move:
    place = draw(st.integers(0, len(shape) - 1))
    return lambda w: lax.concatenate([w, 2 * w], place)


def draw_take(draw: Draw, shape: tuple[int, ...]) -> Move:
    place = draw(st.integers(0, len(shape) - 1))
    indices = jnp.asarray(draw(st.lists(st.integers(0, shape[place] - 1), min_size=1, max_size=4)))
    return lambda w: jnp.take(w, indices, axis=place, mode="clip")


def draw_dynamic_slice(draw: Draw, shape: tuple[int, ...]) -> Move:
    sizes = [draw(st.integers(max(1, n - 2), n)) for n in shape]
    starts = [draw(st.integers(0, n)) for n in shape]  # Some are clamped.
    return lambda w: lax.dynamic_slice(w, [jnp.int32(start) for start in starts], sizes)


def draw_broadcast(draw: Draw, shape: tuple[int, ...]) -> Move:
    place = draw(st.integers(0, len(shape)))
    new = (*shape[:place], draw(st.integers(1, 3)), *shape[place:])
    places = [axis for axis in range(len(new)) if axis != place]
    return lambda w: lax.broadcast_in_dim(w, new, places)


def draw_scale(draw: Draw, shape: tuple[int, ...]) -> Move:
    del shape
    factor = draw(st.sampled_from([-1.0, 0.5, 3.0]))
    return lambda w: w * factor


def draw_scan_row(draw: Draw, shape: tuple[int, ...]) -> Move:
    del draw, shape
    return lambda w: lax.scan(lambda carry, row: (carry, 2 * row), 0, w)[1]


def draw_jit(draw: Draw, shape: tuple[int, ...]) -> Move:
    del draw, shape
    return lambda w: jax.jit(lambda v: lax.optimization_barrier(v))(w)


MOVES = {
    "transpose": draw_transpose,
    "reshape": draw_reshape,
    "slice": draw_slice,
    "rev": draw_rev,
    "pad": draw_pad,
    "concatenate": draw_concatenate,
    "take": draw_take,
    "dynamic_slice": draw_dynamic_slice,
    "broadcast": draw_broadcast,
    "scale": draw_scale,
    "scan": draw_scan_row,
    "jit": draw_jit,
}


# --- drawn programs -------------------------------------------------------------------------------


@st.composite
def programs(draw: Draw) -> Program:
    shape = tuple(draw(st.permutations([2, 3, 4, 5, 6]))[: draw(st.integers(1, 4))])
    axes = list(range(len(shape)))

    def subset(of: list[Any], smallest: int = 0) -> list[Any]:
        return sorted(draw(st.sets(st.sampled_from(of), min_size=smallest)), key=of.index)

    terms = []
    for _ in range(draw(st.integers(0, 2))):
        first = subset(axes)
        # The operands may share axes of the weight (a Hadamard product), and have all together.
        second = sorted({*subset(axes), *(set(axes) - set(first))})
        inner = draw(st.sampled_from([[], ["r"], ["r", "s"]]))
        terms.append([(*first, *inner), (*inner, *second)])
    gains = [tuple(subset(axes, 1)) for _ in range(draw(st.integers(0, 1)))]
    moves: list[tuple[str, Move]] = []
    moved_shape = shape
    for name in draw(st.lists(st.sampled_from(list(MOVES)), max_size=4)):
        move = MOVES[name](draw, moved_shape)
        new_shape = jax.eval_shape(move, jax.ShapeDtypeStruct(moved_shape, jnp.float32)).shape
        if 0 < np.prod(new_shape) <= 2000 and len(new_shape) <= 5:
            moves.append((name, move))
            moved_shape = new_shape
    product = None
    if moved_shape and draw(st.integers(0, 4)):
        product = draw_product(draw, moved_shape)
    return Program(shape, terms, gains, moves, product, draw(st.integers(0, 2**16)))


def draw_product(draw: Draw, shape: tuple[int, ...]) -> Any:
    """A product that contracts some axes of the weight, and pairs off some others."""
    roles = [draw(st.sampled_from(["contract", "free", "batch"])) for _ in shape]
    contracting, batch = (
        [axis for axis, role in enumerate(roles) if role == wanted]
        for wanted in ("contract", "batch")
    )
    shared = draw(st.permutations([*contracting, *batch, "new"]))
    x_shape = tuple(7 if axis == "new" else shape[axis] for axis in shared)
    numbers = [
        (list(places), [shared.index(axis) for axis in places]) for places in (contracting, batch)
    ]
    weight_first = draw(st.booleans())
    if not weight_first:
        numbers = [(x, w) for w, x in numbers]
    return x_shape, {"numbers": tuple(numbers), "weight_first": weight_first}


def check(batch: list[Program], materialized: list[str]) -> None:
    inputs = [program.build() for program in batch]
    traced = [
        _compat.trace_program(program.run, jax.ShapeDtypeStruct(weight.shape, jnp.float32), x)
        for program, (weight, x) in zip(batch, inputs, strict=True)
    ]

    @jax.jit
    def evaluate(inputs: Any) -> list[tuple[Any, Any]]:
        results = []
        for program, trace, (weight, x) in zip(batch, traced, inputs, strict=True):
            context = make_context()
            (output,) = context.evaluate(trace, [weight, x])
            materialized.extend(context.materialized)
            dense = program.run(weight.materialize(), x)
            results.append((context.materialize(output), dense))
        return results

    for program, (ours, expected) in zip(batch, evaluate(inputs), strict=True):
        # Sums of at most a few hundred products in float32, relative to the largest of them.
        size = 1 + np.abs(expected).max(initial=0)
        np.testing.assert_allclose(ours / size, expected / size, atol=3e-5, err_msg=str(program))


def check_drawn_batches(num_batches: int) -> None:
    materialized: list[str] = []
    lengths: list[int] = []

    @settings(
        max_examples=num_batches,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.lists(programs(), min_size=8, max_size=8))
    def check_one(batch: list[Program]) -> None:
        check(batch, materialized)
        lengths.append(len(batch))

    check_one()
    # Most weights stay factored, so the property is about the rules.
    assert len(materialized) <= sum(lengths) / 2


def test_drawn_programs_equal_the_materialized() -> None:
    check_drawn_batches(2)


@pytest.mark.slow
def test_many_drawn_programs_equal_materialized() -> None:
    check_drawn_batches(40)
