"""Speed and memory: one process per measurement, results as JSON."""
