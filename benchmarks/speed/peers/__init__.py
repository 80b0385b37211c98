"""The training step of `train_step.py` in other libraries, with the same shape and timing."""
