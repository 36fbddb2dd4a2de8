"""Pictures of a pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from workbench.instruments import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


class PruneView(BaseModel):
    """What the viewer may choose without pruning again."""

    show: Literal["sparsity", "relative_error", "relative_output_error", "predicted_change"] = "sparsity"


AXES = {
    "sparsity": "share of zeros",
    "relative_error": "squared weight error / squared weight",
    "relative_output_error": "squared output error / squared output",
    "predicted_change": "predicted loss change (nats)",
}


class PruneResult(Result):
    """Per-layer bars of sparsity, errors or predicted loss."""

    def view_model(self) -> type[BaseModel]:
        return PruneView

    def figure(self, **view: Any) -> go.Figure:
        from workbench.figures import color, figure

        show = PruneView(**view).show
        if show not in self.table:
            show = "sparsity"
        title = f"{getattr(self.instrument, 'method', 'prune')} at {100 * self.facts['sparsity']:.0f} % sparsity"
        fig = figure(title, x="layer", y=AXES[show])
        fig.add_bar(x=self.table["layer"], y=self.table[show], marker_color=color(0), name=AXES[show])
        return fig
