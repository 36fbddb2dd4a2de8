"""Studies of quantization: where the error comes from, what a matrix looks like."""
