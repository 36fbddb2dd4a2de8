"""Examples of a split: what they are, and others in their place."""
