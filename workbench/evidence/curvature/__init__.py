"""Measurements of the curvature methods."""
