"""Command line of jlora: training, planning, search, inspection, merging, export, generation."""

from __future__ import annotations

from jlora.cli.main import main

__all__ = [
    "main",
]
