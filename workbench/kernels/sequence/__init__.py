"""Sequences of different lengths side by side: packing, positions, attention, long convolutions."""
