"""Weights in factored form, flowing through a traced model.

`network` is the form itself. `structure` moves its entries about; `products` lists where it meets
an activation (`dots`, `ragged`, `convolutions`, each by the `roles` of its axes and the `terms`
that it adds). `control` enters the equations that hold other programs, `interpreter` runs a model
on it and `probe` finds out how a model uses its weights.
"""

from __future__ import annotations
