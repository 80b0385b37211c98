"""Weights in factored form, flowing through a traced model.

`network` is the form itself, `structure` and `products` are what happens to it at an equation,
`control` enters the equations that hold other programs, `interpreter` runs a model on it and
`probe` finds out how a model uses its weights.
"""
