"""Finds out how a model uses each weight, by abstract interpretation of the traced program.

Nothing is computed. An abstract value is `DATA` (it depends on the inputs of the model), or the
weights from which the value is computed (none for a constant). A weight is followed through data
movement and through arithmetic with other weights (such as weight normalization) up to its use
with data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jlora.interpreter import _compat
from jlora.interpreter.data_movement import list_looked_up_dimensions, match_scalar_scaling
from jlora.interpreter.dot_products import is_matrix_lookup
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.primitive_rules import (
    RULES,
    AxisRole,
    DenseReason,
    MovementRule,
    ProductRule,
    SubProgram,
    SubProgramRule,
)
from jlora.interpreter.terms import Axis, WeightAxes, is_longer


class WeightUse(NamedTuple):
    """One use of a weight.

    Attributes:
        primitive: Name of the primitive.
        dense_reason: Reason for which the weight is materialized. None: the use is factored.
        axis_roles: Roles of the weight axes in a product or look-up. None: any other use.
        has_data_operand: Whether no other operand is an unchanged weight.
        is_right_operand: Whether it is on the right of a product, where layers have their weights.
    """

    primitive: str
    dense_reason: str | None
    axis_roles: dict[int, AxisRole] | None
    has_data_operand: bool = True
    is_right_operand: bool = False


@dataclasses.dataclass(frozen=True)
class _TracedWeight:
    """A weight at a point of the program.

    Attributes:
        array: Its axes, as a factored array without a base.
        dense_reason: Reason for which it has been materialized. None: it is factored.
        has_unknown_axes: Whether an operation arranged it in a way that is not followed. The axes
            are those of the whole weight then.
        is_reordered: Whether constant indices picked its entries.
    """

    array: FactoredArray
    dense_reason: str | None = None
    has_unknown_axes: bool = False
    is_reordered: bool = False


class _DataValue:
    """A value that depends on the inputs of the model."""

    def __repr__(self) -> str:
        return "DATA"


DATA = _DataValue()

AbstractValue = _DataValue | tuple[_TracedWeight, ...]


def find_weight_uses(
    program: _compat.TracedProgram, weights: dict[int, tuple[str, tuple[int, ...]]]
) -> dict[str, list[WeightUse]]:
    """Returns the uses of each weight by path, in the order of the program.

    Args:
        program: Traced model.
        weights: Path and shape of each weight, by input index of the program. All other inputs are
            data.
    """
    uses: dict[str, list[WeightUse]] = {path: [] for path, _ in weights.values()}
    inputs: list[AbstractValue] = [
        (_TracedWeight(FactoredArray.from_weight(None, *weights[i])),) if i in weights else DATA
        for i in range(len(program.inputs))
    ]
    interpreter = UsageInterpreter(uses, dict(weights.values()))
    interpreter.interpret(program, inputs)
    return uses


class UsageInterpreter:
    """Interprets a program on abstract values and records the uses of weights.

    Args:
        uses: Lists by path to which uses are appended.
        weight_shapes: Shapes of the weights by path.
    """

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
        default: AbstractValue = DATA if any(_is_data_value(value) for value in values) else ()
        if not any(_get_traced_weights(value) for value in values):
            return [default] * len(eqn.outvars)
        rule = RULES.get(eqn.primitive.name)
        if isinstance(rule, SubProgramRule):
            return self._interpret_subprograms(rule, eqn, values, default)
        if eqn.primitive.name == "optimization_barrier":
            return values
        followed: list[list[_TracedWeight]] = [[] for _ in eqn.outvars]
        for side, value in enumerate(values):
            for weight in _get_traced_weights(value):
                moved_weights = self._follow_movement(eqn, side, weight, values)
                if moved_weights is None and isinstance(rule, ProductRule):
                    self._record_product(rule, eqn, side, weight, values)
                elif moved_weights is None:
                    moved_weights = self._follow_arithmetic(eqn, side, weight, default, values)
                for followed_output, traced in zip(
                    followed, moved_weights or [], strict=bool(moved_weights)
                ):
                    followed_output.append(traced)
        return [_drop_unknown_copies(weights) or default for weights in followed]

    def _interpret_subprograms(
        self,
        rule: SubProgramRule,
        eqn: Any,
        values: Sequence[AbstractValue],
        default: AbstractValue,
    ) -> Sequence[AbstractValue]:
        name = eqn.primitive.name
        outputs: list[AbstractValue] = [default] * len(eqn.outvars)
        forwarded = rule.get_forwarded(eqn)
        for subprogram in rule.get_subprograms(eqn):
            constant = _find_constant_carries(subprogram, values)
            inputs = [
                ()
                if input_index in constant
                else self._convert_subprogram_input(
                    eqn, values[eqn_input], input_index, eqn_input, subprogram
                )
                for input_index, eqn_input in enumerate(subprogram.eqn_inputs)
            ]
            inner_outputs = self.interpret(subprogram.program, inputs)
            if name == "shard_map":
                continue
            if subprogram.returns_outputs:
                outputs = inner_outputs
                break
            for i, value in enumerate(inner_outputs[: len(outputs)]):
                if i in forwarded:
                    continue
                for weight in _get_traced_weights(value):
                    self._record_dense(weight, f"returned by {name}")
                if name == "cond" and _get_traced_weights(value):
                    selected = tuple(
                        _add_dense_reason(weight, name) for weight in _get_traced_weights(value)
                    )
                    outputs[i] = (*_get_traced_weights(outputs[i]), *selected)
                elif name == "scan" and i >= len(subprogram.carry_unchanged):
                    stacks = [values[number] for number in sorted(subprogram.scanned_inputs)]
                    outputs[i] = _stack_again(value, stacks)
        return [
            values[forwarded[i]] if i in forwarded else output for i, output in enumerate(outputs)
        ]

    def _convert_subprogram_input(
        self,
        eqn: Any,
        value: AbstractValue,
        input_index: int,
        eqn_input: int,
        subprogram: SubProgram,
    ) -> AbstractValue:
        """Converts an input of an equation to the input of its inner program."""
        name = eqn.primitive.name
        if isinstance(value, _DataValue):
            return value
        if input_index in subprogram.carry_unchanged and not value:
            return DATA  # The carry begins as a constant, and data are added in the loop.
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
                if not weight.has_unknown_axes and _shards_merged_axis(weight.array, spec)
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
        """Follows a weight through data movement; returns None for any other equation."""
        if weight.has_unknown_axes:
            return None
        name = eqn.primitive.name
        scaling = match_scalar_scaling(eqn)
        if scaling is not None and scaling.array_side == side:
            return [weight]
        rule = RULES.get(name)
        if not isinstance(rule, MovementRule):
            return None
        if name == "concatenate" and any(_is_data_value(value) for value in values):
            return None  # The result is an activation (a class token before patches).
        arrays = [weight.array if i == side else None for i in range(len(values))]
        moved = [array for array in rule.move(eqn, arrays, values) or () if array is not None]
        if not moved:
            return None
        if moved[0].is_gathered and not weight.array.is_gathered:
            by_data = any(_is_data_value(value) for value in values[1:])
            roles = self._get_lookup_roles(eqn, weight)
            self._record_use(weight, WeightUse(name, weight.dense_reason, roles, by_data))
            weight = dataclasses.replace(weight, is_reordered=not by_data)
        return [dataclasses.replace(weight, array=array) for array in moved]

    def _record_product(
        self,
        rule: ProductRule,
        eqn: Any,
        side: int,
        weight: _TracedWeight,
        values: Sequence[AbstractValue],
    ) -> None:
        name = eqn.primitive.name
        # A value computed from weights (learned queries after a norm) is an activation too; an
        # unchanged weight (the vector of a power iteration) is not.
        others = [value for i, value in enumerate(values) if i != side]
        has_data_operand = not any(
            weight.dense_reason is None and not weight.array.is_gathered
            for value in others
            for weight in _get_traced_weights(value)
        )
        roles = None if weight.has_unknown_axes else rule.axis_roles(eqn, side, weight.array)
        if roles is None or (isinstance(roles, DenseReason) and weight.is_reordered):
            # Its place in the product is not known: inputs first, as in Flax.
            ndim = len(self._weight_shapes[weight.array.path])
            axis_roles = dict.fromkeys(range(ndim - 1), AxisRole.INPUT)
            axis_roles[ndim - 1] = AxisRole.OUTPUT
            reason = weight.dense_reason or "rows or columns in a fixed order"
            self._record_use(weight, WeightUse(name, reason, axis_roles, has_data_operand))
            return
        if isinstance(roles, DenseReason):
            if not weight.array.is_gathered:
                self._record_use(weight, WeightUse(name, str(roles), None, has_data_operand))
            return
        if weight.array.is_gathered and is_matrix_lookup(roles):
            if not has_data_operand:
                return  # Rows with several axes, which multiply another weight.
            roles = {a: AxisRole.BATCH if a.is_gathered else role for a, role in roles.items()}
        axis_roles = self._fill_batch_roles(weight, _roles_by_weight_axis(roles))
        use = WeightUse(name, weight.dense_reason, axis_roles, has_data_operand, side > 0)
        self._record_use(weight, use)

    def _get_lookup_roles(self, eqn: Any, weight: _TracedWeight) -> dict[int, AxisRole]:
        """Returns the roles in a look-up: indexed axes are inputs, the others outputs."""
        places = list_looked_up_dimensions(eqn)
        if not places:  # Of the only row of a table.
            places = eqn.params["dimension_numbers"].start_index_map
        if len(places) == len(weight.array.axis_groups):
            places = places[:-1]  # Single entries: those of a row have its indices in common.
        indexed = {axis for place in places for axis in weight.array.axis_groups[place]}
        roles = {
            axis: AxisRole.INPUT if axis in indexed else AxisRole.OUTPUT
            for axis in weight.array.axes
        }
        return self._fill_batch_roles(weight, _roles_by_weight_axis(roles))

    def _fill_batch_roles(
        self, weight: _TracedWeight, axis_roles: dict[int, AxisRole]
    ) -> dict[int, AxisRole]:
        # A missing axis was removed by a scan or a slice, one index at a time.
        axes = range(len(self._weight_shapes[weight.array.path]))
        return {axis: axis_roles.get(axis, AxisRole.BATCH) for axis in axes}

    def _get_slice_roles(self, weight: _TracedWeight) -> dict[int, AxisRole] | None:
        """Returns the roles of a table of which rows are added to data; None for other weights."""
        if weight.has_unknown_axes:
            return None
        shape = self._weight_shapes[weight.array.path]
        axes = [
            axis
            for axis in weight.array.axes
            if axis.weight_axis is not None and is_longer(axis.size, 1)
        ]
        cut = {axis for axis in axes if is_longer(shape[axis.weight_axis or 0], axis.size)}
        if not cut or len(axes) == len(cut):
            return None
        roles = {axis: AxisRole.INPUT if axis in cut else AxisRole.OUTPUT for axis in axes}
        return self._fill_batch_roles(weight, _roles_by_weight_axis(roles))

    def _follow_arithmetic(
        self,
        eqn: Any,
        side: int,
        weight: _TracedWeight,
        rest: AbstractValue,
        values: Sequence[AbstractValue],
    ) -> list[_TracedWeight] | None:
        """Follows a weight, which is materialized here, through operations with weights alone.

        Returns None where data take part, and for a reduction.
        """
        if weight.array.is_gathered:
            return None  # Only the gathered rows are materialized, not the weight.
        reason = eqn.primitive.name
        if reason == "select_n":  # Data may choose between weights, as a batch of `cond` does.
            rest = DATA if any(value is DATA for value in values[1:]) else ()
        if weight.dense_reason is None:
            lookup = None
            if reason == "add" and _is_data_value(rest):
                lookup = self._get_slice_roles(weight)
            name = reason if lookup is None else "slice"
            dense_reason = reason if lookup is None else None
            self._record_use(weight, WeightUse(name, dense_reason, lookup, _is_data_value(rest)))
        source = eqn.invars[side].aval
        results = [out.aval for out in eqn.outvars]
        is_repeated = any(is_longer(result.size, source.size) for result in results) or any(
            axis.weight_axis is None and is_longer(axis.size, 1) for axis in weight.array.axes
        )
        if _is_data_value(rest) or (reason in ("add", "sub") and is_repeated):
            return None  # A bias is repeated along the other axes of what it is added to.
        if [result.shape for result in results] == [source.shape]:
            return [dataclasses.replace(weight, dense_reason=weight.dense_reason or reason)]
        is_smaller = any(is_longer(source.size, result.size) for result in results)
        if is_smaller and not (reason.startswith("reduce") and _are_matrices(results)):
            return None  # A norm, or entries of the weight.
        # Such as a weight that is written into a larger array.
        whole = FactoredArray.from_weight(
            None, weight.array.path, self._weight_shapes[weight.array.path]
        )
        return [_TracedWeight(whole, weight.dense_reason or reason, True) for _ in results]

    def _record_use(self, weight: _TracedWeight, use: WeightUse) -> None:
        self._uses[weight.array.path].append(use)


def _are_matrices(results: Sequence[Any]) -> bool:
    return all(sum(is_longer(n, 1) for n in result.shape) > 1 for result in results)


def _add_dense_reason(weight: _TracedWeight, reason: str) -> _TracedWeight:
    return dataclasses.replace(weight, dense_reason=weight.dense_reason or reason)


def _drop_unknown_copies(weights: Sequence[_TracedWeight]) -> tuple[_TracedWeight, ...]:
    """Returns the weights without those of unknown axes that are among them a second time."""
    kept: dict[tuple[str, int | None], _TracedWeight] = {}
    known = {weight.array.path for weight in weights if not weight.has_unknown_axes}
    for number, weight in enumerate(weights):
        path = weight.array.path
        if not weight.has_unknown_axes:
            kept[path, number] = weight
        elif path not in known:
            kept[path, None] = weight
    return tuple(kept.values())


def _find_constant_carries(subprogram: SubProgram, values: Sequence[AbstractValue]) -> set[int]:
    """Finds the inputs of a loop's body that are its carries and that no data enter (counters)."""
    count = len(subprogram.carry_unchanged)
    if not count:
        return set()
    first = min(subprogram.carry_unchanged)
    inputs = [values[eqn_input] for eqn_input in subprogram.eqn_inputs]
    depends = [value != () for value in inputs]
    constant = {i for i in subprogram.carry_unchanged if not depends[i]}
    if len(subprogram.program.outputs) < count:
        return set()  # The condition of a loop, which returns no carry.
    while True:
        outputs = _propagate_dependence(subprogram.program, depends)
        changed = {i for i in constant if outputs[i - first]}
        if not changed:
            return constant
        constant -= changed
        for i in changed:
            depends[i] = True


