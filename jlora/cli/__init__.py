"""The command line: training, merging, what files hold, checkpoints in other formats, text."""

from __future__ import annotations

from jlora.cli.main import main

__all__ = [
    "main",
]
