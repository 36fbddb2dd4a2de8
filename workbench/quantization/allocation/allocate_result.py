"""What an allocation shows: the front, the widths, and the strategies of one size beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from workbench.quantization.allocation.allocation_scores import ScoredResult
from workbench.results import choices

if TYPE_CHECKING:
    import plotly.graph_objects as go


class AllocateResult(ScoredResult):
    """The Pareto front, the chosen widths and the compared strategies."""

    scores: ClassVar[str] = "sensitivity"

    def figure(self, view: str = "front", **more: Any) -> go.Figure:
        from workbench.figures import by_layer, figure, line, points

        if view == "widths":
            widths = self.tables["widths"]
            wide = widths.pivot(index="layer", columns="strategy", values="width")
            names = list(dict.fromkeys(widths["layer"]))
            given = {str(s): wide[s].loc[names] for s in dict.fromkeys(widths["strategy"])}
            ends = (0.0, float(widths["width"].max()))
            return by_layer("Width of each layer", names, given, "bits", between=ends)
        if view == "strategies":
            fig = figure("Loss at one size", "strategy", "test loss (nats)")
            points(fig, self.table["strategy"].to_numpy(), self.table["loss"].to_numpy(), "measured")
            return fig
        if view == "distances":
            return self.distances()
        found = self.tables["front"]
        bits, words = "average_bits", "bits a weight, scales and zero points counted"
        if getattr(self.instrument, "average", "weights") != "weights" or "code_bits" not in found:
            bits, words = self.widths_column, "average bits of the codes"
        fig = figure(
            "Predicted cost of the best allocation for each size",
            words,
            "predicted loss change (nats)",
            yaxis_type="log",
        )
        line(fig, found[bits].to_numpy(), found["cost"].to_numpy(), "optimum of the integer program")
        points(
            fig,
            self.table[bits].to_numpy(),
            self.table["cost"].to_numpy(),
            "strategies",
            text=list(self.table["strategy"]),
        )
        return fig

    def distances(self) -> go.Figure:
        """Measured divergence of every strategy with its interval, and what was predicted."""
        from workbench.figures import figure, points

        name = self.measure
        unit = "KL (nats)" if name == "kl" else name or "test loss (nats)"
        fig = figure("Divergence from the dense model at one size", "strategy", unit)
        strategies, values = self.table["strategy"].to_numpy(), self.table[name or "loss"].to_numpy()
        points(fig, strategies, values, "measured")
        if name and f"{name}_low" in self.table:
            fig.data[-1].error_y = {
                "type": "data",
                "symmetric": False,
                "array": (self.table[f"{name}_high"] - self.table[name]).to_numpy(),
                "arrayminus": (self.table[name] - self.table[f"{name}_low"]).to_numpy(),
            }
        if name and "scored" in self.tables and self.problem().unit == name:
            points(fig, strategies, self.table["cost"].to_numpy(), "predicted")
        return fig

    @property
    def measure(self) -> str:
        """The column of the measured distance to the dense model; "" where there is none."""
        return next((name for name in ("kl", "distance") if name in self.table), "")

    def view_model(self) -> type[BaseModel] | None:
        return choices("AllocateView", view=("front", "widths", "strategies", "distances"))

    @property
    def compared(self) -> bool:
        """Whether the rivals of the same size were measured too."""
        begin = {str(name).split(" ")[0] for name in self.table["strategy"]}
        return {"uniform", "random", "reversed"} <= begin


UNCOMPARED = (
    "draws: this allocation was not measured beside uniform, random and reversed ones of its size, so nobody "
    "knows what it is worth, and it is not saved; run it with draws 1 or more, to the end"
)
