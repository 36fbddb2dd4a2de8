"""Figures of scaling results. Pure: they draw tables that the instruments prepared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.figures import color, figure, heat, line, points, rule

if TYPE_CHECKING:
    from workbench.results import Result

AXIS = {
    "tokens": "training tokens",
    "flops": "training compute (FLOPs)",
    "params": "parameters",
    "step": "step",
    "steps": "steps",
}


def short(value: float) -> str:
    """1.3e9 -> '1.3 G': sizes and token counts as people say them."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {suffix}"
    return f"{value:.3g}"


def _tables(result: Result) -> dict[str, pd.DataFrame]:
    return result.tables


def _target(result: Result) -> str:
    runs = _tables(result)["runs"]
    from workbench.scaling.formulas.lawbook import law

    name = law(result.instrument.law).target  # type: ignore[attr-defined]
    return name if name in runs else "loss"


def _hover(runs: pd.DataFrame) -> list[str]:
    shown = [c for c in ("params", "tokens", "flops", "learning_rate") if c in runs]
    return [
        f"run {i}"
        + "".join(f"<br>{c} {short(row[c])}" for c in shown)
        + f"<br>error {100 * row['error']:+.2f} %"
        for i, row in runs.iterrows()
    ]


def fit_figure(result: Result) -> go.Figure:
    """Measured losses and the law's curves with their bands, one per model size."""
    tables, target = _tables(result), _target(result)
    curves, runs = tables["curves"], tables["runs"]
    axis = str(curves.axis.iloc[0])
    fig = figure(
        f"{result.facts['law']}: law and runs",
        AXIS.get(axis, axis),
        target.replace("_", " "),
        xaxis_type="log",
        yaxis_type="log",
    )
    for k, (group, part) in enumerate(curves.groupby("group", dropna=False, sort=True)):
        name = "law" if pd.isna(group) else f"{short(float(group))} params"  # type: ignore[arg-type]
        line(fig, part.x, part.loss, name, band=(part.low, part.high), index=k, mode="lines")
    text = _hover(runs)
    for fitted, name, symbol in ((True, "fitted runs", "circle"), (False, "runs left out", "circle-open")):
        mask = runs.fitted.to_numpy(dtype=bool) == fitted
        if mask.any():
            fig.add_scatter(
                x=runs[axis][mask],
                y=runs[target][mask],
                mode="markers",
                name=name,
                customdata=np.flatnonzero(mask),
                hovertext=[t for t, m in zip(text, mask, strict=True) if m],
                hoverinfo="text",
                marker=dict(
                    symbol=symbol,
                    size=7,
                    color=np.log10(runs.params[mask]) if "params" in runs else color(6),
                    colorscale="Cividis",
                    line=dict(width=1, color="rgba(128,128,128,0.9)"),
                ),
            )
    return fig


def residual_figure(result: Result) -> go.Figure:
    """Relative error of the law for every run against compute."""
    runs = _tables(result)["runs"]
    x = "flops" if "flops" in runs else str(_tables(result)["curves"].axis.iloc[0])
    fig = figure("Predicted over observed", AXIS.get(x, x), "error (%)", xaxis_type="log")
    text = _hover(runs)
    for fitted, name, index in ((True, "fitted", 0), (False, "left out", 1)):
        mask = runs.fitted.to_numpy(dtype=bool) == fitted
        if mask.any():
            points(
                fig,
                runs[x][mask],
                100 * runs.error[mask],
                name,
                text=[t for t, m in zip(text, mask, strict=True) if m],
                index=index,
                customdata=np.flatnonzero(mask),
            )
    rule(fig, "exact", y=0.0)
    return fig


def isoflop_figure(result: Result) -> go.Figure:
    """Loss against model size at equal compute: the law's curves and the runs near each budget."""
    tables = _tables(result)
    fig = figure(
        "IsoFLOP: loss against size at equal compute",
        "parameters",
        "loss",
        xaxis_type="log",
        yaxis_type="log",
    )
    if "isoflop_curves" not in tables:
        fig.add_annotation(text="this law has no model size and token count", showarrow=False)
        return fig
    runs = tables["runs"]
    lowest, highest = runs.loss.min() * 0.98, runs.loss.max() * 1.05
    for k, (flops, part) in enumerate(tables["isoflop_curves"].groupby("flops", sort=True)):
        part = part[(part.loss >= lowest) & (part.loss <= highest)]
        budget = float(flops)  # type: ignore[arg-type]
        name = f"{budget:.1e} FLOPs"
        line(fig, part.params, part.loss, name, band=(part.low, part.high), index=k, mode="lines")
        near = runs[np.abs(np.log(runs.flops / budget)) < 0.25]
        if len(near):
            points(fig, near.params, near.loss, name, index=k, text=_hover(near))
            fig.data[-1].showlegend = False
    return fig