def _propagate_dependence(program: _compat.TracedProgram, inputs: Sequence[bool]) -> list[bool]:
    """Returns which outputs of a program may depend on the inputs that are marked."""
    marked = {var for var, depends in zip(program.inputs, inputs, strict=True) if depends}

    def is_marked(atom: Any) -> bool:
        return not _compat.is_literal(atom) and atom in marked

    for eqn in program.jaxpr.eqns:
        if any(map(is_marked, eqn.invars)):
            marked.update(eqn.outvars)
    return [is_marked(atom) for atom in program.outputs]


def _shards_merged_axis(array: FactoredArray, spec: Any) -> bool:
    """Whether an array axis formed by several axes is sharded, which operands do not support."""
    entries = zip(spec, array.axis_groups, strict=False)
    return any(entry is not None and len(group) != 1 for entry, group in entries)


def _roles_by_weight_axis(roles: dict[Axis, AxisRole]) -> dict[int, AxisRole]:
    """Returns the roles by axis of the original weight, which reshapes may have split."""
    axis_roles: dict[int, AxisRole] = {}
    for weight_axis in {axis.weight_axis for axis in roles if axis.weight_axis is not None}:
        parts = {axis: role for axis, role in roles.items() if axis.weight_axis == weight_axis}
        part_roles = {role for axis, role in parts.items() if is_longer(axis.size, 1)} or set(
            parts.values()
        )
        axis_roles[weight_axis] = next(role for role in _ROLE_PRIORITY if role in part_roles)
    return axis_roles


