"""Quantised weights: NF4, integers and 8-bit floats, dequantised where they are used."""
