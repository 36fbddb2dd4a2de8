"""Curvature instruments."""
