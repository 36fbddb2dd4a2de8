"""Models made for training: a transformer with a Lipschitz certificate, and networks that tune themselves."""
