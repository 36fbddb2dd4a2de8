"""Optimizers, one file each, and the registry that makes one by name."""
