"""One LoRA training step on one H100 80GB: jlora and its peers, measured alike."""
