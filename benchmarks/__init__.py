"""Measurements behind the README's figures; each file runs by itself."""
