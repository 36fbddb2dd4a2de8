"""Allocations: how a sparsity is shared among layers, or chosen so that a speed-up is reached."""
