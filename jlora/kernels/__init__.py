"""Kernels for the adapted product on one kind of device, with the plain product as a fallback."""

from __future__ import annotations

from jlora.kernels.lora_matmul import plain_products, products_saveable, tpu_products

__all__ = [
    "plain_products",
    "products_saveable",
    "tpu_products",
]
