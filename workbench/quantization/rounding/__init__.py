"""Roundings: how a weight chooses its grid point, by a closed form, a solver or a descent."""
