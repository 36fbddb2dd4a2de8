"""What the key of a stored result is made of, besides the instrument's fields."""
