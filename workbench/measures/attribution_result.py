"""What `attribution` returns: the grid block x kind of module, and the error budget."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field

from workbench.results import Result
from workbench.storage.places import data_folder

if TYPE_CHECKING:
    import plotly.graph_objects as go

WHOLE = "whole block"
TITLES = {
    "kl": "{distance} ({unit})",
    "share": "share of the sum of its level (%)",
    "weight_error": "|W' - W|² / |W|² (no unit)",
    "output_error": "|y' - y|² / |y|² (no unit)",
    "times_mean": "times the mean of all modules",
    "second_order": "predicted from gradients, ½ δᵀGδ ({unit})",
}
DECADES = 3.0  # that the colours of a logarithmic scale span


class AttributionView(BaseModel):
    """What the viewer may choose without measuring again."""

    show: Literal["grid", "budget"] = Field("grid", description="the grid of parts, or each block's share")
    value: Literal["kl", "share", "times_mean", "weight_error", "output_error", "second_order"] = Field(
        "kl", description="what the grid's colours show"
    )
    scale: Literal["log", "linear"] = Field("log", description="the colours' scale")


class AttributionResult(Result):
    """Grid: a row a block, a column a kind of module; budget: a bar a block, beside noise of equal norm."""

    def view_model(self) -> type[BaseModel]:
        return AttributionView

    def figure(self, **view: Any) -> go.Figure:
        chosen = AttributionView(**view)
        return budget(self) if chosen.show == "budget" else grid(self, chosen.value, chosen.scale == "log")


def by_role(table: pd.DataFrame) -> pd.DataFrame:
    """Each role's modules in times of the mean module: how many, and their 10, 50 and 90 % quantiles."""
    modules = table[(table["level"] == "module") & (table["block"] != "outside")]
    times = modules["kl"] / modules["kl"].mean()
    found = times.groupby(modules["role"].str.rpartition(".")[2].rename("role"), sort=False)
    low, median, high = (found.quantile(share) for share in (0.1, 0.5, 0.9))
    return pd.DataFrame(dict(low=low, median=median, high=high, parts=found.size())).reset_index()


@functools.cache
def recorded_roles() -> pd.DataFrame:
    """`by_role` of the models that the project measured, by subject and change."""
    return pd.read_csv(data_folder() / "evidence" / "attribution-roles.csv")


def beside_usual(table: pd.DataFrame, every: bool) -> pd.DataFrame:
    """With `times_mean` of each module, and the band that is usual for its role: from the least 10 % quantile
    of our records to the largest 90 % quantile; NaN for a role of which there is no record, and where not
    `every` module was measured.
    """
    if not every:
        return table.assign(times_mean=np.nan, usual_low=np.nan, usual_high=np.nan)
    inside = (table["level"] == "module") & (table["block"] != "outside")
    mean = table["kl"][inside].mean()
    bands = recorded_roles().groupby("role").agg(low=("low", "min"), high=("high", "max"))
    role = table["role"].where(inside).str.rpartition(".")[2]
    return table.assign(
        times_mean=(table["kl"] / mean).where(inside) if mean else np.nan,
        usual_low=role.map(bands["low"]),
        usual_high=role.map(bands["high"]),
    )


def unusual(table: pd.DataFrame, most: int = 5) -> str:
    """The modules farthest above what is usual for their role, in words."""
    over = (
        (table["times_mean"] / table["usual_high"]).where(table["times_mean"] > table["usual_high"]).dropna()
    )
    return ", ".join(
        f"{table['part'][place]} ({table['times_mean'][place]:.1f} times the mean; usual for "
        f"{table['role'][place].rpartition('.')[2]}: {table['usual_low'][place]:.2g} to "
        f"{table['usual_high'][place]:.2g})"
        for place in over.sort_values(ascending=False).index[:most]
    )


def grid(result: AttributionResult, value: str, logarithmic: bool) -> go.Figure:
    from workbench.figures import figure, heat

    table = result.table[result.table["level"].isin(("block", "module"))]
    inside = table[table["block"] != "outside"]
    rows = list(dict.fromkeys(inside["block"]))
    columns = [WHOLE, *dict.fromkeys(inside["role"][inside["role"] != ""])]
    shown = np.full((len(rows), len(columns)), np.nan)
    said = np.full(shown.shape, "", dtype=object)
    for _, row in inside.iterrows():
        place = rows.index(row["block"]), columns.index(row["role"] or WHOLE)
        shown[place] = 100 * row[value] if value == "share" else row[value]
        if row["usual_high"] > 0:
            said[place] = (
                f"<br>{row['times_mean']:.2g} times the mean module; usual for its kind "
                f"{row['usual_low']:.2g} to {row['usual_high']:.2g}"
            )
    unit = TITLES[value].format(distance=distance_of(result), unit=result.facts["unit"])
    height = max(320, 130 + 17 * (len(rows)))
    fig = figure(title(result), "part of the block", "block", height=height)
    fig.update_yaxes(tickmode="linear" if len(rows) <= 40 else "auto", type="category")
    heat(
        fig,
        np.log10(np.where(shown > 0, shown, np.nan)) if logarithmic else shown,
        columns,
        [name.rpartition(".")[2] if len(set(stacks(rows))) == 1 else name for name in rows],
        unit,
        customdata=np.stack([shown.astype(object), said], -1),
        hovertemplate=f"block %{{y}}, %{{x}}: %{{customdata[0]:.3g}}%{{customdata[1]}}<extra>{unit}</extra>",
        xgap=1,
        ygap=1,
    )
    if logarithmic and np.isfinite(shown[shown > 0]).any():
        fig.data[0].update(**colours(shown))
    return fig


