"""Matches rules to the weights of a model, from the model's uses of each weight."""

from __future__ import annotations

import re
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

# One leaf for each adapted weight by the weight's `/`-joined path, and the arrays that several
# weights share by their name.
Adapter = dict[str, Any]

# One config for all selected weights, or regular expressions to configs; None: frozen.
Rules = AdapterConfig | Mapping[str, AdapterConfig | None]

# The use that a config with these supported kinds needs, for the error when no weight has it.
_EXPECTED_USE = {
    frozenset({"bias"}): "is a bias",
    frozenset({"embedding"}): "is an embedding, whose rows are looked up",
}


class AdaptationPlan(NamedTuple):
    """The weights that rules adapt, and the errors of the rules.

    Attributes:
        adapted: Adapted weights with their configs, in the order of the tree.
        shared: By name of shared arrays, the config and the weights that share them.
        uses: Uses of every weight, by path.
        axes: Roles of every weight's axes, by path; None for a weight without products.
        errors: Errors in the order of the rules; empty when the rules are valid.
    """

    adapted: list[tuple[AdaptableWeight, AdapterConfig]]
    shared: dict[str, tuple[AdapterConfig, list[AdaptableWeight]]]
    uses: dict[str, list[usage.WeightUse]]
    axes: dict[str, usage.WeightAxes | None]
    errors: list[Exception]


def _collect_params_and_uses(
    traced: TracedCall,
) -> tuple[dict[str, Any], dict[str, list[usage.WeightUse]]]:
    """Returns the parameters that are arrays, by path, and the uses of each."""
    flat = traced.flat_params
    leaves = {flat.paths[leaf]: flat.leaves[leaf] for leaf in traced.param_index}
    shapes = {
        index: (flat.paths[leaf], tuple(flat.leaves[leaf].shape))
        for leaf, index in traced.param_index.items()
    }
    return leaves, usage.find_weight_uses(traced.program, shapes)


def match_rules(rules: Rules, traced: TracedCall) -> AdaptationPlan:
    """Returns which of a program's weights the rules adapt, with the errors of invalid rules."""
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
            first_config, weights = plan.shared.setdefault(config.share, (config, []))
            weights.append(weight)
            if first_config != config or config.share in leaves:
                other = "a weight of that path" if first_config == config else repr(first_config)
                plan.errors.append(
                    ValueError(
                        f"{config!r} shares arrays under the name {config.share!r}, which {other} "
                        f"has too. Set another name with share=..."
                    )
                )

    if not isinstance(rules, Mapping):
        refusals: list[str] = []
        tied = ""
        for path in leaves:
            weight = weight_at(path)
            if not rules.selects(weight):
                if weight.kind == "embedding" and weight.multiplies_activations:
                    tied = f", except embeddings such as {path!r}, which only a mapping adapts"
                continue
            refusal = _get_refusal(weight, rules)
            if refusal is None:
                adapt(weight, rules)
            else:
                refusals.append(f"{path!r} cannot be adapted: {refusal}.")
        if not plan.adapted:
            expected = _EXPECTED_USE.get(
                rules.supported_kinds, "feeds a matrix product or convolution"
            )
            none = f"None of the {len(leaves)} weights {expected}{tied}."
            reason = refusals[0] if refusals else none
            plan.errors.append(
                ValueError(
                    f"rules={rules!r} adapts nothing. {reason} lora.explain(params, ...) lists the "
                    f"uses of each weight; a mapping can name an embedding."
                )
            )
        return plan
    matches = _tree.match_patterns(rules, list(leaves))
    if matches.errors and "all-linear" in rules:
        plan.errors.append(
            ValueError(
                "The rule 'all-linear' is PEFT's word. Pass the config alone, without a mapping: "
                "it adapts every weight that feeds a product."
            )
        )
    plan.errors.extend(ValueError(error) for error in matches.errors)
    for path in leaves:
        pattern, config = matches.rule_by_path.get(path, ("", None))
        if config is None:
            continue
        weight = weight_at(path)
        refusal = _get_refusal(weight, config)
        if refusal is None:
            adapt(weight, config)
        else:
            error_type = ValueError if _is_float_weight(weight) else TypeError
            plan.errors.append(
                error_type(
                    f"The rule {pattern!r} matches {path!r}, which cannot be adapted by "
                    f"{type(config).__name__}: {refusal}. Narrow the pattern, or put "
                    f"{_suggest_pattern(path)!r}: None before it."
                )
            )
    if not plan.adapted and not plan.errors:
        plan.errors.append(
            ValueError(
                f"rules={dict(rules)} adapts nothing: no pattern has a config. Give one, such as "
                f"{{'kernel$': jlora.LoRA(rank=8, alpha=16)}}."
            )
        )
    return plan


