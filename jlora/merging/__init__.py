"""Adapters merged into their base, with what rounding leaves of them."""
