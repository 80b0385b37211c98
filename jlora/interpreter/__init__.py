"""An interpreter of jaxprs that runs a model on factored weights instead of materialized ones.

`factored_array` defines an adapted weight: a base, and the gains and `terms` beside it.
`primitive_rules` has the table of rules, one for each primitive, and the kinds of rules in it:
`data_movement` moves the operands of the terms where the model transposes, reshapes or slices a
weight; `dot_products` and `conv` multiply with them; `control_flow` and `custom_derivatives` enter
the programs inside equations. `eval_jaxpr` runs a model, and `usage` finds out how a model uses its
weights.
"""

from __future__ import annotations

from jlora.interpreter import (  # noqa: F401  The modules register their rules.
    control_flow,
    conv,
    custom_derivatives,
    data_movement,
    dot_products,
)
from jlora.interpreter.primitive_rules import register_rule

__all__ = ["register_rule"]
