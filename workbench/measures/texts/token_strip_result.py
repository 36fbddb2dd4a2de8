"""What `token-strip` returns: a text in colours, or the examples that flipped."""

from __future__ import annotations

import html
import textwrap
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field, create_model

from workbench.measures.texts.spelled import laid_out, visible
from workbench.measures.words import word
from workbench.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

LINE = 88  # columns of a line of text
DRAWN = 1200  # tokens of a text at most
LOW = 1e-3  # nats, the lowest colour
MARKS = ((0.001, "0.001"), (0.005, "0.005"), (0.03, "0.03"), (0.1, "0.1"), (1.0, "1"), (10.0, "10"))
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
DARK, PALE = "#000000", "#ffffff"
MIDDLE = 0.469  # place on cividis where black and white have the same contrast, 4.58 : 1
LABEL = dict(
    bgcolor="#22262b", bordercolor="#8a939c", font=dict(family=MONO, size=12, color=PALE), align="left"
)


class FlipsView(BaseModel):
    """What the viewer of a classifier's result may choose without measuring again."""

    show: Literal["flips", "right to wrong", "wrong to right", "largest change"] = Field(
        "flips", description="which examples"
    )
    examples: int = Field(16, ge=1, le=100, description="examples at most of each kind")


class TokenStripResult(Result):
    """A text, coloured by divergence; of a classifier the examples whose answer flipped."""

    def view_model(self) -> type[BaseModel]:
        if self.facts.get("kind") == "classification":
            return FlipsView
        texts = max(1, self.table["text"].nunique())
        fields: dict[str, Any] = {
            "text": (int, Field(1, ge=1, le=texts, description="which text")),
            "order": (
                Literal["worst first", "as they come"],
                Field("worst first", description="how the texts are counted"),
            ),
        }
        return create_model("StripView", **fields)

    def figure(self, **view: Any) -> go.Figure:
        chosen: Any = self.view_model()(**view)
        if self.facts.get("kind") == "classification":
            return flips(self, chosen.show, chosen.examples)
        return strip(self, chosen.text, chosen.order == "worst first")


# ---- a text ------------------------------------------------------------------------------------------------
def strip(result: TokenStripResult, number: int, worst_first: bool) -> go.Figure:
    from workbench.figures import NEUTRAL_INK, figure

    table = result.table
    means = table.groupby("text")["kl"].mean()
    if not len(means):
        return figure("Where they differ: nothing was measured")
    order = means.sort_values(ascending=False, kind="stable").index if worst_first else means.index
    text = int(order[number - 1])
    whole = table[table["text"] == text]
    mine = whole.head(DRAWN)
    cut = "" if len(mine) == len(whole) else f", its first {DRAWN} tokens"
    places = laid_out(list(mine["word"]), LINE)
    fig = figure(
        f"Where {result.facts['changed']} differs from {result.facts['reference']}"
        f"<br><sup>text {text + 1}{cut}: KL {means[text]:.3g} nats a token; "
        f"all {len(means)} texts: {result.facts['kl']:.3g}</sup>",
        height=140 + 23 * (1 + places[-1][0]),
    )
    blank = dict(visible=False, fixedrange=True)
    fig.update_xaxes(range=[-0.1, LINE + 0.1], **blank)
    fig.update_yaxes(range=[places[-1][0] + 0.5, -0.5], **blank)
    fig.update_layout(
        bargap=0.1,
        barmode="overlay",
        margin=dict(l=20, r=8, t=64, b=52),
        showlegend=False,
        hoverlabel=LABEL,
    )
    known, items = mine["kl"].notna().to_numpy(), mine.index.to_numpy()
    scale = Colours(float(table["kl"].max()))
    tops: dict[Any, pd.DataFrame] = dict(list(result.tables["top"].groupby("item")))
    for coloured in (False, True):
        chosen = np.flatnonzero(known == coloured)
        if not len(chosen):
            continue
        values = mine["kl"].to_numpy()[chosen]
        lines = [told(mine.iloc[k], tops.get(int(items[k]))) for k in chosen]
        fig.add_bar(
            orientation="h",
            y=[places[k][0] for k in chosen],
            base=[places[k][1] + 0.06 for k in chosen],
            x=[places[k][2] - 0.12 for k in chosen],
            text=[html.escape(visible(mine["word"].iloc[k]), quote=False) for k in chosen],
            textposition="inside",
            constraintext="none",
            insidetextanchor="middle",
            textangle=0,
            textfont=dict(family=MONO, size=12, color=scale.inks(values) if coloured else NEUTRAL_INK),
            marker=scale.marker(values) if coloured else dict(color="rgba(128,128,128,0.12)"),
            hovertext=["<br>".join(html.escape(line, quote=False) for line in each) for each in lines],
            hovertemplate="%{hovertext}<extra></extra>",
            meta={"clicked": ["\n".join(each) for each in lines]},
            name="divergence" if coloured else "not predicted",
        )
    return fig


def told(token: pd.Series, top: pd.DataFrame | None) -> list[str]:
    """What hovering a token says, line by line, for a fixed-width font."""
    shown = f"'{visible(token['word'])}'"
    if top is None:
        return [shown, "not predicted: no model is asked for it"]
    value = float(token["kl"])
    lines = [
        f"{shown}  KL {value:.3g} nats ({word(value)})",
        f"probability of it: {token['dense_p']:.3f} -> {token['changed_p']:.3f}",
    ]
    return lines + beside(top, "'")


