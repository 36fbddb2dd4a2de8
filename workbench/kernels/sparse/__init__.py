"""Weights that are zero: products that skip them, and what it takes to choose them."""
