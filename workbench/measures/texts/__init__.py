"""Two models on the words of a text: where they differ, and what each says there."""
