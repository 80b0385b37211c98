"""Optimizers for adapters, built on optax."""
