"""Numbers: formats, grids, packed storage, and the change that puts them on a weight."""
