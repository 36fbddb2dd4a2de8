"""Growth: width, depth, and the maps of a V-cycle."""
