"""Adapter families: one file each, with its config and its leaf."""
