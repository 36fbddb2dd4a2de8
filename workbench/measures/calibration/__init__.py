"""How much calibration data a method needs, and how closely it fits the domain that the data is of."""
