"""What `merge` returns: the path, and where the models disagree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field

from workbench.arithmetic.conflict_grid import VALUES, conflict_grid
from workbench.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


class MergeView(BaseModel):
    """What the viewer may choose without merging again."""

    show: Literal["path", "conflicts"] = Field("path", description="losses along the path, or block by block")
    value: Literal["conflict", "cosine", "norm", "relative", "cancelled"] = Field(
        "conflict", description="what the blocks' colours show"
    )


class MergeResult(Result):
    """A row a point of the path, and one for the base and each parent; the merged model is `.subject`."""

    def view_model(self) -> type[BaseModel]:
        return MergeView

    def figure(self, **view: Any) -> go.Figure:
        chosen = MergeView(**view)
        if chosen.show == "conflicts":
            title = f"{VALUES[chosen.value][0]}, {self.facts['models']} models"
            return conflict_grid(self.tables["conflicts"], chosen.value, title)
        return self.path()

    def path(self) -> go.Figure:
        from workbench.figures import figure, line, rule

        merges = self.table[self.table["kind"] == "merge"]
        ends = self.table[self.table["kind"] != "merge"]
        method = self.facts["method"]
        if len(merges) == 1:
            fig = figure(f"{method} beside its parents", "model", "loss on validation (nats)")
            names = [*ends["model"], method]
            fig.add_bar(x=names, y=self.table["loss"], name="loss on validation")
            return fig
        fig = figure(f"{method}: the path", "strength", "loss on validation (nats)")
        for density, path in merges.groupby("density", dropna=False):
            name = method if pd.isna(density) else f"density {float(str(density)):g}"
            line(fig, path["strength"].to_numpy(), path["loss"].to_numpy(), name, mode="lines+markers")
        best = merges[merges["chosen"]]
        fig.add_scatter(
            x=best["strength"],
            y=best["loss"],
            mode="markers",
            marker=dict(symbol="circle-open", size=16, color="#808080", line=dict(width=2)),
            name="chosen",
        )
        parents = ends["loss"][ends["kind"] == "parent"]
        rule(fig, "best parent", y=float(np.min(parents)))
        return fig
