"""Measurements of the curvature methods."""

from workbench.evidence.curvature.measures import MEASURES

__all__ = ["MEASURES"]
