"""Measurements of the scaling methods."""

from workbench.evidence.scaling.measures import MEASURES

__all__ = ["MEASURES"]
