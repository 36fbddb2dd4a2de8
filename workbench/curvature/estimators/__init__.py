"""Estimates from products with a curvature operator: eigenpairs, densities, traces,
predicted loss changes.
"""
