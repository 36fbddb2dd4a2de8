"""Quantized activations: layer inputs, keys and values, attention."""
