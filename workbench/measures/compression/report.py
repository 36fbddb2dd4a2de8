"""What the compression report says of nearness to the dense model: the front, one run's budget, its texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.axis import Choice
from workbench.errors import BadInput
from workbench.instruments import Instrument
from workbench.measures.attribution import Attribution
from workbench.measures.fidelity import front
from workbench.measures.texts.token_strip import TokenStrip
from workbench.measures.words import WORDS
from workbench.names import run_in_turn
from workbench.progress import TextProgress
from workbench.storage.resident import reclaim
from workbench.subjects import Subject
from workbench.subjects import subject as open_subject
from workbench.subjects.changes import baked, restoring

if TYPE_CHECKING:
    import plotly.graph_objects as go


TELLING = ("method", "sparsity", "format", "rounding")


@dataclass(frozen=True)
class Said:
    """A sentence where a figure cannot be."""

    text: str

    def _repr_markdown_(self) -> str:
        return self.text


def distance_in(table: pd.DataFrame) -> str:
    """The column that tells how far a run is from the dense model; "" where the task has none."""
    return next((name for name in ("kl", "distance") if name in table and table[name].notna().any()), "")


def divergence_front(table: pd.DataFrame, commands: Sequence[str], dense_bytes: float) -> go.Figure | Said:
    """Size of the compressed layers against the divergence to the dense model on the test texts.

    table : rows of `studies.sweep`, runs that begin at the dense model;  commands : what gives each of them
    """
    from workbench.figures import color, figure, looks, points, rule

    name = distance_in(table)
    if not name:
        return Said("This task's outputs do not compare, so there is no divergence to draw.")
    units = {"kl": "KL(dense || changed) (nats an item)", "distance": "distance to the dense model"}
    fig = figure(
        "The same model? Divergence against size",
        "size of the compressed layers (MB)",
        units[name],
        xaxis_type="log",
        yaxis_type="log",
        height=500,
    )
    fig.update_xaxes(exponentformat="none", dtick="D2", minorloglabels="complete")  # 5, 10, 20
    fig.update_yaxes(exponentformat="none")
    shown = table.assign(command=list(commands)[: len(table)], megabytes=table["size"] / 1e6)
    shown = shown[shown[name] > 0].reset_index(drop=True)
    if not len(shown):
        return Said("Every run is the dense model itself: no divergence to draw.")
    index = looks(map(str, shown["series"]))
    for series, part in shown.groupby("series", sort=False):
        points(
            fig,
            part["megabytes"],
            part[name],
            str(series),
            index=index[str(series)],
            error_y=dict(
                type="data",
                symmetric=False,
                array=(part[f"{name}_high"] - part[name]).tolist(),
                arrayminus=(part[name] - part[f"{name}_low"]).tolist(),
                thickness=1.2,
                width=3,
            ),
            customdata=np.stack([part[f"{name}_low"], part[f"{name}_high"], detail(part)], -1).tolist(),
            hovertemplate=f"{series}, %{{customdata[2]}}: %{{y:.3g}} (%{{customdata[0]:.2g}} to "
            "%{customdata[1]:.2g})<extra></extra>",
            meta={"clicked": part["command"].tolist()},
        )
    best = front(shown["megabytes"].to_numpy(), shown[name].to_numpy())
    fig.add_scatter(
        x=shown["megabytes"].iloc[best],
        y=shown[name].iloc[best],
        mode="lines",
        line=dict(color=color(6, 0.7), width=1.5),
        name="the front",
        hoverinfo="skip",
    )
    low, high = shown[name].min(), shown[name].max()
    for bound, under in WORDS if name == "kl" else ():
        if low / 3 < bound < high * 3:
            rule(fig, f"{under} below {bound:g}", y=bound)
    rule(fig, "dense", x=dense_bytes / 1e6)
    return fig


def detail(part: pd.DataFrame) -> list[str]:
    """`sparsity 0.5` or `4 bits`, of each run."""
    bits, sparsity = (part[c] if c in part else pd.Series(np.nan, part.index) for c in ("bits", "sparsity"))
    return [
        f"{b:g} bits" if pd.notna(b) else f"sparsity {s:g}" if pd.notna(s) else "run"
        for b, s in zip(bits, sparsity, strict=True)
    ]


def commands_of(on: Subject, runs: Mapping[str, Sequence[Instrument]]) -> list[str]:
    """The command that gives each run, in the order of `studies.sweep`'s rows."""
    from workbench.names import in_words

    source = f"--subject {on.name}"
    return [
        f"workbench run {in_words([(run.name(), chosen(run))])} {source}"
        for group in runs.values()
        for run in group
    ]


