"""Solvers of the pruning problem: what to remove and how the survivors answer,
from second moments or a Fisher matrix.
"""
