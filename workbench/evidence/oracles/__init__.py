"""Exact answers for a few weights, to judge the approximations by."""
