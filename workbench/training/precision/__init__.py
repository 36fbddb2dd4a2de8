"""Precisions of the forward and backward pass."""
