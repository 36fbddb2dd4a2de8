"""Ways to store a difference: signs, few entries, singular vectors, number formats."""
