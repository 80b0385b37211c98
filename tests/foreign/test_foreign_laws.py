"""The laws, on models of other packages."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from _support.cases import Case, errors, moved, total
from _support.hlo import weight_shaped_products
from _support.materialized import record_materialized
from foreign_models import FOREIGN, MODELS, foreign_case

import jlora
from jlora.adapters.base import get_adapter_leaves

pytestmark = FOREIGN


# Float32 sums of at most 72 products in another order, one behind the other in about ten layers:
# each rounds by 6e-8 of its largest term, and later layers amplify that.
OUTPUT = 1e-5
# Back through the same layers, and summed over all tokens.
GRADIENT = 5e-5


def close(values: Any, truth: Any, relative: float = OUTPUT) -> None:
    for error, size in errors(values, truth):
        assert error <= relative * (1 + size), (error, size)


@pytest.mark.parametrize("family", ["lora", "dora", "vera"])
@pytest.mark.parametrize("name", MODELS)
def test_laws_hold_on_foreign_models(name: str, family: str) -> None:
    """One test for a model and a family, because what they compile is shared."""
    one = foreign_case(name, family)
    explanation = one.lora.explain(one.params, *one.inputs)
    law_a_fresh_adapter_changes_nothing(one, base_output(name))
    law_apply_and_merge_agree_and_so_do_their_gradients(one)
    law_frozen_is_absent_from_the_compiled_gradient(one, explanation)
    law_explain_is_what_happens_and_nothing_is_dense(one, explanation)
    if family != "vera":
        law_every_weight_that_meets_data_is_adapted(one, explanation)
    law_a_second_call_does_not_recompile(one)


@functools.cache
def base_output(name: str) -> Any:
    made = MODELS[name]()
    return jax.jit(made.fn)(made.params, *made.inputs)


def law_a_fresh_adapter_changes_nothing(one: Case, base: Any) -> None:
    close(one.output_of(one.fresh), base)
    # Rounding alone is below 1e-4.
    assert all(error > 1e-2 for error, _ in errors(one.output, base)), "nothing was adapted"


def law_apply_and_merge_agree_and_so_do_their_gradients(one: Case) -> None:
    def merged(adapter: Any) -> Any:
        output = one.fn(jlora.merge(one.params, adapter), *one.inputs)
        return total(output), output

    gradient, output = jax.jit(jax.grad(merged, has_aux=True))(one.adapter)
    assert type(one.output) is type(output)
    close(one.output, output)
    truth = jlora.partition(gradient)[0]
    ours, frozen = jlora.partition(one.gradient)
    close(ours, truth, GRADIENT)
    close(frozen, jax.tree.map(jnp.zeros_like, frozen))
    # A weight that no gradient reached would agree with anything that is zero.
    assert all(size > 1e-3 for _, size in errors(truth, truth))


def adapted(explanation: jlora.Explanation) -> list[Any]:
    return [row for row in explanation.rows if row.adapter != "frozen"]


def law_frozen_is_absent_from_the_compiled_gradient(
    one: Case, explanation: jlora.Explanation
) -> None:
    # The weights, and one matrix of a stack.
    shapes = {row.shape for row in adapted(explanation)} | set(map(matrix, adapted(explanation)))
    found = weight_shaped_products(one.program.as_text(), shapes, with_slices=False)
    assert not found, found


def matrix(row: Any) -> tuple[int, ...]:
    return tuple(row.shape[axis] for axis in (*row.axes.inputs, *row.axes.outputs))


def law_explain_is_what_happens_and_nothing_is_dense(
    one: Case, explanation: jlora.Explanation
) -> None:
    rows = adapted(explanation)
    assert not [row for row in rows if row.dense_reasons or "full-size" in row.adapter]
    assert {row.path for row in rows} == set(get_adapter_leaves(one.adapter))
    assert not explanation.errors
    with record_materialized() as seen:
        jax.eval_shape(lambda: one.lora.apply(one.params, one.adapter, *one.inputs))
    assert not seen


def law_every_weight_that_meets_data_is_adapted(one: Case, explanation: jlora.Explanation) -> None:
    assert {row.path for row in explanation.rows if row.axes} == set(one.adapter)


def law_a_second_call_does_not_recompile(one: Case) -> None:
    other = one.lora.init(jax.random.key(5), one.params, *one.inputs)
    one.compiled(one.params, moved(other, 9), *one.inputs)
    one.compiled(jax.tree.map(jnp.copy, one.params), one.adapter, *one.inputs)
    assert one.compiled._cache_size() == 1


@pytest.mark.parametrize("name", ["gpt2", "vit", "qwen3_experts", "gemma3"])
def test_full_gradient_has_weight_shaped_products(name: str) -> None:
    """Without this, the law of absence would be vacuous."""
    one = foreign_case(name, "lora")
    full = jax.jit(jax.grad(lambda p: total(one.fn(p, *one.inputs))))
    text = full.lower(one.params).compile().as_text()
    for row in adapted(one.lora.explain(one.params, *one.inputs)):
        assert weight_shaped_products(text, {matrix(row)}, with_slices=False), row
