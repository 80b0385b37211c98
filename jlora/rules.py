"""Which weights rules adapt, from how a model uses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora import _tree
from jlora._tree import PyTree
from jlora.adapters.base import AdapterConfig
from jlora.interpreter import usage
from jlora.interpreter.eval_jaxpr import TracedCall, trace_call
from jlora.interpreter.weight import AdaptableWeight, WeightKind

Adapter = dict[str, Any]

"""One leaf for each adapted weight, keyed by the weight's `/`-joined path; and what several weights
share, under its name."""

Rules = AdapterConfig | Mapping[str, AdapterConfig | None]


class AdaptationPlan(NamedTuple):
    """Which weights a rule adapts, and what is wrong with the rules."""

    adapted: list[tuple[AdaptableWeight, AdapterConfig]]
    shared: dict[str, tuple[AdapterConfig, list[AdaptableWeight]]]
    uses: dict[str, list[usage.WeightUse]]
    axes: dict[str, usage.WeightAxes | None]
    errors: list[Exception]


def _collect_params_and_uses(
    traced: TracedCall,
) -> tuple[dict[str, Any], dict[str, list[usage.WeightUse]]]:
    """The parameters that are arrays, by path, and what uses each."""
    flat = traced.flat_params
    leaves = {flat.paths[place]: flat.leaves[place] for place in traced.param_index}
    shapes = {
        index: (flat.paths[place], tuple(flat.leaves[place].shape))
        for place, index in traced.param_index.items()
    }
    return leaves, usage.find_weight_uses(traced.program, shapes)


def match_rules(rules: Rules, traced: TracedCall) -> AdaptationPlan:
    """Which of a program's weights the rules adapt; what cannot be is among the plan's problems."""
    leaves, uses = _collect_params_and_uses(traced)
    axes = {
        path: usage.infer_weight_axes(uses[path], len(leaf.shape)) for path, leaf in leaves.items()
    }
    plan = AdaptationPlan([], {}, uses, axes, [])

    def weight_at(path: str) -> AdaptableWeight:
        return make_weight(path, leaves[path], uses[path])

    def adapt(weight: AdaptableWeight, config: AdapterConfig) -> None:
        plan.adapted.append((weight, config))
        if config.share is not None:
            sharing, weights = plan.shared.setdefault(config.share, (config, []))
            weights.append(weight)
            if sharing != config or config.share in leaves:
                other = "a weight of that path" if sharing == config else repr(sharing)
                plan.errors.append(
                    ValueError(
                        f"{config!r} shares arrays under the name {config.share!r}, which {other} "
                        f"has too. Give it another name with share=..."
                    )
                )

    if not isinstance(rules, Mapping):
        refused: list[str] = []
        for path in leaves:
            weight = weight_at(path)
            if not rules.selects(weight):
                continue
            refusal = _get_refusal(weight, rules)
            if refusal is None:
                adapt(weight, rules)
            else:
                refused.append(f"{path!r} cannot be: {refusal}.")
        if not plan.adapted:
            wanted = _EXPECTED_USE.get(
                rules.supported_kinds, "feeds a matrix product or convolution"
            )
            why = refused[0] if refused else f"None of the {len(leaves)} weights {wanted}."
            plan.errors.append(
                ValueError(
                    f"rules={rules!r} adapts nothing. {why} lora.explain(params, ...) lists how "
                    f"each weight is used; a mapping can name an embedding."
                )
            )
        return plan
    assigned = _tree.match_patterns(rules, list(leaves))
    plan.errors.extend(ValueError(problem) for problem in assigned.errors)
    for path in leaves:
        pattern, config = assigned.rule_by_path.get(path, ("", None))
        if config is None:
            continue
        weight = weight_at(path)
        refusal = _get_refusal(weight, config)
        if refusal is None:
            adapt(weight, config)
        else:
            kind = TypeError if not _is_float_weight(weight) else ValueError
            plan.errors.append(
                kind(
                    f"The rule {pattern!r} matches {path!r}, which cannot be adapted by "
                    f"{type(config).__name__}: {refusal}. Narrow the pattern, or put "
                    f"{_suggest_pattern(path)!r}: None before it."
                )
            )
    return plan


def make_weight(path: str, value: Any, uses: Sequence[usage.WeightUse]) -> AdaptableWeight:
    """A weight, as what uses it tells."""
    known = [use for use in uses if use.axis_roles is not None]
    by = tuple(dict.fromkeys(use.primitive for use in uses))
    return AdaptableWeight(
        path=path,
        value=value,
        axes=usage.infer_weight_axes(uses, len(value.shape)) or usage.WeightAxes((), (), ()),
        kind=_infer_weight_kind(known, by),
        multiplies_activations=any(use.has_data_operand for use in known),
        primitives=by,
        window=usage.infer_window_axes(uses),
        dense_reasons=tuple(dict.fromkeys(use.dense_reason for use in uses if use.dense_reason)),
    )


def trace_weights(
    fn: Callable[..., Any], params: PyTree, *inputs: Any
) -> dict[str, AdaptableWeight]:
    """Every array of `params` by its path, with how `fn(params, *inputs)` uses it."""
    leaves, uses = _collect_params_and_uses(trace_call(fn, params, inputs, {}))
    return {path: make_weight(path, leaf, uses[path]) for path, leaf in leaves.items()}


_EXPECTED_USE = {frozenset({"bias"}): "is a bias"}


def _infer_weight_kind(
    classified_uses: Sequence[usage.WeightUse], primitives: Sequence[str]
) -> WeightKind:
    """What a weight is, by its uses in products and look-ups and by the names of all its uses."""
    if not classified_uses:
        return "bias" if primitives and set(primitives) <= {"add", "sub", "add_any"} else "other"
    if any(
        use.primitive == "gather" and usage.is_embedding_lookup(use, classified_uses)
        for use in classified_uses
    ):
        return "embedding"
    convolved = any(use.primitive == "conv_general_dilated" for use in classified_uses)
    return "convolution" if convolved else "linear"


def _is_float_weight(weight: AdaptableWeight) -> bool:
    return jnp.issubdtype(weight.value.dtype, jnp.floating)


def _get_refusal(weight: AdaptableWeight, config: AdapterConfig) -> str | None:
    if not _is_float_weight(weight):
        return f"its type is {weight.value.dtype}, which has no gradient"
    return config.unsupported_reason(weight)


def _suggest_pattern(path: str) -> str:
    """The shortest pattern that names leaves like this one: its last key."""
    return path.rsplit("/", 1)[-1] + "$"


def abstract_adapter(plan: AdaptationPlan) -> Adapter:
    """The adapter that init would make, as shapes."""

    def make(values: dict[str, Any]) -> Adapter:
        key = jax.random.key(0)
        placed = lambda weight: weight._replace(value=values[weight.path])  # noqa: E731
        made: Adapter = {w.path: config.init_leaf(key, placed(w)) for w, config in plan.adapted}
        for name, (config, weights) in plan.shared.items():
            made[name] = config.init_shared(key, [placed(weight) for weight in weights])
        return made

    values = {weight.path: weight.value for weight, _ in plan.adapted}
    return jax.eval_shape(make, values)
