"""Pictures of a sparse training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from workbench.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


class TrainSparseView(BaseModel):
    """What the viewer may choose without training again."""

    show: Literal["loss", "masks", "layers"] = "loss"


class TrainSparseResult(Result):
    """Loss over the steps, sparsity and movement of the masks, density of each layer."""

    def view_model(self) -> type[BaseModel]:
        return TrainSparseView

    def figure(self, **view: Any) -> go.Figure:
        from workbench.figures import by_layer, figure, line

        show, tables = TrainSparseView(**view).show, self.tables
        method = getattr(self.instrument, "method", "train-sparse")
        if show == "layers" and len(tables.get("layers", ())):
            kept = {"share kept": tables["layers"].density}
            names = tables["layers"].layer.to_list()
            return by_layer(f"What {method} keeps of each layer", names, kept, "share kept", between=(0, 1))
        if show == "masks" and len(tables.get("masks", ())):
            records = tables["masks"]
            fig = figure(f"Masks of {method} over the run", x="step", y="share of the weights")
            line(fig, records.step, records.sparsity, "removed", mode="lines")
            line(fig, records.step, records.moved, "changed since the last look", mode="lines")
            return fig
        fig = figure(f"Training with masks: {method}", x="step", y="loss (nats)")
        if len(self.table):
            line(fig, self.table.step, self.table.loss, "training batch", mode="lines")
            if "validation_loss" in self.table:
                measured = self.table.dropna(subset=["validation_loss"])
                line(fig, measured.step, measured.validation_loss, "validation", mode="lines+markers")
        return fig
