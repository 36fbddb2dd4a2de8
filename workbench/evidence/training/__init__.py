"""Measurements of the training methods."""

from workbench.evidence.training.measures import MEASURES

__all__ = ["MEASURES"]
