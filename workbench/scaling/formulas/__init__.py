"""Scaling laws as formulas: their language, their compiled programs, and the book of published ones."""
