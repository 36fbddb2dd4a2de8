"""Many quantization methods on one subject at equal widths and calibration: loss against width, with intervals over calibration draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from workbench.instruments import BadInput, Progress, TextProgress
from workbench.quantization.quantize import Quantize
from workbench.subjects import Subject

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: What a name on the leaderboard sets; everything else is shared.
METHODS: dict[str, dict[str, Any]] = {
    "nearest": {}, "stochastic": {"rounding": "stochastic"}, "clipping": {"range": "mse"}, "gptq": {"rounding": "gptq"},
    "gptq, sequential": {"rounding": "gptq", "sequential": True}, "adaround": {"rounding": "adaround"}, "flexround": {"rounding": "flexround"},
    "signround": {"rounding": "signround"}, "adaquant": {"rounding": "adaquant"}, "hqq": {"rounding": "hqq", "symmetric": False},
    "zero point": {"symmetric": False}, "awq": {"transform": "awq"}, "teq": {"transform": "teq"}, "hadamard": {"transform": "hadamard"},
    "flatquant": {"transform": "flatquant"}, "block by block": {"rounding": "flexround", "objective": "block"},
    "cbq": {"rounding": "lowrank-adaround", "objective": "block", "window": 2}, "loftq": {"adapter_rank": 8},
}  # fmt: skip


def redrawn(on: Subject, seed: int, examples: int) -> Subject:
    """The subject with a calibration split of `examples` drawn anew from its training split."""
    pick = torch.randperm(on.size("train"), generator=torch.Generator().manual_seed(seed))[:examples]
    return on.with_split("calibration", {k: v[pick] for k, v in on.split("train").items()})


def leaderboard(on: Subject, methods: Sequence[str], bits: Sequence[int], seeds: Sequence[int] = (0, 1, 2), progress: Progress | None = None,
                **fields: Any) -> pd.DataFrame:  # fmt: skip
    """One row for each method, width and seed: test loss, accuracy, bits with scales counted; `fields` go to every `Quantize` alike.

    A seed draws the calibration examples (all methods see the same) and seeds what is random in a method. `BadInput` for a name that
    is not in METHODS, or a setting that a method refuses, before anything runs.
    """
    progress = progress or TextProgress()
    if unknown := [m for m in methods if m not in METHODS]:
        raise BadInput(f"methods: {unknown[0]!r} is unknown; known: {', '.join(METHODS)}")
    if not methods or not bits or not seeds:
        raise BadInput("leaderboard: give at least one method, one width and one seed")
    shared: dict[str, Any] = {"predict_examples": 0} | fields
    drawn = {seed: redrawn(on, seed, int(shared.get("examples", 128))) for seed in seeds}
    plan = [(seed, m, Quantize(**(shared | METHODS[m]), bits=b, seed=seed)) for seed in seeds for m in methods for b in bits]
    for seed, _, instrument in plan:
        instrument.check(drawn[seed])
    rows = []
    for seed, method, instrument in progress.track(plan, "leaderboard"):
        result = instrument.run(drawn[seed], progress=Progress())
        wanted = ("loss", "accuracy", "perplexity", "dense_loss", "average_bits", "output_error")
        rows.append({"method": method, "bits": instrument.bits, "seed": seed} | {k: v for k, v in result.facts.items() if k in wanted}
                    | {"seconds": (result.provenance or {}).get("seconds")})  # fmt: skip
    return pd.DataFrame(rows)


def summary(board: pd.DataFrame, value: str = "loss") -> pd.DataFrame:
    """By width, best first: mean over seeds and half width of the 95 % t interval (NaN for a single seed), bits with scales, seconds of a run."""
    from scipy.stats import t

    grouped = board.groupby(["bits", "method"]).agg(mean=(value, "mean"), std=(value, "std"), count=(value, "count"), average_bits=("average_bits", "mean"),
                                                    output_error=("output_error", "mean"), seconds=("seconds", "mean")).reset_index()  # fmt: skip
    grouped["half_width"] = t.ppf(0.975, np.maximum(grouped["count"] - 1, 1)) * grouped["std"] / np.sqrt(grouped["count"])
    columns = ["bits", "method", "mean", "half_width", "average_bits", "output_error", "seconds"]
    return grouped.sort_values(["bits", "mean"], ascending=[True, value != "accuracy"])[columns].reset_index(drop=True)


def curves(board: pd.DataFrame, value: str = "loss") -> go.Figure:
    """Mean over seeds against bits (scales counted), one curve a method, with intervals."""
    from workbench.figures import figure, line, rule

    table = summary(board, value)
    units = {"loss": "test loss (nats)", "accuracy": "test accuracy"}
    axis = "log" if value == "loss" else "linear"
    draws = board["seed"].nunique()
    fig = figure(f"{value.capitalize()} against width, {draws} calibration draw{'s' if draws > 1 else ''}", "bits a weight, scales included",
                 units.get(value, value), yaxis_type=axis)  # fmt: skip
    for method in board["method"].unique():
        mine = table[table["method"] == method].sort_values("average_bits")
        low = mine["mean"] - mine["half_width"]
        low = low.clip(lower=1e-3) if axis == "log" else low
        band = (low, mine["mean"] + mine["half_width"]) if mine["half_width"].notna().all() else None
        line(fig, mine["average_bits"], mine["mean"], str(method), band=band)
    if value == "loss":
        dense = float(board["dense_loss"].mean())
        rule(fig, f"dense {dense:.4g}", y=dense)
    return fig
