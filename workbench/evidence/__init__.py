"""Measurements of the claims on the method cards; nothing but the command line imports this."""
