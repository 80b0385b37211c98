"""Flax models that read and write Hugging Face checkpoints."""

from jlora.models import bert as bert
