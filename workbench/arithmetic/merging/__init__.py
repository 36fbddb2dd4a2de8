"""Merges: averages, sums of differences, soups, means weighed by curvature."""
