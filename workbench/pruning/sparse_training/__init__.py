"""Training with masks that stay, move or are learned."""
