"""How a claim is measured: arms run on the same subjects and seeds, judged pair by pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from workbench.progress import Progress

SEEDS = (0, 1, 2)


def digits(seed: int, progress: Progress) -> Any:
    import workbench

    return workbench.subject("digits-vit", seed=seed, progress=progress)


def losses(
    fields: dict[str, Any], progress: Progress, subject: str = "digits-vit", seeds: Sequence[int] = SEEDS
) -> dict[str, Any]:
    """Test loss and accuracy of one pruning for every seed,
    with mean and the half width of a 95 % t interval.
    """
    import workbench
    from workbench.pruning.prune import Prune

    found = []
    for seed in seeds:
        on = (
            digits(seed, progress)
            if subject == "digits-vit"
            else workbench.subject(subject, progress=progress)
        )
        found.append(Prune(**({"predict_examples": 0, "seed": seed} | fields)).run(on, progress).facts)
    return {
        "fields": fields,
        "loss": summary([f["loss"] for f in found]),
        "accuracy": summary([f.get("accuracy", float("nan")) for f in found]),
        "dense_loss": summary([f["dense_loss"] for f in found]),
        "sparsity": found[0]["sparsity"],
        **({"speedup": summary([f["speedup"] for f in found])} if "speedup" in found[0] else {}),
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, half width of the 95 % t interval (None for a single value) and the values."""
    from scipy.stats import t

    array = np.asarray(values, dtype=float)
    half = (
        float(t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5)
        if len(array) > 1
        else None
    )
    return {"mean": float(array.mean()), "half_width": half, "values": [float(v) for v in array]}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of the 95 % t interval; NaN ends for a single value."""
    found = summary(values)
    half = found["half_width"] if found["half_width"] is not None else math.nan
    return found["mean"], found["mean"] - half, found["mean"] + half


def compare(
    name: str,
    progress: Progress,
    *,
    arms: dict[str, dict[str, Any]],
    claims: Sequence[tuple[str, str]],
    subject: str = "digits-vit",
    seeds: Sequence[int] = SEEDS,
) -> dict[str, Any]:
    """Run all arms; a claim (better, worse) holds when the better arm's mean loss is lower.
    Paired by seed.
    """
    measured = {label: losses(fields, progress, subject, seeds) for label, fields in arms.items()}
    checked = []
    for better, worse in claims:
        difference = np.subtract(measured[better]["loss"]["values"], measured[worse]["loss"]["values"])
        checked.append(
            {
                "better": better,
                "worse": worse,
                "difference": summary(difference.tolist()),
                "holds": bool(difference.mean() < 0),
                "in_every_seed": bool((difference < 0).all()),
            }
        )
    failed = [f"{c['better']} < {c['worse']}" for c in checked if not c["holds"]]
    means = ", ".join(f"{label} {m['loss']['mean']:.3f}" for label, m in measured.items())
    return {
        "subject": subject,
        "arms": measured,
        "claims": checked,
        "holds": not failed,
        "note": f"test loss: {means}" + (f"; failed: {'; '.join(failed)}" if failed else ""),
    }
