"""What a quantization shows: errors by layer as bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, create_model

from workbench.results import Result, choices

if TYPE_CHECKING:
    import plotly.graph_objects as go


class QuantizeResult(Result):
    """Errors by layer; the quantized model is `.subject`."""

    def figure(
        self, column: str = "output_error", sort: str = "model order", only: str = "", **view: Any
    ) -> go.Figure:
        """A number a layer. sort : "model order" or "largest first";
        only : layers whose name holds this text.
        """
        from workbench.figures import by_layer

        table = self.table[self.table["layer"].str.contains(only, case=False, regex=False)]
        if column == "predicted_change":
            title, unit = "Predicted loss change of each layer alone", "nats"
        else:
            words = {"sqnr": "Signal to quantization noise", "bits": "Bits a weight"}.get(
                column, column.replace("_", " ").capitalize()
            )
            title = f"{words} of each layer"
            unit = {"sqnr": "dB", "bits": "bits"}.get(column, "share of energy")
        title += "" if len(table) else f": no layer's name holds {only!r}"
        return by_layer(
            title,
            table["layer"].to_list(),
            {column.replace("_", " "): table[column]},
            unit,
            log=True if column.endswith("error") else None,
            largest=sort == "largest first",
            between=(0, float(table[column].max())) if column == "bits" and len(table) else None,
        )

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
