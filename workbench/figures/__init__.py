"""Figures: the look that all of them share (`look`), and one way to draw layers (`layers`)."""

from workbench.figures.layers import by_layer, grid_of_layers, short_names
from workbench.figures.look import (
    COLORS,
    DASHES,
    FONT,
    MARKERS,
    MAX_POINTS,
    NEUTRAL_GRID,
    NEUTRAL_INK,
    TEMPLATE,
    color,
    figure,
    heat,
    line,
    points,
    rule,
    table_figure,
    thin,
)

__all__ = [
    "COLORS",
    "DASHES",
    "FONT",
    "MARKERS",
    "MAX_POINTS",
    "NEUTRAL_GRID",
    "NEUTRAL_INK",
    "TEMPLATE",
    "by_layer",
    "color",
    "figure",
    "grid_of_layers",
    "heat",
    "line",
    "points",
    "rule",
    "short_names",
    "table_figure",
    "thin",
]
