"""A jaxpr interpreter that runs a model on factored weights instead of materialized ones.

`factored_array` defines the factored form: a base and a tensor network. `data_movement` transforms
the network where the model transposes, reshapes or slices a weight. `products` lists the primitives
that multiply a weight with an activation; `dot_products` and `conv` implement them with the sums in
`terms`. `control_flow` and `custom_derivatives` handle the equations that contain other programs.
`eval_jaxpr` runs a model, and `usage` finds out how a model uses its weights.
"""

from __future__ import annotations
