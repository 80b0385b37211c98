"""The table that `explain` returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jlora._quantized_array import is_quantized
from jlora.adapters.base import (
    AdapterConfig,
    AdapterLeaf,
    count_trainable_elements,
)
from jlora.interpreter import usage
from jlora.interpreter.eval_jaxpr import TracedCall
from jlora.interpreter.usage import WeightAxes
from jlora.rules import Adapter, Rules, abstract_adapter, match_rules


class ExplanationRow(NamedTuple):
    """One weight.

    Attributes:
        axes: What its axes do; None when it takes part in no product or look-up.
        adapter: The family and rank that a rule gives it, or "frozen".
        trainable_params: How many numbers the adapter trains for it.
        base_params: How many the weight has.
        factored_uses: The primitives that use it without its dense sum.
        dense_reasons: Why, elsewhere, the dense sum is formed.
        quantization: How the weight is quantised; empty where it is an array.
        bits_per_param: That a number of it then takes, scales and padding counted.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: WeightAxes | None
    adapter: str
    trainable_params: int
    base_params: int
    factored_uses: tuple[str, ...]
    dense_reasons: tuple[str, ...]
    quantization: str = ""
    bits_per_param: float = 0.0


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Every weight of a model and how it is computed; `print` shows it as a table.

    Attributes:
        rows: One for each weight, in the order of the tree.
        errors: Why `init` would refuse the rules, or `apply` the adapter; often empty.
        shared: For what several weights share, by name, how many numbers of it are trained.
    """

    rows: tuple[ExplanationRow, ...]
    errors: tuple[str, ...]
    shared: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def trainable_params(self) -> int:
        """How many numbers of the adapter are trained in all."""
        return sum(row.trainable_params for row in self.rows) + sum(self.shared.values())

    @property
    def trainable_fraction(self) -> float:
        """The adapter's numbers over the base's."""
        return self.trainable_params / max(1, sum(row.base_params for row in self.rows))

    def __str__(self) -> str:
        header = ("weight", "shape", "axes", "adapter", "parameters", "computed")
        cells = [header, *(_format_explanation_row(row) for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(header) - 1)]
        lines = [
            "  ".join(
                [*(c.ljust(w) for c, w in zip(row[:-1], widths, strict=True)), row[-1]]
            ).rstrip()
            for row in cells
        ]
        lines.insert(1, "  ".join("-" * width for width in (*widths, len(header[-1]))))
        lines.extend(f"shared as {name!r}: {n:,} parameters" for name, n in self.shared.items())
        adapted = sum(row.adapter != "frozen" for row in self.rows)
        lines.append(
            f"{adapted} of {len(self.rows)} weights adapted, {self.trainable_params:,} parameters, "
            f"{self.trainable_fraction:.2%} of the base's."
        )
        packed = [row for row in self.rows if row.quantization]
        if packed:
            numbers = sum(row.base_params for row in packed)
            bits = sum(row.bits_per_param * row.base_params for row in packed) / numbers
            lines.append(
                f"{len(packed)} of {len(self.rows)} weights quantised, in {bits:.2f} bits a number."
            )
        lines.extend(f"refused: {problem}" for problem in self.errors)
        return "\n".join(lines)


def _format_explanation_row(row: ExplanationRow) -> tuple[str, ...]:
    roles = ""
    if row.axes is not None:
        names = zip(("batch", "in", "out"), row.axes, strict=True)
        roles = " ".join(f"{name} {','.join(map(str, axes))}" for name, axes in names if axes)
    used = ", ".join((*row.factored_uses, *row.dense_reasons)) or "unused"
    if row.adapter != "frozen":
        ways = (("factored: ", row.factored_uses), ("dense: ", row.dense_reasons))
        used = "; ".join(way + ", ".join(by) for way, by in ways if by)
    return (
        row.path,
        f"{'x'.join(map(str, row.shape)) or 'scalar'} {row.quantization}".rstrip(),
        roles or "-",
        row.adapter,
        f"{row.trainable_params:,}" if row.trainable_params else "-",
        used,
    )


def build_explanation(
    rules: Rules, traced: TracedCall, find_materialized: Callable[[TracedCall, Adapter], set[str]]
) -> Explanation:
    """Returns the table of how a model uses its weights.

    Args:
        rules: Rules of the transform.
        traced: Call of the model.
        find_materialized: Function to the paths of the weights that an adapter's evaluation
            materializes.
    """
    plan = match_rules(rules, traced)
    configs = {weight.path: config for weight, config in plan.adapted}
    # What happens to a weight can depend on which others are adapted: of a product of two weights
    # only one can stay factored.
    weights = {
        index: (traced.flat_params.paths[place], tuple(traced.flat_params.leaves[place].shape))
        for place, index in traced.param_index.items()
        if traced.flat_params.paths[place] in configs
    }
    uses = plan.uses | usage.find_weight_uses(traced.program, weights)
    adapter = abstract_adapter(plan)
    try:
        summed = find_materialized(traced, adapter)
    except ValueError as error:  # A mixture where no input is known.
        plan.errors.append(error)
        summed = set()
    rows = []
    for place in traced.param_index:
        path, leaf = traced.flat_params.paths[place], traced.flat_params.leaves[place]
        made = adapter.get(path)
        dense = tuple(dict.fromkeys(use.dense_reason for use in uses[path] if use.dense_reason))
        if made is not None:
            because = "trained whole" if made.is_full else "cut across the update's own axes"
            dense = (dense if not made.is_full and dense else (because,)) if path in summed else ()
        elif is_quantized(leaf) and path in summed:
            dense = dense or ("cut across its blocks",)
        whole = made is not None and made.is_full
        factored = [use.primitive for use in uses[path] if use.dense_reason is None and not whole]
        rows.append(
            ExplanationRow(
                path=path,
                shape=tuple(leaf.shape),
                dtype=str(leaf.dtype),
                axes=plan.axes[path],
                adapter="frozen" if made is None else _describe_adapter(configs[path], made),
                trainable_params=0 if made is None else count_trainable_elements(made),
                base_params=leaf.size,
                factored_uses=tuple(dict.fromkeys(factored)),
                dense_reasons=dense,
                quantization=str(leaf) if is_quantized(leaf) else "",
                bits_per_param=leaf.bits if is_quantized(leaf) else 0.0,
            )
        )
    shared = {name: count_trainable_elements(adapter[name]) for name in plan.shared}
    return Explanation(tuple(rows), tuple(str(problem) for problem in plan.errors), shared)


def _describe_adapter(config: AdapterConfig, leaf: AdapterLeaf) -> str:
    rank = getattr(config, "rank", None)
    name = type(config).__name__ + (f" rank {rank}" if rank else "")
    return name + (", full-size" if leaf.is_weight_sized and not leaf.is_full else "")
