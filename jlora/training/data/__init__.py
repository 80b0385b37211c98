"""Data of fine-tuning: rows to batches, on the host alone."""
