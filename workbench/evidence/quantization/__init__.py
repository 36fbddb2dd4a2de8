"""Measurements of the quantization methods."""

from workbench.evidence.quantization.measures import MEASURES

__all__ = ["MEASURES"]
