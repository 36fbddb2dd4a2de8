"""Batch sizes: rules, noise scale, normalisation over micro-batches, adversarial examples."""
