"""How a model uses each of its weights, found by following them through the traced program.

The walk is symbolic: nothing is computed. Values are `DATA` (depends on the model's inputs), or the
weights that a weight-only value came from (none for a constant). A weight is followed through moves
and through arithmetic among weights (a weight norm, say) until it meets data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jlora.factored import custom, products, releases, structure
from jlora.factored.contraction import Atom
from jlora.factored.control import RULES as CONTROL_RULES
from jlora.factored.network import Network, build
from jlora.factored.roles import Dense, Role

_CONTROL = CONTROL_RULES | custom.RULES


class Axes(NamedTuple):
    """The axes of a weight by what they do: numbers of its axes, in increasing order.

    Attributes:
        batch: One matrix for each index: layers of a scan, experts.
        inputs: Contracted with the activation (for an embedding, the axis that is looked up).
        outputs: Appear in the result.
    """

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Use(NamedTuple):
    """One place where a weight is consumed.

    Attributes:
        by: The primitive.
        dense: Why the dense sum is formed there; None where the use is factored.
        roles: What each axis of the weight does, for products and look-ups.
    """

    by: str
    dense: str | None
    roles: dict[int, Role] | None
    meets_data: bool = True


@dataclasses.dataclass(frozen=True)
class _Followed:
    """A weight on its way: its network, and what forced it to be dense, if anything did."""

    network: Network
    dense: str | None = None


class _Data:
    def __repr__(self) -> str:
        return "DATA"


DATA = _Data()
Value = _Data | tuple[_Followed, ...]


def uses(
    held: releases.Program, weights: dict[int, tuple[str, tuple[int, ...]]]
) -> dict[str, list[Use]]:
    """The uses of each weight, by its path, in the order of the program.

    Args:
        held: The traced model.
        weights: For inputs of the program that are weights, path and shape. Every other input is
            data.
    """
    found: dict[str, list[Use]] = {path: [] for path, _ in weights.values()}
    inputs: list[Value] = [
        (_Followed(build(*weights[i])),) if i in weights else DATA for i in range(len(held.inputs))
    ]
    walk = _Walk(found, dict(weights.values()))
    walk.follow(held, inputs)
    return found


class _Walk:
    def __init__(self, found: dict[str, list[Use]], shapes: dict[str, tuple[int, ...]]) -> None:
        self._found = found
        self._shapes = shapes

    def follow(self, held: releases.Program, inputs: Sequence[Value]) -> list[Value]:
        values: dict[Any, Value] = dict.fromkeys(held.jaxpr.constvars, ())
        values |= dict(zip(held.jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Value:
            return () if releases.is_literal(atom) else values[atom]

        for eqn in held.jaxpr.eqns:
            outputs = self._step(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in held.outputs]

    def _step(self, eqn: Any, values: Sequence[Value]) -> Sequence[Value]:
        rest: Value = DATA if any(_is_data(value) for value in values) else ()
        if not any(_weights(value) for value in values):
            return [rest] * len(eqn.outvars)
        name = eqn.primitive.name
        if name in _CONTROL:
            return self._enter(eqn, values, rest)
        if name == "optimization_barrier":
            return values
        followed: list[list[_Followed]] = [[] for _ in eqn.outvars]
        for side, value in enumerate(values):
            for weight in _weights(value):
                moved = self._moved(eqn, side, weight, values)
                if moved is None and name in products.RULES:
                    self._multiply(eqn, side, weight, values)
                elif moved is None:
                    moved = self._combined(eqn, side, weight, rest)
                for output, network in zip(followed, moved or [], strict=bool(moved)):
                    output.append(network)
        return [tuple(output) or rest for output in followed]

    def _enter(self, eqn: Any, values: Sequence[Value], rest: Value) -> Sequence[Value]:
        name = eqn.primitive.name
        outputs: list[Value] = [rest] * len(eqn.outvars)
        for body in _CONTROL[name].bodies(eqn):
            inputs = [
                self._passed(eqn, values[source], place, source, body)
                for place, source in enumerate(body.sources)
            ]
            inner = self.follow(body.program, inputs)
            if name == "shard_map":
                continue
            if body.returns:
                return inner
            first = min(body.carried, default=0)
            for i, value in enumerate(inner[: len(outputs)]):
                if body.carried.get(first + i) and i < len(body.carried):
                    outputs[i] = inputs[first + i]
                    continue
                for weight in _weights(value):
                    self._made_dense(weight, f"returned by {name}")
                if name == "cond" and _weights(value):
                    picked = tuple(_dense(weight, name) for weight in _weights(value))
                    outputs[i] = (*_weights(outputs[i]), *picked)
        return outputs

    def _passed(self, eqn: Any, value: Value, place: int, source: int, body: Any) -> Value:
        """What a value of the equation is inside a program that it holds."""
        name = eqn.primitive.name
        if isinstance(value, _Data):
            return value
        if place in body.carried and not value:
            return DATA  # Constant at first, but not for long.
        if source in body.dense or body.carried.get(place) is False:
            reason = f"changed by {name}" if place in body.carried else name
            value = tuple(self._made_dense(weight, reason) for weight in value)
        if source in body.sliced:
            return _slice_leading(value)
        if name == "shard_map":
            spec = eqn.params["in_specs"][source]
            value = tuple(
                self._made_dense(weight, "shard_map over merged axes")
                if _splits_merged(weight.network, spec)
                else weight
                for weight in value
            )
            return _localised(value, body.program.inputs[place])
        return value

    def _made_dense(self, weight: _Followed, reason: str) -> _Followed:
        if weight.dense is None and not weight.network.indexed:
            self._record(weight, Use(reason, reason, None))
        return _dense(weight, reason)

    def _moved(
        self, eqn: Any, side: int, weight: _Followed, values: Sequence[Value]
    ) -> list[_Followed] | None:
        """The weight behind an equation that only moves entries; None where it is not one."""
        name = eqn.primitive.name
        scaling = structure.scaling(eqn)
        if scaling is not None and scaling.side == side:
            return [weight]
        if name not in structure.RULES:
            return None
        if name == "concatenate" and any(_is_data(value) for value in values):
            return None  # The result is an activation (a class token before its patches).
        networks = [weight.network if i == side else None for i in range(len(values))]
        moved = structure.RULES[name](eqn, networks, values)
        if moved is None or (moved[0].indexed and weight.dense):
            return None
        if moved[0].indexed and not weight.network.indexed:
            self._record(weight, Use(name, None, self._roles(weight, moved[0])))
        return [_Followed(network, weight.dense) for network in moved]

    def _multiply(self, eqn: Any, side: int, weight: _Followed, values: Sequence[Value]) -> None:
        name = eqn.primitive.name
        # What was computed from weights (learned queries behind a norm) is an activation too; a
        # weight itself (the vector of a power iteration) is not.
        others = [value for i, value in enumerate(values) if i != side]
        meets_data = not any(
            weight.dense is None and not weight.network.indexed
            for value in others
            for weight in _weights(value)
        )
        roles = products.RULES[name].roles(eqn, side, weight.network)
        if isinstance(roles, Dense):
            if not weight.network.indexed:
                self._record(weight, Use(name, str(roles), None, meets_data))
            return
        by_root = self._completed(weight, _by_root(roles))
        between = weight.dense
        if side > 0 and not meets_data:
            between = between or "product of two weights"
        self._record(weight, Use(name, between, by_root, meets_data))

    def _roles(self, weight: _Followed, looked_up: Network) -> dict[int, Role]:
        """Roles at a look-up: the rows are inputs, what they hold are outputs."""
        atoms = looked_up.atoms
        return self._completed(
            weight, _by_root({a: Role.INPUT if a.indexed else Role.OUTPUT for a in atoms})
        )

    def _completed(self, weight: _Followed, by_root: dict[int, Role]) -> dict[int, Role]:
        # An axis that is no longer there was taken one index at a time: by a scan or a slice.
        axes = range(len(self._shapes[weight.network.path]))
        return {axis: by_root.get(axis, Role.BATCH) for axis in axes}

    def _combined(
        self, eqn: Any, side: int, weight: _Followed, rest: Value
    ) -> list[_Followed] | None:
        """The weight behind arithmetic with other weights, entry by entry; None when that is not
        what the equation does. Either way its dense sum is formed here.
        """
        if weight.network.indexed:
            return None  # Looked-up rows are summed as rows; no weight is made dense.
        reason = eqn.primitive.name
        if weight.dense is None:
            self._record(weight, Use(eqn.primitive.name, reason, None, _is_data(rest)))
        shape = tuple(eqn.invars[side].aval.shape)
        alike = [tuple(out.aval.shape) == shape for out in eqn.outvars]
        if _is_data(rest) or alike != [True]:
            return None
        return [_Followed(weight.network, weight.dense or reason)]

    def _record(self, weight: _Followed, use: Use) -> None:
        self._found[weight.network.path].append(use)


def _dense(weight: _Followed, reason: str) -> _Followed:
    return _Followed(weight.network, weight.dense or reason)


def _splits_merged(network: Network, spec: Any) -> bool:
    """Whether a sharding splits an axis of several atoms, which has no sharding of operands."""
    entries = zip(spec, network.axes, strict=False)
    return any(entry is not None and len(group) != 1 for entry, group in entries)


def _by_root(roles: dict[Atom, Role]) -> dict[int, Role]:
    """Roles by axis of the original weight, of which reshapes may have made several atoms."""
    by_root: dict[int, Role] = {}
    for root in {atom.root for atom in roles if atom.root is not None}:
        parts = {atom: role for atom, role in roles.items() if atom.root == root}
        longer = {role for atom, role in parts.items() if atom.size > 1} or set(parts.values())
        by_root[root] = next(role for role in _RANKED if role in longer)
    return by_root


_RANKED = (Role.INPUT, Role.WINDOW, Role.OUTPUT, Role.BATCH)


def _is_data(value: Value) -> bool:
    return value is DATA or any(weight.network.indexed for weight in _weights(value))


def _weights(value: Value) -> tuple[_Followed, ...]:
    return () if isinstance(value, _Data) else value


def _slice_leading(value: Value) -> Value:
    if isinstance(value, _Data):
        return value
    return tuple(
        _Followed(w.network.with_axes(w.network.axes[1:]), w.dense)
        if len(w.network.axes[0]) == 1
        else _Followed(w.network.with_axes(w.network.axes[1:]), w.dense or "scan over merged axes")
        for w in value
    )


def _localised(value: Value, var: Any) -> Value:
    """Inside shard_map axes are as long as a shard."""
    if isinstance(value, _Data):
        return value
    followed = []
    for weight in value:
        axes = []
        for group, length in zip(weight.network.axes, var.aval.shape, strict=True):
            whole = weight.network.with_axes((group,)).shape[0] == length
            axes.append(group if whole else (Atom(length, group[0].root),))
        followed.append(_Followed(weight.network.with_axes(axes), weight.dense))
    return tuple(followed)


def axes_of(found: Iterable[Use], ndim: int) -> Axes | None:
    """The axes of a weight by the use that decides; None when no use is a product or look-up.

    A look-up decides first (a tied embedding is an embedding), then a product with data.
    """
    roles = _decisive(found)
    if roles is None:
        return None
    axes = [
        tuple(axis for axis in range(ndim) if roles.get(axis) in group)
        for group in ((Role.BATCH,), (Role.INPUT, Role.WINDOW), (Role.OUTPUT,))
    ]
    return Axes(*axes)


def window_of(found: Iterable[Use]) -> tuple[int, ...]:
    """Those of a weight's input axes that a convolution slides over."""
    roles = _decisive(found) or {}
    return tuple(sorted(axis for axis, role in roles.items() if role is Role.WINDOW))


def _decisive(found: Iterable[Use]) -> dict[int, Role] | None:
    known = [use for use in found if use.roles is not None]
    return min(known, key=lambda use: _rank(use, known)).roles if known else None


def _rank(use: Use, known: Sequence[Use]) -> tuple[int, bool]:
    if is_lookup(use, known):
        return 0, False
    # Rows looked up only to be multiplied with (one expert per token) leave it to the product.
    return (2 if use.by == "gather" else 1), not use.meets_data


def is_lookup(use: Use, known: Sequence[Use]) -> bool:
    """Whether a use is an embedding's: rows looked up that do not then multiply as matrices."""
    return use.by == "gather" and not any(
        other.by != "gather" and _batch(other) >= _inputs(use) for other in known
    )


def _batch(use: Use) -> set[int]:
    return {axis for axis, role in (use.roles or {}).items() if role is Role.BATCH}


def _inputs(use: Use) -> set[int]:
    return {axis for axis, role in (use.roles or {}).items() if role is Role.INPUT}
