"""Merges, stored differences and growth beside others' code."""