def make_weight(path: str, value: Any, uses: Sequence[usage.WeightUse]) -> AdaptableWeight:
    """Returns a weight with the roles and kind that its uses imply."""
    classified = [use for use in uses if use.axis_roles is not None]
    primitives = tuple(dict.fromkeys(use.primitive for use in uses))
    return AdaptableWeight(
        path=path,
        value=value,
        axes=usage.infer_weight_axes(uses, len(value.shape)) or usage.WeightAxes((), (), ()),
        kind=_infer_weight_kind(classified, primitives),
        multiplies_activations=any(
            use.has_data_operand or use.is_right_operand for use in classified
        ),
        primitives=primitives,
        window=usage.infer_window_axes(uses),
        dense_reasons=tuple(dict.fromkeys(use.dense_reason for use in uses if use.dense_reason)),
        is_transposed=usage.is_transposed(classified),
    )


def trace_weights(
    fn: Callable[..., Any], params: PyTree, *inputs: Any
) -> dict[str, AdaptableWeight]:
    """Returns every array of `params` by path, with its uses in `fn(params, *inputs)`."""
    leaves, uses = _collect_params_and_uses(trace_call(fn, params, inputs, {}))
    return {path: make_weight(path, leaf, uses[path]) for path, leaf in leaves.items()}


def _infer_weight_kind(
    classified_uses: Sequence[usage.WeightUse], primitives: Sequence[str]
) -> WeightKind:
    """Returns the kind of a weight from its uses in products and look-ups, and all primitives."""
    if not classified_uses:
        return "bias" if primitives and set(primitives) <= {"add", "sub", "add_any"} else "other"
    if any(usage.is_embedding_lookup(use, classified_uses) for use in classified_uses):
        return "embedding"
    is_convolved = any(use.primitive == "conv_general_dilated" for use in classified_uses)
    return "convolution" if is_convolved else "linear"


def _is_float_weight(weight: AdaptableWeight) -> bool:
    return jnp.issubdtype(weight.value.dtype, jnp.floating)


def _get_refusal(weight: AdaptableWeight, config: AdapterConfig) -> str | None:
    if not _is_float_weight(weight):
        return f"its type is {weight.value.dtype}, which has no gradient"
    return config.unsupported_reason(weight)


def _suggest_pattern(path: str) -> str:
    """Returns the shortest pattern for leaves like this one: its last key."""
    key = path.rsplit("/", 1)[-1]
    return (key if re.fullmatch(r"[\w-]+", key) else re.escape(key)) + "$"


def abstract_adapter(plan: AdaptationPlan) -> Adapter:
    """Returns the shapes of the adapter that `init` would return."""

    def init(values: dict[str, Any]) -> Adapter:
        key = jax.random.key(0)
        traced = lambda weight: weight._replace(value=values[weight.path])  # noqa: E731
        adapter: Adapter = {w.path: config.init_leaf(key, traced(w)) for w, config in plan.adapted}
        for name, (config, weights) in plan.shared.items():
            adapter[name] = config.init_shared(key, [traced(weight) for weight in weights])
        return adapter

    values = {weight.path: weight.value for weight, _ in plan.adapted}
    return jax.eval_shape(init, values)
