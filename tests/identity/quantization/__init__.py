"""Quantization beside others' code."""
