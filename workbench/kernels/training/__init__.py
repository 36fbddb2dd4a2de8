"""A training step's memory and traffic: optimizer states, losses in chunks, what is kept for the backward."""