def beside(top: pd.DataFrame, quote: str = "") -> list[str]:
    """Both models' first words, a line each rank."""
    first = [f"{quote}{visible(w, 16)}{quote}" for w in top["dense"]]
    second = [f"{quote}{visible(w, 16)}{quote}" for w in top["changed"]]
    width = max(len("reference"), *(6 + len(w) for w in first)) + 3
    lines = ["reference".ljust(width) + "changed"]
    for one, p, two, q in zip(first, top["dense_p"], second, top["changed_p"], strict=True):
        lines.append(f"{p:.3f} {one}".ljust(width) + f"{q:.3f} {two}")
    return lines


class Colours:
    """Cividis over the logarithm of the divergence, from 0.001 nats to the largest (at least 0.1)."""

    def __init__(self, most: float) -> None:
        self.low, self.high = np.log10(LOW), np.log10(max(most, 0.1))

    def places(self, values: Any) -> np.ndarray[Any, Any]:
        found = np.log10(np.maximum(np.asarray(values, dtype=float), LOW))
        return np.asarray(np.clip(found, self.low, self.high))

    def inks(self, values: Any) -> list[str]:
        """Of text on each colour, the one of the higher contrast."""
        middle = self.low + MIDDLE * (self.high - self.low)
        return [PALE if place < middle else DARK for place in self.places(values)]

    def marker(self, values: Any, **bar: Any) -> dict[str, Any]:
        marks = [(np.log10(at), said) for at, said in MARKS if self.low <= np.log10(at) <= self.high + 1e-9]
        legend = dict(
            orientation="h",
            x=0,
            xanchor="left",
            y=0,
            yref="container",
            yanchor="bottom",
            len=0.6,
            thickness=10,
            outlinewidth=0,
            title=dict(text=" KL in nats", side="right"),
            tickvals=[float(at) for at, _ in marks],
            ticktext=[said for _, said in marks],
        )
        return dict(
            color=self.places(values),
            cmin=float(self.low),
            cmax=float(self.high),
            colorscale="Cividis",
            colorbar=legend | bar,
            line=dict(width=0),
        )


# ---- examples ----------------------------------------------------------------------------------------------
def flips(result: TokenStripResult, show: str, most: int) -> go.Figure:
    """A bar an example, as long as the changed model is sure of its answer; kind after kind."""
    from workbench.figures import figure

    table = result.table
    if not len(table):
        return figure("Answers that flipped: nothing was measured")
    facts = result.facts
    mine = chosen_examples(table, show, most)
    flipped = int((table["flip"] != "").sum())
    counts = ", ".join(f"{facts[kind.replace(' ', '_')]} {kind}" for kind in KINDS[:2])
    if others := facts[KINDS[2].replace(" ", "_")]:
        counts += f", {others} between wrong ones"
    title = f"{flipped} of {len(table)} answers flipped: {facts['changed']} against {facts['reference']}"
    note = f"{counts} (McNemar p {facts['mcnemar_p']:.2g})"
    if (mine["flip"] == "").all():
        note += "; none of this kind, so those are shown that changed the most"
    fig = figure(
        f"{title}<br><sup>{note}</sup>",
        "probability that the changed model gives its own answer",
        height=190 + 24 * len(mine),
    )
    fig.update_layout(margin=dict(l=60, r=16, t=64, b=110), hoverlabel=LABEL, showlegend=False)
    fig.update_layout(title=dict(xref="container", x=0, pad_l=12))
    names = [html.escape(short(text, 46), quote=False) for text in mine["text"]]
    rows = np.arange(len(mine))
    fig.update_yaxes(
        tickvals=rows, ticktext=names, range=[len(mine) - 0.4, -0.6], fixedrange=True, showgrid=False
    )
    fig.update_xaxes(range=[0, 1])
    scale = Colours(float(table["kl"].max()))
    tops: dict[Any, pd.DataFrame] = dict(list(result.tables["top"].groupby("item")))
    lines = [told_example(row, tops[index]) for index, row in mine.iterrows()]
    said = [f"{kind_of_row(row)}: {row['before']} → {row['after']}" for _, row in mine.iterrows()]
    fig.add_bar(
        orientation="h",
        y=rows,
        x=mine["confidence"],
        text=[html.escape(line, quote=False) for line in said],
        textposition="auto",
        insidetextanchor="start",
        textangle=0,
        insidetextfont=dict(color=scale.inks(mine["kl"]), size=12),
        marker=scale.marker(mine["kl"]),
        hovertext=["<br>".join(html.escape(line, quote=False) for line in each) for each in lines],
        hovertemplate="%{hovertext}<extra></extra>",
        meta={"clicked": ["\n".join(each) for each in lines]},
        name="flips",
    )
    return fig


def chosen_examples(table: pd.DataFrame, show: str, most: int) -> pd.DataFrame:
    """Right to wrong first, most confident first in each kind; what changed most when none flipped."""
    kinds = [show] if show in ("right to wrong", "wrong to right") else list(KINDS)
    parts = [
        table[table["flip"] == kind].sort_values("confidence", ascending=False, kind="stable").head(most)
        for kind in kinds
    ]
    found = pd.concat(parts)
    if show == "largest change" or not len(found):
        return table.sort_values("kl", ascending=False, kind="stable").head(most)
    return found


KINDS = ("right to wrong", "wrong to right", "wrong to another wrong")


def kind_of_row(row: pd.Series) -> str:
    return str(row["flip"]) or ("still right" if row["after"] == row["truth"] else "still wrong")


def told_example(row: pd.Series, top: pd.DataFrame) -> list[str]:
    lines = textwrap.wrap(str(row["text"]), 72, max_lines=5, placeholder=" …") or ["(empty)"]
    value = float(row["kl"])
    lines.append(f"{kind_of_row(row)}; it is {row['truth']}; KL {value:.3g} nats ({word(value)})")
    return lines + beside(top)


def short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
