"""Fused kernels for products with LoRA-adapted weights, with plain JAX products as the fallback.

Products with adapted weights use the kernels by themselves on one NVIDIA GPU of the Hopper
generation, and on one TPU chip inside `tpu_products`. `plain_products` turns them off, and
`products_saveable` is a policy for `jax.checkpoint`.
"""

from __future__ import annotations

from jlora.kernels.lora_matmul import plain_products, products_saveable, tpu_products

__all__ = [
    "plain_products",
    "products_saveable",
    "tpu_products",
]
