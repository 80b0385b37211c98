"""The table of `LoraTransform.explain`: every weight, its adapter and how it is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jlora._tree import is_quantized
from jlora.adapters.base import (
    AdapterConfig,
    AdapterLeaf,
    count_trainable_elements,
    get_adapter_leaves,
)
from jlora.interpreter import usage
from jlora.interpreter.eval_jaxpr import TracedCall
from jlora.interpreter.terms import WeightAxes
from jlora.rules import Rules, abstract_adapter, match_rules


class ExplanationRow(NamedTuple):
    """The row of one weight.

    Attributes:
        path: Path of the weight in the parameter tree.
        shape: Shape of the weight.
        dtype: Data type of the weight.
        axes: Roles of its axes; None when it takes part in no product or look-up.
        adapter: Method and rank from the matching rule, or "frozen".
        trainable_params: Number of trainable parameters of its adapter.
        base_params: Number of parameters of the weight.
        factored_uses: Primitives that use it without materializing the adapted weight.
        dense_reasons: Reasons for which other uses materialize the adapted weight.
        quantization: Quantization of the weight; empty for an array.
        bits_per_param: Bits per parameter of a quantized weight, with scales and padding.
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
    """Every weight of a model and how it is computed; `print` formats it as a table.

    Attributes:
        rows: One row per weight, in the order of the tree.
        errors: Errors that `init` raises for the rules, or `apply` for the adapter; often empty.
        shared: Number of trainable parameters of the arrays that weights share, by name.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=4))
        >>> explanation = lora.explain({"w": jnp.ones((6, 5))}, jnp.ones((4, 6)))
        >>> explanation.trainable_params, explanation.rows[0].factored_uses
        (22, ('dot_general',))
        >>> print(str(explanation).splitlines()[-1])
        1 of 1 weights adapted, 22 parameters, 73.33% of the base's.
    """

    rows: tuple[ExplanationRow, ...]
    errors: tuple[str, ...]
    shared: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def trainable_params(self) -> int:
        """Number of trainable parameters of the adapter."""
        return sum(row.trainable_params for row in self.rows) + sum(self.shared.values())

    @property
    def trainable_fraction(self) -> float:
        """Trainable parameters divided by the parameters of the base."""
        return self.trainable_params / max(1, sum(row.base_params for row in self.rows))

    def __str__(self) -> str:
        header = ("weight", "shape", "axes", "adapter", "parameters", "computed")
        cells = [header, *(_format_explanation_row(row) for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(header) - 1)]
        lines = [
            "  ".join(
                [*(cell.ljust(w) for cell, w in zip(row[:-1], widths, strict=True)), row[-1]]
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
        quantized = [row for row in self.rows if row.quantization]
        if quantized:
            num_params = sum(row.base_params for row in quantized)
            bits = sum(row.bits_per_param * row.base_params for row in quantized) / num_params
            lines.append(
                f"{len(quantized)} of {len(self.rows)} weights quantized, {bits:.2f} bits per "
                f"parameter."
            )
        lines.extend(f"refused: {error}" for error in self.errors)
        return "\n".join(lines)


def _format_explanation_row(row: ExplanationRow) -> tuple[str, ...]:
    roles = ""
    if row.axes is not None:
        names = zip(("batch", "in", "out"), row.axes, strict=True)
        roles = " ".join(f"{name} {','.join(map(str, axes))}" for name, axes in names if axes)
    used = ", ".join((*row.factored_uses, *row.dense_reasons)) or "unused"
    if row.adapter != "frozen":
        uses = (("factored: ", row.factored_uses), ("dense: ", row.dense_reasons))
        used = "; ".join(prefix + ", ".join(names) for prefix, names in uses if names)
    return (
        row.path,
        f"{'x'.join(map(str, row.shape)) or 'scalar'} {row.quantization}".rstrip(),
        roles or "-",
        row.adapter,
        f"{row.trainable_params:,}" if row.trainable_params else "-",
        used,
    )


def build_explanation(
    rules: Rules,
    traced: TracedCall,
    find_materialized: Callable[..., set[str]],
    allow_materialize: bool = True,
) -> Explanation:
    """Returns the table for a traced call of the model.

    Args:
        rules: Rules of the transform.
        traced: Traced call of the model.
        find_materialized: `jlora.transform.find_materialized`.
        allow_materialize: Whether adapted weights may be materialized.
    """
    plan = match_rules(rules, traced)
    configs = {weight.path: config for weight, config in plan.adapted}
    # Whether a weight stays factored can depend on which others are adapted: only one of two
    # multiplied weights can.
    weights = {
        index: (traced.flat_params.paths[leaf], tuple(traced.flat_params.leaves[leaf].shape))
        for leaf, index in traced.param_index.items()
        if traced.flat_params.paths[leaf] in configs
    }
    uses = plan.uses | usage.find_weight_uses(traced.program, weights)
    adapter = abstract_adapter(plan)
    try:
        materialized = find_materialized(traced, adapter)
    except ValueError as error:  # LoRAMoE on a weight without a known input.
        plan.errors.append(error)
        materialized = set()
    if materialized and not allow_materialize:
        try:
            find_materialized(traced, adapter, allow_materialize=False)
        except ValueError as error:
            plan.errors.append(error)
    leaves = get_adapter_leaves(adapter)
    rows = []
    for index in traced.param_index:
        path, weight = traced.flat_params.paths[index], traced.flat_params.leaves[index]
        leaf = leaves.get(path)
        reasons = tuple(dict.fromkeys(use.dense_reason for use in uses[path] if use.dense_reason))
        is_full = leaf is not None and leaf.is_full
        if leaf is not None and path not in materialized:
            reasons = ()
        elif is_full:
            reasons = ("fully trained",)
        elif leaf is not None:
            reasons = reasons or ("sliced across the update's axes",)
        elif is_quantized(weight) and path in materialized:
            reasons = reasons or ("sliced across its quantization blocks",)
        factored = [use.primitive for use in uses[path] if use.dense_reason is None and not is_full]
        rows.append(
            ExplanationRow(
                path=path,
                shape=tuple(weight.shape),
                dtype=str(weight.dtype),
                axes=plan.axes[path],
                adapter="frozen" if leaf is None else _describe_adapter(configs[path], leaf),
                trainable_params=0 if leaf is None else count_trainable_elements(leaf),
                base_params=weight.size,
                factored_uses=tuple(dict.fromkeys(factored)),
                dense_reasons=reasons,
                quantization=str(weight) if is_quantized(weight) else "",
                bits_per_param=weight.bits if is_quantized(weight) else 0.0,
            )
        )
    shared = {name: count_trainable_elements(adapter[name]) for name in plan.shared}
    return Explanation(tuple(rows), tuple(map(str, plan.errors)), shared)


def _describe_adapter(config: AdapterConfig, leaf: AdapterLeaf) -> str:
    rank = getattr(config, "rank", None)
    name = type(config).__name__ + (f" rank {rank}" if rank else "")
    return name + (", full-size" if leaf.is_weight_sized and not leaf.is_full else "")
