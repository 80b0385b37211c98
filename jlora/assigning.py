"""Which weights rules adapt, from how a model uses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.adapters.protocol import AdapterConfig, Kind, Weight
from jlora.factored import probe
from jlora.tracing import Traced, trace

PyTree = Any
Adapter = dict[str, Any]
"""One leaf for each adapted weight, keyed by the weight's `/`-joined path; and what several weights
share, under its name."""

Rules = AdapterConfig | Mapping[str, AdapterConfig | None]


class Plan(NamedTuple):
    """Which weights a rule adapts, and what is wrong with the rules."""

    adapted: list[tuple[Weight, AdapterConfig]]
    shared: dict[str, tuple[AdapterConfig, list[Weight]]]
    uses: dict[str, list[probe.Use]]
    axes: dict[str, probe.Axes | None]
    problems: list[Exception]


def _used(traced: Traced) -> tuple[dict[str, Any], dict[str, list[probe.Use]]]:
    """The parameters that are arrays, by path, and what uses each."""
    flat = traced.flat
    leaves = {flat.paths[place]: flat.leaves[place] for place in traced.param_index}
    shapes = {
        index: (flat.paths[place], tuple(flat.leaves[place].shape))
        for place, index in traced.param_index.items()
    }
    return leaves, probe.uses(traced.program, shapes)


def plan_of(rules: Rules, traced: Traced) -> Plan:
    """Which of a program's weights the rules adapt; what cannot be is among the plan's problems."""
    leaves, uses = _used(traced)
    axes = {path: probe.axes_of(uses[path], len(leaf.shape)) for path, leaf in leaves.items()}
    plan = Plan([], {}, uses, axes, [])

    def weight_at(path: str) -> Weight:
        return weight_of(path, leaves[path], uses[path])

    def adapt(weight: Weight, config: AdapterConfig) -> None:
        plan.adapted.append((weight, config))
        if config.share is not None:
            sharing, weights = plan.shared.setdefault(config.share, (config, []))
            weights.append(weight)
            if sharing != config or config.share in leaves:
                other = "a weight of that path" if sharing == config else repr(sharing)
                plan.problems.append(
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
            refusal = _refusal(weight, rules)
            if refusal is None:
                adapt(weight, rules)
            else:
                refused.append(f"{path!r} cannot be: {refusal}.")
        if not plan.adapted:
            wanted = _WANTED.get(rules.kinds, "feeds a matrix product or convolution")
            why = refused[0] if refused else f"None of the {len(leaves)} weights {wanted}."
            plan.problems.append(
                ValueError(
                    f"rules={rules!r} adapts nothing. {why} lora.explain(params, ...) lists how "
                    f"each weight is used; a mapping can name an embedding."
                )
            )
        return plan
    assigned = tree.assign(rules, list(leaves))
    plan.problems.extend(ValueError(problem) for problem in assigned.problems)
    for path in leaves:
        pattern, config = assigned.rules.get(path, ("", None))
        if config is None:
            continue
        weight = weight_at(path)
        refusal = _refusal(weight, config)
        if refusal is None:
            adapt(weight, config)
        else:
            kind = TypeError if not _is_float(weight) else ValueError
            plan.problems.append(
                kind(
                    f"The rule {pattern!r} matches {path!r}, which cannot be adapted by "
                    f"{type(config).__name__}: {refusal}. Narrow the pattern, or put "
                    f"{_narrow(path)!r}: None before it."
                )
            )
    return plan


def weight_of(path: str, value: Any, uses: Sequence[probe.Use]) -> Weight:
    """A weight, as what uses it tells."""
    known = [use for use in uses if use.roles is not None]
    by = tuple(dict.fromkeys(use.by for use in uses))
    return Weight(
        path=path,
        value=value,
        axes=probe.axes_of(uses, len(value.shape)) or probe.Axes((), (), ()),
        kind=_kind(known, by),
        multiplies=any(use.meets_data for use in known),
        uses=by,
        window=probe.window_of(uses),
        dense=tuple(dict.fromkeys(use.dense for use in uses if use.dense)),
    )


def weights_of(fn: Callable[..., Any], params: PyTree, *inputs: Any) -> dict[str, Weight]:
    """Every array of `params` by its path, with how `fn(params, *inputs)` uses it."""
    leaves, uses = _used(trace(fn, params, inputs, {}))
    return {path: weight_of(path, leaf, uses[path]) for path, leaf in leaves.items()}


_WANTED = {frozenset({"bias"}): "is a bias"}


def _kind(known: Sequence[probe.Use], by: Sequence[str]) -> Kind:
    """What a weight is, by its uses in products and look-ups and by the names of all its uses."""
    if not known:
        return "bias" if by and set(by) <= {"add", "sub", "add_any"} else "other"
    if any(use.by == "gather" and probe.is_lookup(use, known) for use in known):
        return "embedding"
    convolved = any(use.by == "conv_general_dilated" for use in known)
    return "convolution" if convolved else "linear"


def _is_float(weight: Weight) -> bool:
    return jnp.issubdtype(weight.value.dtype, jnp.floating)


def _refusal(weight: Weight, config: AdapterConfig) -> str | None:
    if not _is_float(weight):
        return f"its type is {weight.value.dtype}, which has no gradient"
    return config.refusal(weight)


def _narrow(path: str) -> str:
    """The shortest pattern that names leaves like this one: its last key."""
    return path.rsplit("/", 1)[-1] + "$"


def abstract_adapter(plan: Plan) -> Adapter:
    """The adapter that init would make, as shapes."""

    def make(values: dict[str, Any]) -> Adapter:
        key = jax.random.key(0)
        placed = lambda weight: weight._replace(value=values[weight.path])  # noqa: E731
        made: Adapter = {w.path: config.leaf(key, placed(w)) for w, config in plan.adapted}
        for name, (config, weights) in plan.shared.items():
            made[name] = config.shared(key, [placed(weight) for weight in weights])
        return made

    values = {weight.path: weight.value for weight, _ in plan.adapted}
    return jax.eval_shape(make, values)
