"""Curvature matrices as operators: exact products with vectors over all chosen batches."""
