"""What a quantization shows: errors by layer as bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, create_model

from workbench.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


def choices(name: str, **fields: tuple[str, ...]) -> type[BaseModel]:
    """A pydantic model with one choice a field, the first being the default:
    the view settings of a result.
    """
    return create_model(name, **{k: (Literal[v], Field(v[0], description=k)) for k, v in fields.items()})  # type: ignore[call-overload]


def short_names(fig: go.Figure, names: Sequence[str]) -> None:
    """Layers along the x axis in this order, their labels without the parts of the name that all of them
    begin with.
    """
    parts = [name.split(".") for name in names]
    same = 0
    while parts and all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    fig.update_xaxes(
        type="category",
        categoryorder="array",
        categoryarray=list(names),
        tickvals=list(names),
        ticktext=[".".join(p[same:]) for p in parts],
    )


class QuantizeResult(Result):
    """Per-layer errors as bars; the quantized model is `.subject`."""

    def figure(
        self, column: str = "output_error", sort: str = "model order", only: str = "", **view: Any
    ) -> go.Figure:
        """Bars by layer. sort : "model order" or "largest first";
        only : layers whose name holds this text.
        """
        from workbench.figures import color, figure

        table = self.table if sort == "model order" else self.table.sort_values(column, ascending=False)
        table = table[table["layer"].str.contains(only, case=False, regex=False)]
        if column == "predicted_change":
            title, unit = "Predicted loss change of each layer alone", "nats"
        else:
            words = {"sqnr": "Signal to quantization noise", "bits": "Bits a weight"}.get(
                column, column.replace("_", " ").capitalize()
            )
            title = f"{words} of each layer"
            unit = {"sqnr": "dB", "bits": "bits"}.get(column, "share of energy")
        title += "" if len(table) else f": no layer's name holds {only!r}"
        fig = figure(title, "layer", unit, yaxis_type="log" if column.endswith("error") else "linear")
        fig.add_bar(
            x=table["layer"].to_numpy(),
            y=table[column].to_numpy(),
            name=column.replace("_", " "),
            marker_color=color(0),
        )
        short_names(fig, [str(name) for name in table["layer"]])
        return fig

    def view_model(self) -> type[BaseModel] | None:
        columns = tuple(
            c for c in ("output_error", "weight_error", "sqnr", "bits", "predicted_change") if c in self.table
        )
        only = (str, Field("", description="layers whose name holds this text"))
        return create_model(
            "QuantizeView",
            __base__=choices("QuantizeView", column=columns, sort=("model order", "largest first")),
            only=only,
        )