_INPUT_ROLES = (AxisRole.INPUT, AxisRole.WINDOW)
_ROLE_PRIORITY = (AxisRole.INPUT, AxisRole.WINDOW, AxisRole.OUTPUT, AxisRole.BATCH)


def _is_data_value(value: AbstractValue) -> bool:
    return value is DATA or any(weight.array.is_gathered for weight in _get_traced_weights(value))


def _get_traced_weights(value: AbstractValue) -> tuple[_TracedWeight, ...]:
    return () if isinstance(value, _DataValue) else value


def _stack_again(value: AbstractValue, stacks: Sequence[AbstractValue]) -> AbstractValue:
    """Returns the output of a scan that stacks weights which were slices of stacks before."""
    if isinstance(value, _DataValue):
        return value
    reason = "returned by scan"
    leading = {
        weight.array.path: weight.array.axis_groups[0]
        for stack in stacks
        for weight in _get_traced_weights(stack)
        if not weight.has_unknown_axes
    }
    result = []
    for weight in value:
        array, path = weight.array, weight.array.path
        is_known = path in leading and not weight.has_unknown_axes
        if is_known:
            array = array.with_axis_groups([leading[path], *array.axis_groups])
        result.append(_TracedWeight(array, weight.dense_reason or reason, not is_known))
    return tuple(result)


