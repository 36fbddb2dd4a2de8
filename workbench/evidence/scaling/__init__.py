"""Measurements of the scaling methods."""
