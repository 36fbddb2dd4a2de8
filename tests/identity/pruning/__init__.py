"""Pruning beside others' code."""
