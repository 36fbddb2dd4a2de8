"""Training after and between pruning events, and what of a model is trained."""