def colours(shown: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The range and the marks of a logarithmic colour scale, of the largest value and three decades below."""
    known = np.log10(shown[shown > 0])
    high = float(known.max())
    low = max(float(known.min()), high - DECADES)
    whole = [10.0**k * m for k in range(int(np.floor(low)), int(np.ceil(high)) + 1) for m in (1, 3)]
    marks = [value for value in whole if low <= np.log10(value) <= high]
    bar = dict(tickvals=[float(np.log10(v)) for v in marks], ticktext=[f"{v:g}" for v in marks])
    return dict(zmin=low, zmax=high if high > low else low + 1, colorbar=bar)


#: Noise farther above the tallest bar than this is drawn at the axis's end: bars would be flat beside it.
HEADROOM = 1.5


def budget(result: AttributionResult) -> go.Figure:
    """Each block's distance alone, its interval, and that of noise of the same norm; the sum beside the
    whole is in the title. Beside it the modules of the worst block, where they were measured.
    """
    from workbench.figures import color, figure, rule

    table = result.table[result.table["level"] == "block"]
    names = [row["role"] or row["block"].rpartition(".")[2] for _, row in table.iterrows()]
    axis = f"{distance_of(result)} of the part alone ({result.facts['unit']})"
    fig = figure(title(result), "block", axis, barmode="overlay", height=470)
    fig.update_xaxes(type="category")
    fig.add_bar(**bars(result, table, names, "block"), name="a block's change alone", marker_color=color(0))
    if table["noise"].notna().any():
        top = HEADROOM * float(result.table["kl_high"].max())
        above = table["noise"] > top
        fig.add_scatter(
            x=names,
            y=table["noise"].clip(upper=top),
            name="random noise of the same norm" + (" (triangle: above the axis)" if above.any() else ""),
            mode="markers",
            marker=dict(symbol=np.where(above, "triangle-up", "diamond").tolist(), color=color(1), size=8),
            customdata=table["noise"],
            hovertemplate="block %{x}, noise: %{customdata:.4g}<extra></extra>",
            meta={"clicked": said_of(result, table)},
        )
    if len(table):
        rule(fig, "an equal share", y=float(table["kl"].mean()))
    inside = modules_of_worst(result.table)
    if len(inside):
        roles = [role.rpartition(".")[2] if not alike else role for role, alike in ends(inside["role"])]
        block = inside["block"].iloc[0].rpartition(".")[2]
        fig.update_layout(
            xaxis_domain=[0, 0.55],
            xaxis2=dict(domain=[0.62, 1], anchor="y", type="category", title_text=f"in block {block}"),
        )
        fig.add_bar(
            **bars(result, inside, roles, f"block {block},"),
            name="a module's, in the worst block",
            marker=dict(color=color(5), pattern_shape="/"),
            xaxis="x2",
        )
    return fig


def bars(result: AttributionResult, table: pd.DataFrame, names: list[str], kind: str) -> dict[str, Any]:
    """What bars of parts show, and say when they are clicked."""
    from workbench.figures import NEUTRAL_INK

    return dict(
        x=names,
        y=table["kl"],
        error_y=dict(
            type="data",
            symmetric=False,
            array=table["kl_high"] - table["kl"],
            arrayminus=table["kl"] - table["kl_low"],
            color=NEUTRAL_INK,
        ),
        customdata=100 * table[["share"]],
        hovertemplate=f"{kind} %{{x}}: %{{y:.4g}}, %{{customdata[0]:.1f}} % of the sum<extra></extra>",
        meta={"clicked": said_of(result, table)},
    )


def said_of(result: AttributionResult, table: pd.DataFrame) -> list[str]:
    """What each part says when it is clicked."""
    return [
        f"{row['part']}: {distance_of(result)} {row['kl']:.4g} {result.facts['unit']} alone, "
        f"95 % interval {row['kl_low']:.4g} to {row['kl_high']:.4g}, {100 * row['share']:.1f} % of the sum"
        + (f"; noise of the same norm {row['noise']:.4g}" if row["noise"] > 0 else "")
        for _, row in table.iterrows()
    ]


def modules_of_worst(table: pd.DataFrame) -> pd.DataFrame:
    """The modules inside the block with the largest distance; none for what is in no block."""
    blocks, modules = (table[table["level"] == level] for level in ("block", "module"))
    if not len(blocks) or not len(modules):
        return modules.head(0)
    worst = blocks["block"].iloc[int(blocks["kl"].argmax())]
    return modules[(modules["block"] == worst) & (worst != "outside")]


def ends(roles: pd.Series) -> list[tuple[str, bool]]:
    """Each name, and whether another one has the same last part."""
    last = [role.rpartition(".")[2] for role in roles]
    return [(role, last.count(end) > 1) for role, end in zip(roles, last, strict=True)]


def title(result: AttributionResult) -> str:
    facts = result.facts
    text = f"Which part broke it? {facts['changed']}"
    if "full" in facts:
        text += f": {distance_of(result)} {facts['full']:.3g}"
    if "blocks_additivity" in facts:
        text += f", full / sum {facts['blocks_additivity']:.2f}"
    return text + (" (unreliable)" if str(facts.get("prediction", "")).startswith("unreliable") else "")


def distance_of(result: AttributionResult) -> str:
    return "KL" if result.facts["unit"].startswith("nats") else "distance"


def stacks(rows: list[str]) -> list[str]:
    return [name.rpartition(".")[0] for name in rows]
