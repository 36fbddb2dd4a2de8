"""Many quantization methods on one subject at equal widths and calibration:
loss against width, with intervals over calibration draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from workbench.errors import BadInput
from workbench.progress import Progress, TextProgress
from workbench.quantization.quantize import Quantize
from workbench.quantization.rounding.rounding import ROUNDING
from workbench.quantization.transform.transform import TRANSFORM
from workbench.subjects import Subject

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: Compositions with a name of their own. Every other rounding and transform of `Quantize` is on
#: the leaderboard under the name of its choice.
COMPOSED: dict[str, dict[str, Any]] = {
    "nearest": {},
    "clipping": {"range": "mse"},
    "zero point": {"format.symmetric": False},
    "salient columns": {"salient": "columns"},
    "gptq, sequential": {"rounding": "gptq", "sequential": True},
    "block by block": {"rounding": "flexround", "rounding.objective": "block"},
    "cbq": {
        "rounding": "lowrank-adaround",
        "rounding.objective": "block",
        "rounding.objective.window": 2,
    },
    "loftq": {"adapter": "loftq"},
    "activation-aware, gptq": {"transform": "activation-aware", "rounding": "gptq"},
    "hadamard, gptq": {"transform": "hadamard", "rounding": "gptq"},
}
#: What a choice needs beside it to be itself.
NEEDS: dict[str, dict[str, Any]] = {"hqq": {"format.symmetric": False}}


def every_method() -> dict[str, dict[str, Any]]:
    """Name -> what it sets of `Quantize`; everything else is shared.
    A rounding or transform that is new there is new here.
    """
    single = {
        choice: {field: choice} | NEEDS.get(choice, {})
        for field, axis, plain in (("rounding", ROUNDING, "nearest"), ("transform", TRANSFORM, "none"))
        for choice in axis
        if choice != plain
    }
    return COMPOSED | single


METHODS = every_method()
TITLES = {"kl": "Divergence"}


def instrument(method: str, width: int, steps: int = 0, **fields: Any) -> Quantize:
    """A method at a width of integers (another format has its own); steps : of what learns (0: its own)."""
    made = Quantize(**({"predict_examples": 0} | fields | METHODS[method]))
    changed: dict[str, Any] = {}
    if made.format.name == "int":
        changed["format"] = made.format.with_options(bits=width)
    for field in ("rounding", "transform"):
        choice = getattr(made, field)
        if steps and "steps" in choice.entry.options.model_fields:
            changed[field] = choice.with_options(steps=steps)
    return made.with_fields(**changed)


def accepted(
    on: Subject, bits: Sequence[int], steps: int = 0, **fields: Any
) -> tuple[list[str], dict[str, str]]:
    """(methods that can run at all these widths with these shared settings, name -> why not
    of the others).
    """
    taken, refused = [], {}
    for name in METHODS:
        try:
            for width in bits:
                instrument(name, width, steps, **fields).check(on)
            taken.append(name)
        except BadInput as error:
            refused[name] = str(error)
    return taken, refused


def redrawn(on: Subject, seed: int, examples: int) -> Subject:
    """The subject with a calibration split of `examples` drawn anew from its training split."""
    pick = torch.randperm(on.size("train"), generator=torch.Generator().manual_seed(seed))[:examples]
    return on.with_split("calibration", {k: v[pick] for k, v in on.split("train").items()})


def leaderboard(
    on: Subject,
    methods: Sequence[str],
    bits: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
    progress: Progress | None = None,
    steps: int = 0,
    block_steps: int = 0,
    **fields: Any,
) -> pd.DataFrame:
    """One row for each method, width and seed: divergence to the dense model, test loss, accuracy, bits with
    scales counted; `fields` go to every `Quantize` alike.

    steps : iterations of the methods that learn (0: their own);
    block_steps : of those that learn a block at a time, each of which costs as much as dozens of a layer's
        (0: `steps`).

    A seed draws the calibration examples (all methods see the same) and seeds what is random in a method.
    `BadInput` for a name that is not in METHODS, or a setting that a method refuses, before anything runs. A
    leaderboard that is stopped returns the finished rows.
    """
    progress = progress or TextProgress()
    if unknown := [m for m in methods if m not in METHODS]:
        raise BadInput(f"methods: {unknown[0]!r} is unknown; known: {', '.join(METHODS)}")
    if not methods or not bits or not seeds:
        raise BadInput("leaderboard: give at least one method, one width and one seed")
    drawn = {seed: redrawn(on, seed, int(fields.get("calibration_examples", 128))) for seed in seeds}
    fewer = {
        m: block_steps or steps if METHODS[m].get("rounding.objective") == "block" else steps for m in methods
    }
    plan = [
        (seed, method, width, instrument(method, width, fewer[method], **fields, seed=seed))
        for seed in seeds
        for method in methods
        for width in bits
    ]
    for seed, _, _, made in plan:
        made.check(drawn[seed])
    rows = []
    for seed, method, width, made in progress.track(plan, "leaderboard"):
        result = made.run(drawn[seed], progress=progress.quiet())
        if result.partial:
            break
        wanted = ["kl", "kl_low", "kl_high", "loss", "accuracy", "perplexity", "dense_loss", "average_bits"]
        wanted.append("output_error")
        rows.append(
            {"method": method, "bits": width, "seed": seed}
            | {k: v for k, v in result.facts.items() if k in wanted}
            | {"seconds": result.provenance.get("seconds")}
        )
    return pd.DataFrame(rows)


def first_measure(board: pd.DataFrame) -> str:
    """`kl`, which tells the most, else `loss`."""
    return "kl" if "kl" in board and board["kl"].notna().all() else "loss"


def summary(board: pd.DataFrame, value: str = "") -> pd.DataFrame:
    """By width, best first: mean over seeds and half width of the 95 % t interval (NaN for a single seed),
    bits with scales, seconds of a run.

    value : column that is averaged; empty: the divergence where there is one, else the loss
    """
    from scipy.stats import t

    value = value or first_measure(board)
    grouped = (
        board.groupby(["bits", "method"])
        .agg(
            mean=(value, "mean"),
            std=(value, "std"),
            count=(value, "count"),
            average_bits=("average_bits", "mean"),
            output_error=("output_error", "mean"),
            seconds=("seconds", "mean"),
        )
        .reset_index()
    )
    grouped["half_width"] = (
        t.ppf(0.975, np.maximum(grouped["count"] - 1, 1)) * grouped["std"] / np.sqrt(grouped["count"])
    )
    columns = ["bits", "method", "mean", "half_width", "average_bits", "output_error", "seconds"]
    return grouped.sort_values(["bits", "mean"], ascending=[True, value != "accuracy"])[columns].reset_index(
        drop=True
    )


def curves(board: pd.DataFrame, value: str = "", most: int = 8) -> go.Figure:
    """Mean over seeds against bits (scales counted), with intervals:
    the `most` methods that are best at the smallest width, and nearest rounding.
    """
    from workbench.figures import figure, line, rule

    value = value or first_measure(board)
    table = summary(board, value)
    first = table[table["bits"] == table["bits"].min()]["method"]
    shown = [m for m in board["method"].unique() if m in set(first[:most]) | {"nearest"}]
    units = {
        "kl": "KL(dense || changed) (nats an item)",
        "loss": "test loss (nats)",
        "accuracy": "test accuracy",
    }
    axis = "linear" if value == "accuracy" else "log"
    draws = board["seed"].nunique()
    which = (
        ""
        if len(shown) == board["method"].nunique()
        else f", the {len(shown)} best of {board['method'].nunique()} methods"
    )
    fig = figure(
        f"{TITLES.get(value, value.capitalize())} against width, {draws} calibration "
        f"draw{'s' if draws > 1 else ''}{which}",
        "bits a weight, scales included",
        units.get(value, value),
        yaxis_type=axis,
    )
    for method in shown:
        mine = table[table["method"] == method].sort_values("average_bits")
        low = mine["mean"] - mine["half_width"]
        low = (
            low.clip(lower=table["mean"].min() / 2) if axis == "log" else low
        )  # an interval that reaches zero has no end on this axis
        band = (low, mine["mean"] + mine["half_width"]) if mine["half_width"].notna().all() else None
        line(fig, mine["average_bits"], mine["mean"], str(method), band=band)
    if value == "loss":
        dense = float(board["dense_loss"].mean())
        rule(fig, f"dense {dense:.4g}", y=dense)
    return fig


def heat_map(board: pd.DataFrame) -> go.Figure:
    """Every method at every width: divergence to the dense model, or loss above its loss where there is none,
    the best at the smallest width on top; colour on a logarithmic scale.
    """
    from workbench.figures import figure

    value = first_measure(board)
    table = summary(board, value)
    table["rise"] = table["mean"] - (float(board["dense_loss"].mean()) if value == "loss" else 0)
    wide = table.pivot(index="method", columns="bits", values="rise")
    wide = wide.sort_values(wide.columns[0], ascending=False)
    half = table.pivot(index="method", columns="bits", values="half_width").loc[wide.index]
    sign = "+" if value == "loss" else ""
    text = [
        [f"{v:{sign}.3f}" + ("" if np.isnan(h) else f" ± {h:.3f}") for v, h in zip(row, spread, strict=True)]
        for row, spread in zip(wide.to_numpy(), half.to_numpy(), strict=True)
    ]
    fig = figure(
        {"kl": "KL(dense || changed) (nats an item)", "loss": "Test loss above the dense model's (nats)"}[
            value
        ],
        "bits of the integers",
        "",
        height=120 + 24 * len(wide),
        xaxis_type="category",
    )
    floor = max(float(np.nanmin(np.abs(wide.to_numpy()))), 1e-3)
    fig.add_heatmap(
        z=np.log10(np.maximum(wide.to_numpy(), floor)),
        x=[str(b) for b in wide.columns],
        y=list(wide.index),
        text=text,
        texttemplate="%{text}",
        colorscale="Cividis",
        hovertemplate="%{y}, %{x} bits: %{text}<extra></extra>",
        showscale=False,
    )
    return fig
