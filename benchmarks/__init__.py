"""Measurements of jlora; run each as a module, such as `python -m benchmarks.speed.train_step`."""
