"""Rotations folded into a model, random or learned."""
