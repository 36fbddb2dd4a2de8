"""Allocation of bit widths among layers, and the sensitivities it rests on."""
