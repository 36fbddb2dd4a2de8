"""Transforms: invertible changes of coordinates before rounding."""
