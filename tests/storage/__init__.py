"""Writing, reading and clearing what is kept on disk."""
