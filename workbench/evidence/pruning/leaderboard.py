"""Many pruning methods on one subject under equal budgets:
loss and accuracy against sparsity, with intervals over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.errors import BadInput
from workbench.progress import Progress, TextProgress
from workbench.pruning.prune import Prune

if TYPE_CHECKING:
    import plotly.graph_objects as go


def leaderboard(
    source: str,
    methods: Sequence[str],
    sparsities: Sequence[float],
    seeds: Sequence[int] = (0, 1, 2),
    progress: Progress | None = None,
    gradients: int = 256,
    **fields: Any,
) -> pd.DataFrame:
    """One row for each method, sparsity and seed: test loss, accuracy and the dense loss;
    `fields` go to every `Prune` alike, `gradients` to those that measure any.

    The seed is the network's own for `digits-vit` (trained anew for each) and the pruning's otherwise.
    """
    import workbench

    progress = progress or TextProgress()
    if not methods or not sparsities or not seeds:
        raise BadInput("leaderboard: give at least one method, one sparsity and one seed")
    shared: dict[str, Any] = {"predict_examples": 0} | fields
    plan = [
        (seed, Prune(method=m, sparsity=s, seed=seed, **shared).with_gradients(gradients))
        for seed in seeds
        for m in methods
        for s in sparsities
    ]
    subjects = {
        seed: workbench.subject(source, seed=seed) if source == "digits-vit" else workbench.subject(source)
        for seed in seeds
    }
    for seed, instrument in plan:
        instrument.check(subjects[seed])
    rows = []
    for seed, instrument in progress.track(plan, "leaderboard"):
        facts = instrument.run(subjects[seed], progress=Progress()).facts
        rows.append(
            {
                "method": str(instrument.method),
                "asked": instrument.sparsity,
                "seed": seed,
                **{
                    k: v
                    for k, v in facts.items()
                    if k in ("sparsity", "loss", "accuracy", "dense_loss", "dense_accuracy", "perplexity")
                },
            }
        )
    return pd.DataFrame(rows)


def summary(board: pd.DataFrame, value: str = "loss") -> pd.DataFrame:
    """Mean over seeds and half width of the 95 % t interval (NaN for a single seed),
    best first at the largest sparsity.
    """
    from scipy.stats import t

    grouped = board.groupby(["method", "asked"])[value].agg(["mean", "std", "count"]).reset_index()
    grouped["half_width"] = (
        t.ppf(0.975, np.maximum(grouped["count"] - 1, 1)) * grouped["std"] / np.sqrt(grouped["count"])
    )
    last = grouped[grouped.asked == grouped.asked.max()].set_index("method")["mean"]
    order = grouped.method.map(last)
    ordered = grouped.assign(order=order).sort_values(
        ["order", "asked"], ascending=[value != "accuracy", True]
    )
    return ordered.drop(columns=["order", "std"]).reset_index(drop=True)


def curves(board: pd.DataFrame, value: str = "loss") -> go.Figure:
    """Mean over seeds against sparsity, one curve a method, with intervals."""
    from workbench.figures import figure, line, rule

    table = summary(board, value)
    units = {"loss": "test loss (nats)", "accuracy": "test accuracy"}
    fig = figure(
        f"{value.capitalize()} against sparsity, {board.seed.nunique()} seeds",
        x="share of weights removed",
        y=units.get(value, value),
    )
    for method in table.method.unique():
        mine = table[table.method == method]
        band = (
            (mine["mean"] - mine.half_width, mine["mean"] + mine.half_width)
            if mine.half_width.notna().all()
            else None
        )
        line(fig, mine.asked, mine["mean"], str(method), band=band)
    dense = f"dense_{value}"
    if dense in board:
        rule(fig, "dense", y=float(board[dense].mean()))
    return fig
