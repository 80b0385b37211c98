"""How a model uses each of its weights, found by following them through the traced program.

The walk is symbolic: nothing is computed. Values are `DATA` (depends on the model's inputs), or the
weights that a weight-only value came from (none for a constant). A weight is followed through moves
and through arithmetic among weights (a weight norm, say) until it meets data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jlora.interpreter import (  # noqa: F401  The modules register their rules.
    _compat,
    control_flow,
    conv,
    custom_derivatives,
    data_movement,
    dot_products,
)
from jlora.interpreter.data_movement import match_scalar_scaling
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.primitive_rules import (
    RULES,
    AxisRole,
    DenseReason,
    MovementRule,
    ProductRule,
    SubProgramRule,
)
from jlora.interpreter.terms import Axis


class WeightAxes(NamedTuple):
    """The axes of a weight by what they do: numbers of its axes, in increasing order.

    Attributes:
        batch: One matrix for each index: layers of a scan, experts.
        inputs: Contracted with the activation (for an embedding, the axis that is looked up).
        outputs: Appear in the result.
    """

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class WeightUse(NamedTuple):
    """One place where a weight is consumed.

    Attributes:
        primitive: The primitive.
        dense_reason: Why the dense sum is formed there; None where the use is factored.
        axis_roles: What each axis of the weight does, for products and look-ups.
    """

    primitive: str
    dense_reason: str | None
    axis_roles: dict[int, AxisRole] | None
    has_data_operand: bool = True


@dataclasses.dataclass(frozen=True)
class _TracedWeight:
    """A weight on its way: its network, and what forced it to be dense, if anything did."""

    array: FactoredArray
    dense_reason: str | None = None


class _DataValue:
    def __repr__(self) -> str:
        return "DATA"


DATA = _DataValue()

AbstractValue = _DataValue | tuple[_TracedWeight, ...]


def find_weight_uses(
    program: _compat.TracedProgram, weights: dict[int, tuple[str, tuple[int, ...]]]
) -> dict[str, list[WeightUse]]:
    """The uses of each weight, by its path, in the order of the program.

    Args:
        program: The traced model.
        weights: For inputs of the program that are weights, path and shape. Every other input is
            data.
    """
    found: dict[str, list[WeightUse]] = {path: [] for path, _ in weights.values()}
    inputs: list[AbstractValue] = [
        (_TracedWeight(FactoredArray.from_weight(None, *weights[i])),) if i in weights else DATA
        for i in range(len(program.inputs))
    ]
    walk = UsageInterpreter(found, dict(weights.values()))
    walk.interpret(program, inputs)
    return found


class UsageInterpreter:
    def __init__(
        self, uses: dict[str, list[WeightUse]], weight_shapes: dict[str, tuple[int, ...]]
    ) -> None:
        self._uses = uses
        self._weight_shapes = weight_shapes

    def interpret(
        self, program: _compat.TracedProgram, inputs: Sequence[AbstractValue]
    ) -> list[AbstractValue]:
        values: dict[Any, AbstractValue] = dict.fromkeys(program.jaxpr.constvars, ())
        values |= dict(zip(program.jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> AbstractValue:
            return () if _compat.is_literal(atom) else values[atom]

        for eqn in program.jaxpr.eqns:
            outputs = self._interpret_equation(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in program.outputs]

    def _interpret_equation(
        self, eqn: Any, values: Sequence[AbstractValue]
    ) -> Sequence[AbstractValue]:
        rest: AbstractValue = DATA if any(_is_data_value(value) for value in values) else ()
        if not any(_get_traced_weights(value) for value in values):
            return [rest] * len(eqn.outvars)
        rule = RULES.get(eqn.primitive.name)
        if isinstance(rule, SubProgramRule):
            return self._interpret_subprograms(rule, eqn, values, rest)
        if eqn.primitive.name == "optimization_barrier":
            return values
        followed: list[list[_TracedWeight]] = [[] for _ in eqn.outvars]
        for side, value in enumerate(values):
            for weight in _get_traced_weights(value):
                moved = self._follow_movement(eqn, side, weight, values)
                if moved is None and isinstance(rule, ProductRule):
                    self._record_product(rule, eqn, side, weight, values)
                elif moved is None:
                    moved = self._follow_arithmetic(eqn, side, weight, rest)
                for output, traced in zip(followed, moved or [], strict=bool(moved)):
                    output.append(traced)
        return [tuple(output) or rest for output in followed]

    def _interpret_subprograms(
        self,
        rule: SubProgramRule,
        eqn: Any,
        values: Sequence[AbstractValue],
        rest: AbstractValue,
    ) -> Sequence[AbstractValue]:
        name = eqn.primitive.name
        outputs: list[AbstractValue] = [rest] * len(eqn.outvars)
        for body in rule.get_subprograms(eqn):
            inputs = [
                self._convert_subprogram_input(eqn, values[source], place, source, body)
                for place, source in enumerate(body.eqn_inputs)
            ]
            inner = self.interpret(body.program, inputs)
            if name == "shard_map":
                continue
            if body.returns_outputs:
                return inner
            first = min(body.carry_unchanged, default=0)
            for i, value in enumerate(inner[: len(outputs)]):
                if body.carry_unchanged.get(first + i) and i < len(body.carry_unchanged):
                    outputs[i] = inputs[first + i]
                    continue
                for weight in _get_traced_weights(value):
                    self._record_dense(weight, f"returned by {name}")
                if name == "cond" and _get_traced_weights(value):
                    picked = tuple(
                        _add_dense_reason(weight, name) for weight in _get_traced_weights(value)
                    )
                    outputs[i] = (*_get_traced_weights(outputs[i]), *picked)
        return outputs

    def _convert_subprogram_input(
        self, eqn: Any, value: AbstractValue, input_index: int, eqn_input: int, subprogram: Any
    ) -> AbstractValue:
        """What a value of the equation is inside a program that it holds."""
        name = eqn.primitive.name
        if isinstance(value, _DataValue):
            return value
        if input_index in subprogram.carry_unchanged and not value:
            return DATA  # Constant at first, but not for long.
        if (
            eqn_input in subprogram.materialized_inputs
            or subprogram.carry_unchanged.get(input_index) is False
        ):
            reason = f"changed by {name}" if input_index in subprogram.carry_unchanged else name
            value = tuple(self._record_dense(weight, reason) for weight in value)
        if eqn_input in subprogram.scanned_inputs:
            return _drop_leading_axis(value)
        if name == "shard_map":
            spec = eqn.params["in_specs"][eqn_input]
            value = tuple(
                self._record_dense(weight, "shard_map over merged axes")
                if _shards_merged_axis(weight.array, spec)
                else weight
                for weight in value
            )
            return _to_shard_shapes(value, subprogram.program.inputs[input_index])
        return value

    def _record_dense(self, weight: _TracedWeight, reason: str) -> _TracedWeight:
        if weight.dense_reason is None and not weight.array.is_gathered:
            self._record_use(weight, WeightUse(reason, reason, None))
        return _add_dense_reason(weight, reason)

    def _follow_movement(
        self, eqn: Any, side: int, weight: _TracedWeight, values: Sequence[AbstractValue]
    ) -> list[_TracedWeight] | None:
        """The weight behind an equation that only moves entries; None where it is not one."""
        name = eqn.primitive.name
        scaling = match_scalar_scaling(eqn)
        if scaling is not None and scaling.array_side == side:
            return [weight]
        rule = RULES.get(name)
        if not isinstance(rule, MovementRule):
            return None
        if name == "concatenate" and any(_is_data_value(value) for value in values):
            return None  # The result is an activation (a class token before its patches).
        arrays = [weight.array if i == side else None for i in range(len(values))]
        moved = rule.move(eqn, arrays, values)
        if not moved or moved[0] is None or (moved[0].is_gathered and weight.dense_reason):
            return None
        if moved[0].is_gathered and not weight.array.is_gathered:
            self._record_use(
                weight, WeightUse(name, None, self._get_lookup_roles(weight, moved[0]))
            )
        return [_TracedWeight(array, weight.dense_reason) for array in moved if array is not None]

    def _record_product(
        self,
        rule: ProductRule,
        eqn: Any,
        side: int,
        weight: _TracedWeight,
        values: Sequence[AbstractValue],
    ) -> None:
        name = eqn.primitive.name
        # What was computed from weights (learned queries behind a norm) is an activation too; a
        # weight itself (the vector of a power iteration) is not.
        others = [value for i, value in enumerate(values) if i != side]
        meets_data = not any(
            weight.dense_reason is None and not weight.array.is_gathered
            for value in others
            for weight in _get_traced_weights(value)
        )
        roles = rule.axis_roles(eqn, side, weight.array)
        if isinstance(roles, DenseReason):
            if not weight.array.is_gathered:
                self._record_use(weight, WeightUse(name, str(roles), None, meets_data))
            return
        by_root = self._fill_batch_roles(weight, _roles_by_weight_axis(roles))
        between = weight.dense_reason
        if side > 0 and not meets_data:
            between = between or "product of two weights"
        self._record_use(weight, WeightUse(name, between, by_root, meets_data))

    def _get_lookup_roles(
        self, weight: _TracedWeight, looked_up: FactoredArray
    ) -> dict[int, AxisRole]:
        """Roles at a look-up: the rows are inputs, what they hold are outputs."""
        atoms = looked_up.axes
        return self._fill_batch_roles(
            weight,
            _roles_by_weight_axis(
                {a: AxisRole.INPUT if a.is_gathered else AxisRole.OUTPUT for a in atoms}
            ),
        )

    def _fill_batch_roles(
        self, weight: _TracedWeight, by_root: dict[int, AxisRole]
    ) -> dict[int, AxisRole]:
        # An axis that is no longer there was taken one index at a time: by a scan or a slice.
        axes = range(len(self._weight_shapes[weight.array.path]))
        return {axis: by_root.get(axis, AxisRole.BATCH) for axis in axes}

    def _follow_arithmetic(
        self, eqn: Any, side: int, weight: _TracedWeight, rest: AbstractValue
    ) -> list[_TracedWeight] | None:
        """The weight behind arithmetic with other weights, entry by entry; None when that is not
        what the equation does. Either way its dense sum is formed here.
        """
        if weight.array.is_gathered:
            return None  # Looked-up rows are summed as rows; no weight is made dense.
        reason = eqn.primitive.name
        if weight.dense_reason is None:
            self._record_use(
                weight, WeightUse(eqn.primitive.name, reason, None, _is_data_value(rest))
            )
        shape = tuple(eqn.invars[side].aval.shape)
        alike = [tuple(out.aval.shape) == shape for out in eqn.outvars]
        if _is_data_value(rest) or alike != [True]:
            return None
        return [_TracedWeight(weight.array, weight.dense_reason or reason)]

    def _record_use(self, weight: _TracedWeight, use: WeightUse) -> None:
        self._uses[weight.array.path].append(use)


def _add_dense_reason(weight: _TracedWeight, reason: str) -> _TracedWeight:
    return _TracedWeight(weight.array, weight.dense_reason or reason)


def _shards_merged_axis(array: FactoredArray, spec: Any) -> bool:
    """Returns whether a sharding splits a dimension of several axes."""
    entries = zip(spec, array.axis_groups, strict=False)
    return any(entry is not None and len(group) != 1 for entry, group in entries)


def _roles_by_weight_axis(roles: dict[Axis, AxisRole]) -> dict[int, AxisRole]:
    """Roles by axis of the original weight, of which reshapes may have made several atoms."""
    by_root: dict[int, AxisRole] = {}
    for root in {atom.weight_axis for atom in roles if atom.weight_axis is not None}:
        parts = {atom: role for atom, role in roles.items() if atom.weight_axis == root}
        longer = {role for atom, role in parts.items() if atom.size > 1} or set(parts.values())
        by_root[root] = next(role for role in _ROLE_PRIORITY if role in longer)
    return by_root


_ROLE_PRIORITY = (AxisRole.INPUT, AxisRole.WINDOW, AxisRole.OUTPUT, AxisRole.BATCH)


def _is_data_value(value: AbstractValue) -> bool:
    return value is DATA or any(weight.array.is_gathered for weight in _get_traced_weights(value))


def _get_traced_weights(value: AbstractValue) -> tuple[_TracedWeight, ...]:
    return () if isinstance(value, _DataValue) else value


def _drop_leading_axis(value: AbstractValue) -> AbstractValue:
    if isinstance(value, _DataValue):
        return value
    return tuple(
        _TracedWeight(w.array.with_axis_groups(w.array.axis_groups[1:]), w.dense_reason)
        if len(w.array.axis_groups[0]) == 1
        else _TracedWeight(
            w.array.with_axis_groups(w.array.axis_groups[1:]),
            w.dense_reason or "scan over merged axes",
        )
        for w in value
    )


def _to_shard_shapes(value: AbstractValue, var: Any) -> AbstractValue:
    """Inside shard_map axes are as long as a shard."""
    if isinstance(value, _DataValue):
        return value
    followed = []
    for weight in value:
        axes = []
        for group, length in zip(weight.array.axis_groups, var.aval.shape, strict=True):
            whole = weight.array.with_axis_groups((group,)).shape[0] == length
            axes.append(group if whole else (Axis(length, group[0].weight_axis),))
        followed.append(_TracedWeight(weight.array.with_axis_groups(axes), weight.dense_reason))
    return tuple(followed)


def infer_weight_axes(uses: Iterable[WeightUse], ndim: int) -> WeightAxes | None:
    """The axes of a weight by the use that decides; None when no use is a product or look-up.

    A look-up decides first (a tied embedding is an embedding), then a product with data.
    """
    roles = _select_decisive_roles(uses)
    if roles is None:
        return None
    axes = [
        tuple(axis for axis in range(ndim) if roles.get(axis) in group)
        for group in ((AxisRole.BATCH,), (AxisRole.INPUT, AxisRole.WINDOW), (AxisRole.OUTPUT,))
    ]
    return WeightAxes(*axes)


def infer_window_axes(uses: Iterable[WeightUse]) -> tuple[int, ...]:
    """Those of a weight's input axes that a convolution slides over."""
    roles = _select_decisive_roles(uses) or {}
    return tuple(sorted(axis for axis, role in roles.items() if role is AxisRole.WINDOW))


def _select_decisive_roles(uses: Iterable[WeightUse]) -> dict[int, AxisRole] | None:
    known = [use for use in uses if use.axis_roles is not None]
    return min(known, key=lambda use: _use_priority(use, known)).axis_roles if known else None


def _use_priority(use: WeightUse, known: Sequence[WeightUse]) -> tuple[int, bool]:
    if is_embedding_lookup(use, known):
        return 0, False
    # Rows looked up only to be multiplied with (one expert per token) leave it to the product.
    return (2 if use.primitive == "gather" else 1), not use.has_data_operand


def is_embedding_lookup(use: WeightUse, known: Sequence[WeightUse]) -> bool:
    """Whether a use is an embedding's: rows looked up that do not then multiply as matrices."""
    return use.primitive == "gather" and not any(
        other.primitive != "gather" and _get_use_batch_axes(other) >= _get_use_input_axes(use)
        for other in known
    )


def _get_use_batch_axes(use: WeightUse) -> set[int]:
    return {axis for axis, role in (use.axis_roles or {}).items() if role is AxisRole.BATCH}


def _get_use_input_axes(use: WeightUse) -> set[int]:
    return {axis for axis, role in (use.axis_roles or {}).items() if role is AxisRole.INPUT}
