"""Hugging Face checkpoints: configs, weight names, reading and writing."""

from __future__ import annotations
