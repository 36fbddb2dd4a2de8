"""Measurements of the pruning methods."""
