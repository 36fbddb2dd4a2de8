"""Measurements of the training methods."""
