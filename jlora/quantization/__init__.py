"""Weight quantization: NF4, integers and 8-bit floats, dequantized on use, and LoftQ."""

from __future__ import annotations

from jlora.quantization.loftq import loftq
from jlora.quantization.qarray import QArray
from jlora.quantization.quantize import (
    QuantizationSummary,
    dequantize,
    quantization_summary,
    quantize,
)
from jlora.quantization.schemes import FP8, NF4, SCHEMES, Int4, Int8, QuantizationScheme

__all__ = [
    "FP8",
    "NF4",
    "SCHEMES",
    "Int4",
    "Int8",
    "QArray",
    "QuantizationScheme",
    "QuantizationSummary",
    "dequantize",
    "loftq",
    "quantization_summary",
    "quantize",
]
