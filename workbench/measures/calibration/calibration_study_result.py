"""What `calibration-study` shows: divergence against the number of calibration examples, on two domains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field, create_model

from workbench.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

FREE = 0  # examples of a method without calibration data
COLUMNS = {"": "solid", "second_": "dash"}


class CalibrationStudyResult(Result):
    """A line a method; solid: the domain that the examples are of, dashed: the second one."""

    def sources(self) -> list[str]:
        return list(dict.fromkeys(self.table[self.table["examples"] > FREE]["data"])) or ["none"]

    def view_model(self) -> type[BaseModel]:
        from typing import Literal

        names = tuple(self.sources())
        data: Any = (Literal[names], Field(names[0], description="what the examples are drawn from"))
        show: Any = (
            Literal["divergence", "over-fit"],
            Field("divergence", description="divergence, or the second domain's against the first one's"),
        )
        return create_model("CalibrationStudyView", show=show, data=data)

    def figure(self, **view: Any) -> go.Figure:
        chosen: Any = self.view_model()(**view)
        table = self.table[(self.table["data"] == chosen.data) | (self.table["examples"] == FREE)]
        return overfit(self, table) if chosen.show == "over-fit" else divergence(self, table, chosen.data)


def divergence(result: CalibrationStudyResult, table: pd.DataFrame, data: str) -> go.Figure:
    from workbench.figures import figure

    unit = result.facts.get("unit", "nats")
    fig = figure(
        f"How many calibration examples of {data} are enough?",
        "calibration examples (log scale)",
        f"KL to the dense model ({unit})" if unit.startswith("nats") else "distance to the dense model",
        xaxis_type="log",
        yaxis_type="log",
        height=460,
    )
    draws = result.tables.get("draws", pd.DataFrame(columns=["method"]))
    ends = span(table)
    for index, (method, part) in enumerate(table.groupby("method", sort=False)):
        mine = draws[(draws["method"] == method) & (draws.get("data") == data)]
        for prefix, domain in (("", "same"), ("second_", "other")):
            curve(fig, part.sort_values("examples"), prefix, str(method), index, ends)
            scatter(fig, mine[mine["domain"] == domain] if len(mine) else mine, str(method), index, domain)
    for prefix, name in (("", result.facts["first_domain"]), ("second_", result.facts["second_domain"])):
        fig.add_scatter(
            x=[None],
            y=[None],
            mode="lines",
            line=dict(color="#808080", dash=COLUMNS[prefix], width=2),
            name=f"on {name}",
        )
    ticks(fig, table)
    shown = table[[f"{prefix}kl{end}" for prefix in COLUMNS for end in ("", "_low", "_high")]].to_numpy(float)
    marks = log_marks(shown[np.isfinite(shown) & (shown > 0)])
    fig.update_yaxes(tickmode="array", tickvals=marks, ticktext=[f"{mark:.10g}" for mark in marks])
    return fig


def log_marks(values: np.ndarray[Any, Any]) -> list[float]:
    """Round numbers within the range of some positive values, about half a dozen."""
    if not len(values):
        return []
    low, high = float(values.min()), float(values.max())
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    found: list[float] = []
    for steps in (
        (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0),
        (1.0, 2.0, 3.0, 5.0, 7.0),
        (1.0, 3.0),
        (1.0,),
    ):
        found = [step * 10.0**n for n in decades for step in steps if low <= step * 10.0**n <= high]
        if len(found) <= 8:
            break
    return found


def span(table: pd.DataFrame) -> list[float]:
    """The least and the largest number of examples."""
    amounts = table.loc[table["examples"] > FREE, "examples"]
    return [float(amounts.min()), float(amounts.max())] if len(amounts) else [1.0, 2.0]


def ticks(fig: go.Figure, table: pd.DataFrame) -> None:
    amounts = sorted(set(table.loc[table["examples"] > FREE, "examples"].astype(int)))
    fig.update_xaxes(tickmode="array", tickvals=amounts, ticktext=[f"{n:,}" for n in amounts])


def curve(
    fig: go.Figure, part: pd.DataFrame, prefix: str, method: str, index: int, ends: list[float]
) -> None:
    """A method's line with its band; level where it reads no calibration data."""
    from workbench.figures import color, line

    free = bool((part["examples"] == FREE).all())
    x = ends if free else part["examples"].tolist()
    names = [f"{prefix}kl{end}" for end in ("", "_low", "_high")]
    y, low, high = (np.repeat(part[name].to_numpy(), 2) if free else part[name].to_numpy() for name in names)
    band = (low, high) if bool(np.isfinite([*low, *high]).all()) else None
    line(
        fig,
        x,
        y,
        method,
        band=band,
        index=index,
        mode="lines" if free else "lines+markers",
        customdata=np.stack([low, high], -1),
        hovertemplate="%{x} examples: %{y:.3g} (%{customdata[0]:.3g} to %{customdata[1]:.3g})<extra>"
        + method
        + (", second domain" if prefix else "")
        + "</extra>",
    )
    drawn = fig.data[-1]
    drawn.update(line=dict(dash=COLUMNS[prefix], width=1.5 if free else 2), showlegend=not prefix)
    drawn.update(name=f"{method}, no data" if free else method)
    if band is not None:
        fig.data[-2].update(fillcolor=color(index, 0.06 if prefix or free else 0.18))


def scatter(fig: go.Figure, mine: pd.DataFrame, method: str, index: int, domain: str) -> None:
    """Each draw by itself."""
    from workbench.figures import color

    if not len(mine):
        return
    fig.add_scatter(
        x=mine["examples"],
        y=mine["kl"],
        mode="markers",
        marker=dict(
            symbol="circle" if domain == "same" else "circle-open", size=4, color=color(index), opacity=0.7
        ),
        legendgroup=method,
        showlegend=False,
        hoverinfo="skip",
    )


def overfit(result: CalibrationStudyResult, table: pd.DataFrame) -> go.Figure:
    """How much more the second domain suffers than the first, beside the same without calibration data."""
    from workbench.figures import color, figure, line

    domains = f"KL on {result.facts['second_domain']} / KL on {result.facts['first_domain']}"
    fig = figure(
        "Does it fit the calibration domain more than it should?",
        "calibration examples (log scale)",
        f"{domains},<br>over that without calibration data",
        xaxis_type="log",
        height=460,
    )
    known = table[table["beside"] != ""]
    methods = list(dict.fromkeys(table["method"]))
    for place, (method, part) in enumerate(known.groupby("method", sort=False)):
        part = part.sort_values("examples")
        index = methods.index(method)
        y, low, high = (part[f"overfit{end}"].to_numpy(float) for end in ("", "_low", "_high"))
        bars = dict(type="data", symmetric=False, array=high - y, arrayminus=y - low, color=color(index))
        x = part["examples"].to_numpy(float) * 1.03 ** (place - (known["method"].nunique() - 1) / 2)
        name = f"{method} beside {part['beside'].iloc[0]}"
        line(fig, x, y, name, index=index, mode="lines+markers", error_y=bars)
    if len(known):
        amounts = known["examples"]
        fig.add_scatter(
            x=[amounts.min() / 1.1, amounts.max() * 1.1],
            y=[1.0, 1.0],
            mode="lines",
            line=dict(color="#808080", dash="dash", width=1),
            name="as without calibration data",
            hoverinfo="skip",
        )
    ticks(fig, table)
    return fig
