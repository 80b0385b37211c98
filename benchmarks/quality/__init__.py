"""Accuracy of the adapter methods on the same task."""