def chosen(run: Instrument) -> dict[str, Any]:
    """The fields that somebody set: those that are not the defaults, and those that tell runs apart."""
    told = changed_fields(run)
    return {name: plain(getattr(run, name)) for name in run.given() if name in TELLING or name in told}


def changed_fields(fields: Any) -> dict[str, Any]:
    """What is not as it is by default, as JSON holds it."""
    values = fields.model_dump(mode="json")
    usual = {name: info.get_default(call_default_factory=True) for name, info in fields.parameters().items()}
    return {name: value for name, value in values.items() if getattr(fields, name) != usual.get(name)}


def plain(value: Any) -> Any:
    """A choice as its name, with the options of it that are not their defaults."""
    if not isinstance(value, Choice):
        return value
    if value.entry.spelled:
        return str(value)
    return {"name": value.name} | changed_fields(value.options)


def smallest_near(
    table: pd.DataFrame, runs: Mapping[str, Sequence[Instrument]], most: float = 0.1
) -> Instrument:
    """The run of the least size that is within `most` of the dense model; the nearest where none is."""
    every = [run for group in runs.values() for run in group]
    mine = table[table["series"].isin(runs)].reset_index(drop=True)
    name = distance_in(mine)
    if not name:
        return every[int(mine["size"].argmax())]
    near = mine[mine[name] <= most].sort_values(["size", name])
    place: Any = near.index[0] if len(near) else mine[name].idxmin()
    return every[place]


def changed_by(on: Subject, chain: Sequence[Instrument], folder: str = "") -> Subject:
    """The model that runs in turn give, computed without the measurements beside it; or opened, where it is
    written.
    """
    if folder:
        made = open_subject(folder)
    else:
        *_, result = run_in_turn([unmeasured(run) for run in chain], on, cache=False)
        made = result.subject
    if not any(restoring(made.model)):
        made = made.with_model(baked(made.model))  # nothing held but what it computes with
    made.name = f"{on.name}, {in_short(chain)}"
    reclaim()
    return made


def unmeasured(run: Instrument) -> Instrument:
    names = ("test_examples", "predict_examples")
    return run.with_fields(**{name: 0 for name in names if name in type(run).model_fields})


def in_short(chain: Sequence[Instrument]) -> str:
    """`quantize int4 gptq`: the choices that tell a run from another."""
    return ", ".join(
        " ".join([run.name(), *(str(getattr(run, n)) for n in TELLING if n in type(run).model_fields)])
        for run in chain
    )


def budget_of(on: Subject, changed: Subject, examples: int) -> go.Figure | Said:
    """Which block made the divergence, and which module of the worst one."""
    asked = Attribution(changed=changed.name, parts="worst", test_examples=examples, second_order=False)
    return drawn(lambda: asked.between(on, changed, TextProgress()).figure(show="budget"))


def strip_of(on: Subject, changed: Subject, examples: int) -> go.Figure | Said:
    """A text, each token coloured by its divergence; of a classifier the answers that flipped."""
    asked = TokenStrip(changed=changed.name, test_examples=examples)
    return drawn(lambda: asked.between(on, changed, TextProgress()).figure())


def budget_and_strip(
    on: Subject, chain: Sequence[Instrument], budget_examples: int, strip_examples: int, folder: str = ""
) -> tuple[go.Figure | Said, go.Figure | Said]:
    """Where the model that runs in turn give departs from the dense one, by part and by token. The model
    itself is let go.

    folder : where it was written; "" when it was not
    """
    changed = changed_by(on, chain, folder)
    return budget_of(on, changed, budget_examples), strip_of(on, changed, strip_examples)


def drawn(make: Any) -> Any:
    """The figure; what refuses a task says so in its place."""
    try:
        return make()
    except BadInput as error:
        return Said(f"Not shown: {error}")