def _drop_leading_axis(value: AbstractValue) -> AbstractValue:
    if isinstance(value, _DataValue):
        return value
    return tuple(
        w
        if w.has_unknown_axes
        else _TracedWeight(w.array.with_axis_groups(w.array.axis_groups[1:]), w.dense_reason)
        if len(w.array.axis_groups[0]) == 1
        else _TracedWeight(
            w.array.with_axis_groups(w.array.axis_groups[1:]),
            w.dense_reason or "scan over merged axes",
        )
        for w in value
    )


def _to_shard_shapes(value: AbstractValue, var: Any) -> AbstractValue:
    """Replaces axes by those of a shard, as inside a shard_map."""
    if isinstance(value, _DataValue):
        return value
    followed = []
    for weight in value:
        if weight.has_unknown_axes:
            followed.append(weight)
            continue
        groups = []
        for group, length in zip(weight.array.axis_groups, var.aval.shape, strict=True):
            unsharded = weight.array.with_axis_groups((group,)).shape[0] == length
            groups.append(group if unsharded else (Axis(length, group[0].weight_axis),))
        followed.append(_TracedWeight(weight.array.with_axis_groups(groups), weight.dense_reason))
    return tuple(followed)


def infer_weight_axes(uses: Iterable[WeightUse], ndim: int) -> WeightAxes | None:
    """Returns the axes of a weight by role, or None if no use is a product or look-up.

    The roles are those of one use: preferably of an embedding look-up (a tied embedding is an
    embedding), then of a product with data, then of one on the right of another weight.

    Args:
        uses: Uses of the weight.
        ndim: Number of axes of the weight.
    """
    roles = _select_decisive_roles(uses)
    if roles is None:
        return None
    axes = [
        tuple(axis for axis in range(ndim) if roles.get(axis) in group)
        for group in ((AxisRole.BATCH,), _INPUT_ROLES, (AxisRole.OUTPUT,))
    ]
    return WeightAxes(*axes)


