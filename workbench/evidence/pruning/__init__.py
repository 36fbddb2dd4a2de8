"""Measurements of the pruning methods."""

from workbench.evidence.pruning.measures import MEASURES

__all__ = ["MEASURES"]
