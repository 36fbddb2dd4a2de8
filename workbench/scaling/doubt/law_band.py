"""Several laws drawn as one band along compute, each marked where it leaves the data it was published on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from workbench.progress import Progress
from workbench.scaling.doubt.prediction import PredictionIntervals
from workbench.scaling.doubt.stacking import Stack, fitted_members, stacked
from workbench.scaling.formulas.laws import Law

#: What the band itself is called among the laws.
TOGETHER = "all, weighed"
#: How far beyond the largest run the band is drawn, and in how many steps.
REACH, POINTS = 100.0, 60


def beside(
    coming: PredictionIntervals,
    others: Sequence[Law],
    runs: pd.DataFrame,
    starts: int,
    seed: int,
    progress: Progress,
) -> Stack:
    """A fitted law whose intervals are known, stacked with other laws on the same runs."""
    found = coming.fit
    usable = [one for one in others if one.target == found.law.target]
    members, left_out = fitted_members(usable, runs, found.objective, starts, seed=seed, progress=progress)
    if not found.certificate.converged and members:
        return stacked(members, left_out | {found.law.name: found.certificate.text})
    return stacked([coming, *members], left_out)


def law_tables(stack: Stack, runs: pd.DataFrame, level: float) -> dict[str, pd.DataFrame]:
    """`laws`, their weights, and `law_band` where it can be drawn."""
    band = law_band(stack, runs, level)
    return {"laws": stack.table} | ({} if band is None else {"law_band": band})


def law_band(stack: Stack, runs: pd.DataFrame, level: float) -> pd.DataFrame | None:
    """The plausible laws and their band from the least compute to a hundred times the most, at the tokens per
    parameter of the run of most compute and, in other columns, at the runs' median.

    Columns flops, params, tokens, law, weight, predicted, low, high (the band's alone), beyond (see
    `Law.beyond`). None for runs without params and tokens.
    """
    if not {"params", "tokens"} <= set(runs):
        return None
    compute = 6.0 * runs.params.to_numpy() * runs.tokens.to_numpy()
    largest = runs.iloc[int(compute.argmax())]
    flops = np.geomspace(compute.min(), REACH * compute.max(), POINTS)
    path = pd.DataFrame({"flops": flops})
    path["params"] = np.sqrt(flops / 6.0 * largest.params / largest.tokens)
    path["tokens"] = flops / 6.0 / path.params
    for name in {c for m in stack.members for c in m.fit.law.columns} - set(path):
        path[name] = float(runs[name].median())
    parts = [
        path.assign(
            law=stack.names[k],
            weight=stack.weights[k],
            predicted=stack.members[k].fit.predict(path),
            beyond=np.broadcast_to(stack.members[k].fit.law.beyond(path), POINTS),
        )
        for k in stack.plausible
    ]
    band = stack.band(path, level)
    whole = path.assign(law=TOGETHER, weight=1.0, predicted=band.predicted, low=band.low, high=band.high)
    return pd.concat([whole, *parts], ignore_index=True)
