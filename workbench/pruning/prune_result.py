"""Pictures of a pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel

from workbench.errors import BadInput
from workbench.results import Result, choices

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


TITLES = {
    "sparsity": "Sparsity of each layer",
    "relative_error": "Weight error of each layer",
    "relative_output_error": "Output error of each layer",
    "predicted_change": "Predicted loss change of each layer",
}
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

    def view_model(self) -> type[BaseModel] | None:
        return choices("PruneView", show=self.shows()) if self.shows() else None

    def shows(self) -> tuple[str, ...]:
        """What there is to show, the first by default."""
        columns = () if self.table.empty else tuple(c for c in AXES if c in self.table)
        return columns + tuple(name for name in ("distances", "recovery") if name in self.tables)

    def figure(self, **view: Any) -> go.Figure:
        from workbench.figures import by_layer

        shows = self.shows() or ("sparsity",)
        show = view.get("show", shows[0])
        if show not in shows:
            raise BadInput(f"show: {show!r} is not in this result; give one of {', '.join(shows)}")
        if show == "distances":
            return distance_map(self.tables["distances"])
        if show == "recovery":  # while it runs there is nothing else
            return recovery_curve(self.tables["recovery"])
        method = getattr(self.instrument, "method", "prune")
        return by_layer(
            f"{TITLES[show]}: {method} at {100 * self.facts['sparsity']:.0f} % sparsity",
            self.table["layer"].to_list(),
            {show.replace("_", " "): self.table[show]},
            AXES[show],
            between=(0, 1) if show == "sparsity" else None,
        )


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