def infer_window_axes(uses: Iterable[WeightUse]) -> tuple[int, ...]:
    """Returns the input axes of a weight that are the window of a convolution."""
    roles = _select_decisive_roles(uses) or {}
    return tuple(sorted(axis for axis, role in roles.items() if role is AxisRole.WINDOW))


def is_transposed(uses: Iterable[WeightUse]) -> bool:
    """Whether the products of a weight contract different axes of it."""
    roles = (use.axis_roles for use in uses if use.primitive not in _LOOKUPS)
    inputs = {frozenset(a for a, role in r.items() if role in _INPUT_ROLES) for r in roles if r}
    return len(inputs) > 1


def _select_decisive_roles(uses: Iterable[WeightUse]) -> dict[int, AxisRole] | None:
    uses_with_roles = [use for use in uses if use.axis_roles is not None]
    return (
        min(uses_with_roles, key=lambda use: _use_priority(use, uses_with_roles)).axis_roles
        if uses_with_roles
        else None
    )


def _use_priority(use: WeightUse, known: Sequence[WeightUse]) -> tuple[int, bool, bool]:
    if is_embedding_lookup(use, known):
        return 0, False, False
    # Rows gathered for a product (one expert per token) leave the roles to the product. In a
    # product of two weights, the left one is a learned activation, such as latent queries.
    is_lookup = use.primitive in _LOOKUPS
    return (2 if is_lookup else 1), not use.has_data_operand, not use.is_right_operand


_LOOKUPS = ("gather", "dynamic_slice", "slice")


def is_embedding_lookup(use: WeightUse, known: Sequence[WeightUse]) -> bool:
    """Whether a use looks up embeddings.

    That is rows that are not matrices of a later product, looked up by data unless the weight has
    no other use.
    """
    if use.primitive not in _LOOKUPS:
        return False
    products = [other for other in known if other.primitive not in _LOOKUPS]
    if products and not use.has_data_operand:
        return False  # Such as a fixed order of columns.
    return not any(_get_use_batch_axes(other) >= _get_use_input_axes(use) for other in products)


def _get_use_batch_axes(use: WeightUse) -> set[int]:
    return {axis for axis, role in (use.axis_roles or {}).items() if role is AxisRole.BATCH}


def _get_use_input_axes(use: WeightUse) -> set[int]:
    return {axis for axis, role in (use.axis_roles or {}).items() if role is AxisRole.INPUT}
