"""What `side-by-side` returns: where two models part, and what each wrote."""

from __future__ import annotations

import html
import itertools
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field, create_model

from workbench.measures.texts.spelled import laid_out, visible
from workbench.measures.texts.token_strip_result import DARK, LABEL, MONO, beside
from workbench.measures.words import word
from workbench.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLUMN = 44  # columns of a line of each of the two texts
GAP = 3
SHARED, OWN, FIRST = "#d0d4d8", "#56B4E9", "#E69F00"  # black text reads on each


class SideBySideResult(Result):
    """Histogram of where they part, or one text as both went on with it."""

    def view_model(self) -> type[BaseModel]:
        ways = tuple(dict.fromkeys(self.table["way"])) or ("greedy",)
        fields: dict[str, Any] = {
            "show": (
                Literal["where they part", "a text"],
                Field("where they part", description="all texts, or one of them"),
            ),
            "text": (int, Field(1, ge=1, le=max(1, self.table["text"].nunique()), description="which text")),
            "way": (Literal[ways], Field(ways[0], description="how its words were chosen")),
        }
        return create_model("SideBySideView", **fields)

    def figure(self, **view: Any) -> go.Figure:
        chosen: Any = self.view_model()(**view)
        if chosen.show == "a text" and len(self.table):
            return both(self, chosen.text, chosen.way)
        return partings(self)


def partings(result: SideBySideResult) -> go.Figure:
    """How many texts part in which stretch of tokens; those that never do, last."""
    from workbench.figures import color, figure

    table = result.table
    steps = int(getattr(result.instrument, "new_tokens", 0))
    edges = np.unique(np.linspace(0, steps, min(steps, 8) + 1).astype(int))
    names = [f"{a + 1}" if b == a + 1 else f"{a + 1} to {b}" for a, b in itertools.pairwise(edges)]
    names.append("never")
    title = f"Where {result.facts['changed']} parts from {result.facts['reference']}"
    ways = [str(way) for way in dict.fromkeys(table["way"])]
    note = "; ".join(in_short(result.facts, way) for way in ways)
    fig = figure(
        f"{title}<br><sup>{note}</sup>", "first token that differs", "texts", barmode="group", margin_t=64
    )
    fig.update_xaxes(type="category")
    for index, (way, mine) in enumerate(table.groupby("way", sort=False)):
        known = mine[mine["parts_at"].notna()]
        bins = np.searchsorted(edges, known["parts_at"], side="right") - 1
        told = [said_of(known[bins == k]) for k in range(len(edges) - 1)]
        told.append(said_of(mine[mine["parts_at"].isna()]))
        fig.add_bar(
            x=names,
            y=[len(each) for each in told],
            name=str(way),
            marker=dict(color=color(index), pattern_shape=("", "/")[index % 2]),
            hovertemplate=f"{way}, %{{x}}: texts %{{y}}<extra></extra>",
            meta={
                "clicked": [
                    "\n".join([f"{way}, {n}: texts {len(t)}", *t]) for n, t in zip(names, told, strict=True)
                ]
            },
        )
    return fig


def said_of(rows: pd.DataFrame) -> list[str]:
    """A line for each text: where its two continuations part, and the divergence there."""
    lines = []
    for row in rows.to_dict("records"):
        place = row["parts_at"]
        there = "" if pd.isna(place) else f" at token {int(place) + 1}: KL {row['kl']:.3g} nats there"
        lines.append(f"text {int(row['text']) + 1}{there}")
    return lines


def in_short(facts: dict[str, Any], way: str) -> str:
    return (
        f"{way}: {100 * facts[f'{way}_same']:.0f} % of the texts never part; repeated runs of four "
        f"{100 * facts[f'{way}_dense_repetition']:.0f} % -> {100 * facts[f'{way}_repetition']:.0f} %"
    )


def both(result: SideBySideResult, number: int, way: str) -> go.Figure:
    """Left what the reference wrote, right what the changed model wrote; the first differing token marked."""
    from workbench.figures import figure

    rows = result.table[result.table["way"] == way]
    row = rows.iloc[number - 1]
    text = int(row["text"])
    tokens, top = (
        part[(part["text"] == text) & (part["way"] == way)]
        for part in (result.tables["tokens"], result.tables["top"])
    )
    place = None if pd.isna(row["parts_at"]) else int(row["parts_at"])
    apart = "they never part" if place is None else f"they part at token {place + 1}, KL {row['kl']:.3g} nats"
    read = visible(str(row["prompt"])[-70:], 70)
    fig = figure(
        f"Text {text + 1}, {way}: {apart}"
        f"<br><sup>left {result.facts['reference']}, right {result.facts['changed']}, after "
        f"'…{html.escape(read, quote=False)}'</sup>"
    )
    lines = 1
    for side, name in enumerate(("dense", "changed")):
        spelled = [word for word in tokens[name] if word] or [""]
        places = laid_out(spelled, COLUMN)
        lines = max(lines, places[-1][0] + 1)
        colours, told = [], []
        for k, spelt in enumerate(spelled):
            first = place is not None and k == place
            colours.append(FIRST if first else SHARED if place is None or k < place else OWN)
            said = [f"token {k + 1}: '{visible(spelt)}'"]
            if first:
                said += [f"the first that differs: KL {row['kl']:.3g} nats ({word(float(row['kl']))})"]
                said += beside(top, "'")
            told.append(said)
        fig.add_bar(
            orientation="h",
            y=[p[0] for p in places],
            base=[p[1] + side * (COLUMN + GAP) + 0.06 for p in places],
            x=[p[2] - 0.12 for p in places],
            text=[html.escape(visible(spelt), quote=False) for spelt in spelled],
            textposition="inside",
            constraintext="none",
            insidetextanchor="middle",
            textangle=0,
            textfont=dict(family=MONO, size=12, color=DARK),
            marker=dict(color=colours, line=dict(width=0)),
            hovertext=["<br>".join(html.escape(line, quote=False) for line in each) for each in told],
            hovertemplate="%{hovertext}<extra></extra>",
            meta={"clicked": ["\n".join(each) for each in told]},
            name=("reference", "changed")[side],
        )
    fig.update_xaxes(range=[-0.1, 2 * COLUMN + GAP + 0.1], visible=False, fixedrange=True)
    fig.update_yaxes(range=[lines - 0.5, -0.5], visible=False, fixedrange=True)
    fig.update_layout(
        height=96 + 23 * lines,
        bargap=0.1,
        barmode="overlay",
        margin=dict(l=8, r=8, t=64, b=16),
        showlegend=False,
        hoverlabel=LABEL,
    )
    return fig
