"""Fine-tuning, from files of text to adapters."""
