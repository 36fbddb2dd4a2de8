"""Block x role: where models that were trained from one base go apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: What the colours show -> its title and its unit.
VALUES = {
    "conflict": ("Where models disagree on the direction", "share of entries"),
    "cosine": ("How alike the models' differences are", "mean cosine"),
    "norm": ("How far the models went", "norm of the difference"),
    "relative": ("How far the models went", "norm of the difference, of the weight's"),
    "cancelled": ("What the mean of the differences loses", "share of their energy"),
}


def conflict_grid(table: pd.DataFrame, value: str, title: str) -> go.Figure:
    """A row a block, a column a tensor's role in it; what lies outside the blocks is a row of its own only
    where there is nothing else.
    """
    from workbench.figures import figure, heat

    inside = table[table["block"] != "outside"]
    shown = inside if len(inside) else table
    numbers = shown["norm"] / shown["base_norm"].replace(0.0, np.nan) if value == "relative" else shown[value]
    rows, columns = list(dict.fromkeys(shown["block"])), list(dict.fromkeys(shown["role"]))
    grid = np.full((len(rows), len(columns)), np.nan)
    for block, role, number in zip(shown["block"], shown["role"], numbers, strict=True):
        grid[rows.index(block), columns.index(role)] = number
    fig = figure(title, "tensor in the block", "block", height=max(320, 160 + 17 * len(rows)))
    fig.update_yaxes(type="category")
    heat(fig, grid, x=columns, y=rows, unit=VALUES[value][1])
    return fig
