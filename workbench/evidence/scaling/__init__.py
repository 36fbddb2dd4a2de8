"""Measurements of the scaling methods."""

from workbench.evidence.scaling.measures import MEASURES as MEASURES
