"""Saliencies: what the removal of a weight, a structure or a dimension is thought to cost."""
