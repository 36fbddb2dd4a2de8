"""A model's anatomy: heads, neurons, channels, layers and experts, and how they are taken out."""
