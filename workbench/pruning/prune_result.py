"""Pictures of a pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel

from workbench.results import Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


class PruneView(BaseModel):
    """What the viewer may choose without pruning again."""

    show: Literal[
        "sparsity", "relative_error", "relative_output_error", "predicted_change", "distances", "recovery"
    ] = "sparsity"


AXES = {
    "sparsity": "share of zeros",
    "relative_error": "squared weight error / squared weight",
    "relative_output_error": "squared output error / squared output",
    "predicted_change": "predicted loss change (nats)",
}


class PruneResult(Result):
    """Per-layer bars of sparsity, errors or predicted loss;
    for pruned layers also the angular distance over every run of blocks; the recovery's curve.
    """

    def view_model(self) -> type[BaseModel]:
        return PruneView

    def figure(self, **view: Any) -> go.Figure:
        from workbench.figures import color, figure

        show = PruneView(**view).show
        distances = self.tables.get("distances")
        if show == "distances" and distances is not None:
            return distance_map(distances)
        recovery = self.tables.get("recovery")
        if recovery is not None and (
            show == "recovery" or self.table.empty
        ):  # nothing else is there while the recovery runs
            return recovery_curve(recovery)
        if show not in self.table:
            show = "sparsity"
        title = (
            f"{getattr(self.instrument, 'method', 'prune')} at {100 * self.facts['sparsity']:.0f} % sparsity"
        )
        fig = figure(title, x="layer", y=AXES[show])
        fig.add_bar(x=self.table["layer"], y=self.table[show], marker_color=color(0), name=AXES[show])
        return fig


def recovery_curve(recovery: pd.DataFrame) -> go.Figure:
    """Loss of the training batches over the recovery's steps."""
    from workbench.figures import figure, line

    fig = figure("Recovery", x="step", y="loss of the training batch (nats)")
    line(fig, recovery.step, recovery.loss, "training batch", mode="lines")
    return fig


def distance_map(distances: pd.DataFrame) -> go.Figure:
    """Angular distance between the input of block l and that of block l + n;
    several stacks below one another.
    """
    from workbench.figures import figure, heat

    label = (
        distances["first"].astype(str)
        if distances["stack"].nunique() == 1
        else distances["stack"] + " " + distances["first"].astype(str)
    )
    rows, columns = list(dict.fromkeys(label)), sorted(distances.blocks.unique())
    grid = np.full((len(rows), len(columns)), np.nan)
    for name, n, value in zip(label, distances.blocks, distances.distance, strict=True):
        grid[rows.index(name), columns.index(n)] = value
    fig = figure(
        "Angular distance over runs of blocks",
        x="blocks left out",
        y="first block",
        height=80 + 40 * len(rows),
    )
    heat(fig, grid, [str(n) for n in columns], rows, unit="angle / pi")
    return fig
