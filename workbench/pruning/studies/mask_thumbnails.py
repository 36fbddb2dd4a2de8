"""Masks as thumbnails: a matrix a cell of the figure, methods below each other, layers beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: Tiles along each side of a thumbnail, at most.
TILES = 48


def tiled(mask: NDArray[np.bool_], tiles: int = TILES) -> NDArray[np.float64]:
    """Share kept in each tile of a mask (out, in): at most `tiles` rows and columns, whose sizes differ by
    one weight at most. A smaller matrix is as it is.
    """
    kept = mask.astype(np.float64)
    for axis in (0, 1):
        size = kept.shape[axis]
        parts = min(size, tiles)
        starts = np.linspace(0, size, parts + 1).astype(np.int64)
        counts = np.diff(starts)
        shape = (-1, 1) if axis == 0 else (1, -1)
        kept = np.add.reduceat(kept, starts[:-1], axis=axis) / counts.reshape(shape)
    return kept


def thumbnails(
    title: str, masks: Mapping[str, Mapping[str, NDArray[np.bool_]]], labels: Sequence[str]
) -> go.Figure:
    """masks : method -> layer -> mask (..., out, in);  labels : of the layers, in their order"""
    from plotly.subplots import make_subplots

    from workbench.figures import figure

    methods = list(masks)
    fig = make_subplots(
        rows=len(methods),
        cols=len(labels),
        column_titles=list(labels),
        row_titles=methods,
        horizontal_spacing=0.02,
        vertical_spacing=0.08 / len(methods),
        figure=figure(title, height=110 + 190 * len(methods)),
    )
    for row, method in enumerate(methods, 1):
        for column, (name, mask) in enumerate(masks[method].items(), 1):
            flat = mask.reshape(-1, mask.shape[-1])
            fig.add_heatmap(
                z=tiled(flat),
                name=f"{method}, {name}",
                coloraxis="coloraxis",
                hovertemplate=f"{method}, {name}: %{{z:.0%}} of this tile is kept<extra></extra>",
                row=row,
                col=column,
            )
    fig.update_xaxes(showticklabels=False, ticks="", showgrid=False)
    fig.update_yaxes(showticklabels=False, ticks="", showgrid=False, autorange="reversed")
    fig.update_annotations(font_size=12)
    bar = dict(title=dict(text="share kept", side="right"), outlinewidth=0, thickness=14, tickformat=".0%")
    fig.update_layout(coloraxis=dict(colorscale="Cividis", cmin=0, cmax=1, colorbar=bar))
    return fig
