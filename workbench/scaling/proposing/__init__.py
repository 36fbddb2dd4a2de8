"""Which runs to make next: points in words, what a run would teach, proposals and their figures."""
