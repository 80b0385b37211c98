"""Quantised weights: 4-bit NormalFloat, integers and 8-bit floats, dequantised where they are used."""
