"""How each primitive treats adapted weights: the dispatch table, and the kinds of rules in it.

A rule is one of three kinds, all with the same `evaluate(context, eqn, values)`:

* `MovementRule`: the primitive moves entries of a weight (transpose, slice, gather);
* `ProductRule`: it multiplies a weight with an activation (dot_general, convolution);
* `SubProgramRule`: it runs other programs (scan, cond, remat, shard_map), or users registered a
  function of simpler operations in its place.

A primitive without a rule, or whose rule gives up, gets the materialized weight.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jlora.interpreter import _compat
from jlora.interpreter.factored_array import DeferredArray, FactoredArray, bind_on_bases
from jlora.interpreter.terms import (
    Axis,
    Operand,
    Term,
    WeightProduct,
    arrange,
    flat_size,
    reshape,
    widest_dtype,
)

# --- evaluation -----------------------------------------------------------------------------------


class EvalContext:
    """One evaluation of a traced program.

    Attributes:
        losses: Auxiliary losses of the terms that were evaluated.
        materialized: Paths of the adapted weights that were materialized.
        allow_materialize: Whether a weight may be materialized.
        token_mask: Mask of the tokens that count for losses and statistics; None: all.
    """

    def __init__(
        self,
        evaluate: Callable[[EvalContext, _compat.TracedProgram, Sequence[Any]], list[Any]],
        *,
        allow_materialize: bool = True,
        materialized: list[str] | None = None,
        token_mask: jax.Array | None = None,
    ) -> None:
        self.token_mask = token_mask
        self._evaluate = evaluate
        self.allow_materialize = allow_materialize
        self.losses: list[jax.Array] = []
        self.materialized = [] if materialized is None else materialized

    def evaluate(self, program: _compat.TracedProgram, inputs: Sequence[Any]) -> list[Any]:
        """Returns the outputs of a program on arrays and factored weights."""
        return self._evaluate(self, program, inputs)

    def nested(self) -> EvalContext:
        """Returns a context for a program inside a scan, a checkpoint or a shard_map.

        Its losses are values of that program, which has to return them.
        """
        return EvalContext(
            self._evaluate,
            allow_materialize=self.allow_materialize,
            materialized=self.materialized,
            token_mask=self.token_mask,
        )

    def materialize(self, value: Any, used_by: str = "") -> Any:
        """Returns a value as an array.

        Raises:
            ValueError: It is an adapted weight, and those must not be materialized.
        """
        if not isinstance(value, FactoredArray):
            return value
        self.note_materialized(value, used_by)
        return value.materialize()

    def note_materialized(self, weight: FactoredArray, used_by: str) -> None:
        if weight.is_gathered:
            return
        if weight.is_adapted and not self.allow_materialize:
            raise ValueError(
                f"The adapted weight {weight.path!r} would be materialized for {used_by}, and "
                f"allow_materialize=False forbids it. Leave the weight out of the rules, allow it, "
                f"or register a rule for a primitive of your own (jlora.register_rule); "
                f"lora.explain shows each use."
            )
        self.materialized.append(weight.path)


class Rule(abc.ABC):
    """The treatment of one primitive."""

    @abc.abstractmethod
    def evaluate(self, context: EvalContext, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
        """Returns the outputs of an equation, arrays or factored weights.

        None where the weights have to be materialized.
        """


RULES: dict[str, Rule] = {}


# --- movements ------------------------------------------------------------------------------------

OptionalWeights = Sequence[FactoredArray | None]
MoveFn = Callable[[Any, OptionalWeights, Sequence[Any]], Sequence[FactoredArray | None] | None]


class MovementRule(Rule):
    """A primitive that moves entries.

    Args:
        move: `(eqn, weights, values)` to the outputs without their bases. `weights` has None for
            plain arrays. None where the operands cannot be moved alike.
    """

    def __init__(self, move: MoveFn) -> None:
        self._move = move

    def move(
        self, eqn: Any, weights: OptionalWeights, values: Sequence[Any]
    ) -> Sequence[FactoredArray | None] | None:
        """Returns the result of the function; None too where a symbolic length would decide."""
        try:
            return self._move(eqn, weights, values)
        except jax.errors.InconclusiveDimensionOperation:
            return None

    def evaluate(self, context: EvalContext, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
        del context
        weights = [value if isinstance(value, FactoredArray) else None for value in values]
        moved = self.move(eqn, weights, values)
        if moved is None:
            return None
        outputs = bind_on_bases(eqn, [get_base(value) for value in values])
        return [
            output if weight is None else weight.with_base(output)
            for output, weight in zip(outputs, moved, strict=True)
        ]


def movement_rule(*primitives: str) -> Callable[[MoveFn], MoveFn]:
    """Registers a function as the rule of primitives that move entries."""

    def register(move: MoveFn) -> MoveFn:
        RULES.update(dict.fromkeys(primitives, MovementRule(move)))
        return move

    return register


def get_base(value: Any) -> Any:
    return value.base if isinstance(value, FactoredArray) else value


# --- products -------------------------------------------------------------------------------------


class AxisRole(enum.Enum):
    """The part that an axis of a weight has in a product."""

    INPUT = "input"  # Contracted with the activation.
    WINDOW = "window"  # Contracted too, while a convolution slides over it.
    OUTPUT = "output"  # Appears in the result.
    BATCH = "batch"  # Pairs off with an axis of the activation: one matrix for each index.


AxisRoles = dict[Axis, AxisRole]


class DenseReason(str):
    """The reason why a use of a weight needs it materialized."""


class ProductRule(Rule):
    """A primitive that multiplies a weight with an activation.

    Attributes:
        axis_roles: `(eqn, side, weight)` to the role of each axis of the weight, which is input
            `side` of the equation, or to the reason why the product needs it materialized.
        make_product: `(eqn, side, weight, values)` to the product and its activation.
    """

    def __init__(
        self,
        axis_roles: Callable[[Any, int, FactoredArray], AxisRoles | DenseReason],
        make_product: Callable[[Any, int, FactoredArray, Sequence[Any]], tuple[WeightProduct, Any]],
    ) -> None:
        self.axis_roles = axis_roles
        self.make_product = make_product

    def evaluate(self, context: EvalContext, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
        sides = [i for i, value in enumerate(values) if isinstance(value, FactoredArray)]
        # Looked-up rows are an activation beside a weight.
        side = min(sides, key=lambda i: values[i].is_gathered)
        weight: FactoredArray = values[side]
        roles = self.axis_roles(eqn, side, weight)
        if isinstance(roles, DenseReason) or has_mixed_gain(weight, roles):
            return None
        values = [
            value if i == side else context.materialize(value, eqn.primitive.name)
            for i, value in enumerate(values)
        ]
        product, x = self.make_product(eqn, side, weight, values)
        return [multiply_weight(context, product, x, weight)]


def multiply_weight(
    context: EvalContext, product: WeightProduct, x: Any, weight: FactoredArray
) -> Any:
    """Returns `gains * (x W + sum of x terms)`, x (..., d) and the result (..., k) for W (d, k)."""
    if context.token_mask is not None:
        terms = tuple(term.with_token_mask(context.token_mask) for term in weight.terms)
        weight = dataclasses.replace(weight, terms=terms)
    for term in weight.terms:
        x = term.prepare_input(x, product)
    out_axes = set(product.out_axes)
    gains = [product.label_gain(gain) for gain in weight.gains]
    for gain in gains:  # A gain along inputs is a factor on the activation.
        if not out_axes.issuperset(gain.axes):
            x = scale_activation(x, gain, product.x_groups)
    result = product.multiply_fused(x, weight)
    if result is None:
        result, losses = _add_products(product, x, weight)
        context.losses.extend(losses)
    for gain in gains:
        if out_axes.issuperset(gain.axes):
            result = scale_activation(result, gain, product.out_groups)
    return result


def _add_products(
    product: WeightProduct, x: Any, weight: FactoredArray
) -> tuple[Any, list[jax.Array]]:
    """Returns `x W + sum of x terms`, and auxiliary losses.

    The layers of a model have the same products. Each kind of product is traced, differentiated and
    lowered once, as a function under `jax.jit`.
    """
    key = product.trace_key()
    if key is None or isinstance(weight.base, DeferredArray):
        return _trace_products(product, x, weight.base, weight.terms)
    numbered: dict[Axis, Axis] = {}

    def renumber(axes: Sequence[Axis]) -> tuple[Axis, ...]:
        return tuple(numbered.setdefault(a, _numbered_axis(len(numbered), a)) for a in axes)

    def renumber_term(term: Term) -> Term:
        term = term.map(lambda o: Operand(o.array, renumber(o.axes)))
        # Such as the axis of the experts, which is a field of its own.
        fields = {f.name: getattr(term, f.name) for f in dataclasses.fields(term)}  # type: ignore
        axes = {name: renumber([a])[0] for name, a in fields.items() if isinstance(a, Axis)}
        return dataclasses.replace(term, **axes)  # type: ignore

    groups = tuple(renumber(group) for group in weight.axis_groups)
    terms = tuple(map(renumber_term, weight.terms))
    arrays, treedef = jax.tree.flatten(weight.terms)
    call = _ProductCall((key, groups, jax.tree.structure(terms)), product, treedef)
    return _lora_product(call, x, weight.base, arrays)


def _numbered_axis(number: int, axis: Axis) -> Axis:
    """Returns an axis that takes the place of all axes of this number, length and role."""
    return _make_numbered_axis(number, axis.size, axis.weight_axis, axis.is_gathered)


@functools.cache
def _make_numbered_axis(number: int, *fields: Any) -> Axis:
    del number
    return Axis(*fields)


@dataclasses.dataclass(frozen=True)
class _ProductCall:
    """A product and its terms without arrays, equal to another one that is traced alike."""

    key: Hashable
    product: WeightProduct = dataclasses.field(compare=False)
    terms_treedef: Any = dataclasses.field(compare=False)


@functools.partial(jax.jit, static_argnums=0)
def _lora_product(
    call: _ProductCall, x: Any, base: Any, arrays: Sequence[Any]
) -> tuple[Any, list[jax.Array]]:
    return _trace_products(call.product, x, base, jax.tree.unflatten(call.terms_treedef, arrays))


def _trace_products(
    product: WeightProduct, x: Any, base: Any, terms: Sequence[Term]
) -> tuple[Any, list[jax.Array]]:
    result, losses = product.multiply_base(x, base), []
    for term in terms:
        result, term_losses = term.add_product(result, x, product)
        losses.extend(term_losses)
    return result, losses


def has_mixed_gain(weight: FactoredArray, roles: AxisRoles) -> bool:
    """Returns whether neither activation nor result can be scaled by one of the gains.

    That is one that runs along inputs and outputs, or along a window.
    """
    for gain in weight.gains:
        along = {roles[axis] for axis in gain.axes} - {AxisRole.BATCH}
        if along - {AxisRole.OUTPUT} and along - {AxisRole.INPUT}:
            return True
    return False


# A gain nearer to zero is replaced by this, so that a product can be divided by it.
_MIN_GAIN = 2.0**-60


def scale_activation(array: Any, gain: Operand, groups: Sequence[tuple[Axis, ...]]) -> Any:
    """Returns an activation with dimensions of these groups, times a gain along some of them.

    The product is computed in float32 or wider: a gain that differs little from one would be one in
    a narrow type.
    """
    along = [group for group in groups if set(group) & set(gain.axes)]
    factor = arrange(gain, [axis for group in along for axis in group])
    factor = reshape(factor, [flat_size(group) if group in along else 1 for group in groups])
    factor = factor.astype(widest_dtype(array.dtype, jnp.float32))
    if jnp.finfo(array.dtype).tiny > _MIN_GAIN:
        return (array.astype(factor.dtype) * factor).astype(array.dtype)
    nearest = jnp.where(factor < 0, -_MIN_GAIN, _MIN_GAIN)
    shift = jnp.where(jnp.abs(factor) < _MIN_GAIN, nearest - factor, 0)
    return _multiply_by_gain(array, factor + jax.lax.stop_gradient(shift))


@jax.custom_jvp
def _multiply_by_gain(array: Any, factor: Any) -> Any:
    """Returns the array times a factor of a type that is no narrower."""
    return (array.astype(factor.dtype) * factor).astype(array.dtype)


def _multiply_by_gain_jvp(primals: Any, tangents: Any) -> Any:
    array, factor = primals
    array_tangent, factor_tangent = tangents
    result = _multiply_by_gain(array, factor)
    total = None
    if not isinstance(array_tangent, SymbolicZero):
        total = _multiply_by_gain(array_tangent, factor)
    if not isinstance(factor_tangent, SymbolicZero):
        part = _gain_tangent(result, factor, factor_tangent)
        total = part if total is None else total + part
    return result, total


_multiply_by_gain.defjvp(_multiply_by_gain_jvp, symbolic_zeros=True)


def _gain_tangent(result: Any, factor: Any, factor_tangent: Any) -> Any:
    """Returns the change of a product with the change of its factor, from the product itself.

    The product is kept for the gradient of the next operation anyway, so a step need not keep the
    activation too. Only second derivatives lose by it: as many digits as the factor is below one.
    """

    def compute(result: Any, factor: Any, factor_tangent: Any) -> Any:
        return (result.astype(factor.dtype) * (factor_tangent / factor)).astype(result.dtype)

    # The arguments are kept for the gradient, and nothing wider that is made from them.
    return jax.checkpoint(compute, prevent_cse=False)(result, factor, factor_tangent)


def product_dtype(x: Any, base: Any, result: Any) -> Any:
    """Returns the type to multiply terms in.

    That is the operands' own, unless they differ or have 8 bits, which are scaled for the base and
    not for the factors.
    """
    if x.dtype == base.dtype and x.dtype.itemsize > 1:
        return x.dtype
    if min(x.dtype.itemsize, base.dtype.itemsize) > 1:
        return max((x.dtype, base.dtype), key=lambda dtype: dtype.itemsize)
    return result.dtype


# --- programs inside equations --------------------------------------------------------------------


class SubProgram(NamedTuple):
    """A program that an equation runs, for the analysis of uses.

    Attributes:
        program: The program.
        eqn_inputs: For each of its inputs, the number of the equation's input.
        scanned_inputs: Inputs of the equation that it sees one leading index at a time.
        carry_unchanged: Inputs of the program that a loop carries, and whether they stay the same.
        materialized_inputs: Inputs of the equation whose weights are materialized on the way in.
        returns_outputs: Whether its outputs are those of the equation.
    """

    program: _compat.TracedProgram
    eqn_inputs: Sequence[int]
    scanned_inputs: frozenset[int] = frozenset()
    carry_unchanged: Mapping[int, bool] = types.MappingProxyType({})
    materialized_inputs: frozenset[int] = frozenset()
    returns_outputs: bool = False


@dataclasses.dataclass(frozen=True)
class SubProgramRule(Rule):
    """A primitive that runs other programs.

    Attributes:
        get_subprograms: The programs of an equation.
        run: The evaluation, with the signature of `Rule.evaluate`.
        get_forwarded: Number of the input that an output of an equation is, unchanged, by the
            number of the output. `run` may return None for these.
    """

    get_subprograms: Callable[[Any], list[SubProgram]]
    run: Callable[[EvalContext, Any, Sequence[Any]], list[Any] | None]
    get_forwarded: Callable[[Any], dict[int, int]] = lambda eqn: {}

    def evaluate(self, context: EvalContext, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
        outputs = self.run(context, eqn, values)
        if outputs is None:
            return None
        forwarded = self.get_forwarded(eqn)
        return [
            values[forwarded[i]] if output is None else output for i, output in enumerate(outputs)
        ]


def single_body(param_name: str) -> Callable[[Any], list[SubProgram]]:
    """Returns `get_subprograms` of an equation that runs the program of one parameter."""

    def get_subprograms(eqn: Any) -> list[SubProgram]:
        program = _compat.program_from_jaxpr(eqn.params[param_name])
        return [SubProgram(program, range(len(eqn.invars)), returns_outputs=True)]

    return get_subprograms


def find_forwarded(program: _compat.TracedProgram) -> dict[int, int]:
    """Finds the outputs of a program that are one of its inputs, unchanged.

    Programs return their weights when the model is an NNX module under `nnx.scan` or `nnx.remat`,
    which returns the variables of the module too.

    Returns:
        The number of the input by the number of the output.
    """
    inputs = {var: i for i, var in enumerate(program.inputs)}
    sources = {
        var: (eqn, rule, i)
        for eqn in program.jaxpr.eqns
        if isinstance(rule := RULES.get(eqn.primitive.name), SubProgramRule)
        for i, var in enumerate(eqn.outvars)
    }
    forwarded = {}
    for number, atom in enumerate(program.outputs):
        while not _compat.is_literal(atom) and atom in sources:
            eqn, rule, i = sources[atom]
            source = rule.get_forwarded(eqn).get(i)
            if source is None:
                break
            atom = eqn.invars[source]
        if not _compat.is_literal(atom) and atom in inputs:
            forwarded[number] = inputs[atom]
    return forwarded


def find_forwarded_by_body(param_name: str) -> Callable[[Any], dict[int, int]]:
    """Returns `get_forwarded` of an equation that runs the program of one parameter."""
    return lambda eqn: find_forwarded(_compat.program_from_jaxpr(eqn.params[param_name]))


_user_rules: set[str] = set()


def register_rule(primitive: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of simpler operations as the rule of a primitive.

    Where an adapted weight meets the primitive, the function is traced and evaluated in its place.
    The weight stays factored if it does in the function's operations, and gradients are those of
    the function. Equations that no adapted weight reaches still run the primitive.

    Args:
        primitive: A `jax.extend.core.Primitive`, or its name.

    Returns:
        A decorator for a function `fn(*inputs, **params)` of the primitive's inputs and parameters.
        It returns the primitive's output, or a list of them.

    Raises:
        TypeError: `primitive` is neither a primitive nor a name, or the rule is not a function.
        ValueError: jlora itself has a rule for the primitive.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jax.extend.core import Primitive
        >>> matmul = Primitive("my_matmul")  # Such as the call of a kernel.
        >>> _ = matmul.def_impl(lambda x, w: x @ w)
        >>> _ = matmul.def_abstract_eval(lambda x, w: jax.core.ShapedArray((3, 5), x.dtype))
        >>> @jlora.register_rule(matmul)
        ... def my_matmul(x, w):
        ...     return x @ w
        >>> lora = jlora.lora_transform(lambda w, x: matmul.bind(x, w), jlora.LoRA(rank=2, alpha=4))
        >>> w, x = jnp.ones((4, 5)), jnp.ones((3, 4))
        >>> lora.apply(w, lora.init(jax.random.key(0), w, x), x).shape
        (3, 5)
    """
    name = primitive if isinstance(primitive, str) else getattr(primitive, "name", None)
    if not isinstance(name, str):
        raise TypeError(
            f"primitive={primitive!r} must be a jax.extend.core.Primitive or its name, such as "
            f"'my_matmul'."
        )
    if name in RULES and name not in _user_rules:
        raise ValueError(
            f"jlora has a rule for the primitive {name!r}, which cannot be replaced. Give your own "
            f"primitive another name."
        )

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        if not callable(fn):
            raise TypeError(
                f"The rule of the primitive {name!r} must be a function of its inputs and "
                f"parameters, got {fn!r}."
            )

        def get_program(eqn: Any) -> _compat.TracedProgram:
            shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
            program = _compat.trace_program(
                lambda *inputs: jax.tree.leaves(fn(*inputs, **eqn.params)), *shapes
            )
            returned, expected = (
                [(v.aval.shape, v.aval.dtype) for v in outputs]
                for outputs in (program.outputs, eqn.outvars)
            )
            if returned != expected:
                raise ValueError(
                    f"The rule of the primitive {name!r} returned outputs of the shapes and types "
                    f"{_format_outputs(returned)}; the primitive has {_format_outputs(expected)}. "
                    f"Return its output, or a list of its outputs, from {fn!r}."
                )
            return program

        def get_subprograms(eqn: Any) -> list[SubProgram]:
            return [SubProgram(get_program(eqn), range(len(eqn.invars)), returns_outputs=True)]

        def run(context: EvalContext, eqn: Any, values: Sequence[Any]) -> list[Any]:
            return context.evaluate(get_program(eqn), values)

        RULES[name] = SubProgramRule(get_subprograms, run)
        _user_rules.add(name)
        return fn

    return register


def _format_outputs(outputs: Sequence[tuple[tuple[int, ...], Any]]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in outputs)