def contour_figure(result: Result) -> go.Figure:
    """The law over parameters and tokens, with the runs on it."""
    tables = _tables(result)
    fig = figure("Predicted loss", "parameters", "training tokens", xaxis_type="log", yaxis_type="log")
    if "contour" not in tables:
        fig.add_annotation(text="this law has no model size and token count", showarrow=False)
        return fig
    grid = tables["contour"].pivot(index="tokens", columns="params", values="loss")
    fig.add_contour(
        x=grid.columns,
        y=grid.index,
        z=grid.to_numpy(),
        colorscale="Cividis",
        contours=dict(showlabels=True),
        line=dict(width=0.5),
        colorbar=dict(title=dict(text="loss", side="right"), outlinewidth=0, thickness=14),
        ncontours=16,
    )
    runs = tables["runs"]
    fig.add_scatter(
        x=runs.params,
        y=runs.tokens,
        mode="markers",
        name="runs",
        hovertext=_hover(runs),
        hoverinfo="text",
        customdata=np.arange(len(runs)),
        marker=dict(size=6, color="white", line=dict(width=1, color="black")),
    )
    return fig


def held_out_figure(result: Result) -> go.Figure:
    """Error of predictions for runs that were not fitted, against how many times more compute they took."""
    tables = _tables(result)
    fig = figure(
        "Held-out error against the compute multiple",
        "compute over the largest fitted run",
        "error (%)",
        xaxis_type="log",
    )
    if "held_out" not in tables:
        fig.add_annotation(text="too few runs to hold any out", showarrow=False)
        return fig
    for k, (cutoff, part) in enumerate(tables["held_out"].groupby("cutoff", sort=True)):
        points(fig, part.multiple, 100 * part.error, f"fitted up to {float(cutoff):.1e} FLOPs", index=k)  # type: ignore[arg-type]
    rule(fig, "exact", y=0.0)
    return fig


def draws_figure(result: Result) -> go.Figure:
    """Correlation of the parameters across resamples: near one means that the runs determine only
    a combination.
    """
    tables = _tables(result)
    fig = figure("Correlation of parameters across resamples", height=420)
    if "correlation" not in tables:
        fig.add_annotation(text="no resamples", showarrow=False)
        return fig
    table = tables["correlation"].set_index("parameter")
    labels = {"text": table.round(2).to_numpy(), "texttemplate": "%{text}"}
    heat(
        fig,
        table.to_numpy(),
        list(table.columns),
        list(table.index),
        unit="correlation",
        zmin=-1,
        zmax=1,
        **labels,
    )
    return fig


def profile_figure(result: Result) -> go.Figure:
    """Deviance along each parameter, the others re-optimised; flat means undetermined."""
    tables = _tables(result)
    fig = figure("Profiles of the objective", "parameter over its estimate", "deviance", xaxis_type="log")
    if "profiles" not in tables:
        fig.add_annotation(text="run with intervals='profile'", showarrow=False)
        return fig
    for k, (name, part) in enumerate(tables["profiles"].groupby("profiled", sort=False)):
        estimate = float(result.table.set_index("parameter").estimate[name])
        line(fig, part.value / estimate, part.deviance, str(name), index=k, mode="lines")
    return fig


def frontier_figure(result: Result) -> go.Figure:
    """Best size and tokens against the budget, with bands, and the chosen budget."""
    table = _tables(result)["frontier"]
    fig = figure(
        "Compute-optimal size and tokens",
        "training compute (FLOPs)",
        "parameters, tokens",
        xaxis_type="log",
        yaxis_type="log",
    )
    line(
        fig,
        table.flops,
        table.params,
        "parameters",
        band=(table.params_low, table.params_high),
        index=0,
        mode="lines",
    )
    line(
        fig,
        table.flops,
        table.tokens,
        "tokens",
        band=(table.tokens_low, table.tokens_high),
        index=1,
        mode="lines",
    )
    budget = float(result.facts["budget_flops"])
    rule(fig, f"budget {budget:.2g} FLOPs", x=budget)
    return fig


def over_training_figure(result: Result) -> go.Figure:
    """What a smaller model costs at the same loss."""
    table = _tables(result)["over_training"]
    fig = figure(
        "Compute overhead of a smaller model at the same loss",
        "size over the compute-optimal size",
        "extra training compute (%)",
    )
    band = (100 * table.overhead_low, 100 * table.overhead_high)
    finite = np.isfinite(table.compute_overhead) & np.isfinite(band[0]) & np.isfinite(band[1])
    line(
        fig,
        table["shrink"][finite],
        100 * table.compute_overhead[finite],
        "overhead",
        band=(band[0][finite], band[1][finite]),
    )
    return fig


def trajectory_figure(result: Result) -> go.Figure:
    """Loss of finished runs of the planned size, by length."""
    table = _tables(result)["trajectory"]
    title = f"Loss of a {short(float(result.facts['params']))}-parameter model by training length"
    fig = figure(title, "training tokens", "loss at the end of such a run", xaxis_type="log")
    line(fig, table.tokens, table.loss, "predicted", band=(table.low, table.high), mode="lines")
    return fig
