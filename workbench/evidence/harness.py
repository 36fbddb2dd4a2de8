"""How a claim is measured: arms run on the same subjects and seeds, judged pair by pair."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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


def below(low: float, high: float, margin: float = 0.0) -> bool | None:
    """Whether what lies in a 95 % interval is below a margin: None while the interval holds both answers, or
    is none: a single value, or equal ones, which are one value found several times.
    """
    if low == high:
        return None
    if high < margin:
        return True
    return False if low > margin else None


def judged(differences: Sequence[float], margin: float = 0.0) -> dict[str, Any]:
    """Paired differences, and whether they are below a margin: what a claim's record holds of them."""
    return {
        "difference": summary(differences),
        "holds": below(*interval(differences)[1:], margin),
        "in_every_seed": bool((np.asarray(differences) < margin).all()),
    }


def together(found: Iterable[bool | None]) -> bool | None:
    """Whether all of it holds: no, when one does not; None, when one is undecided."""
    answers = list(found)
    if any(answer is False for answer in answers):
        return False
    return None if any(answer is None for answer in answers) else True


def words(claims: Iterable[tuple[str, bool | None]]) -> str:
    """The claims that fail and those that the intervals leave open."""
    claims = list(claims)
    failed = [claim for claim, holds in claims if holds is False]
    undecided = list(dict.fromkeys(claim for claim, holds in claims if holds is None))
    parts = [f"failed: {', '.join(failed)}"] if failed else []
    return "; ".join(parts + ([f"undecided: {', '.join(undecided)}"] if undecided else []))


def compare(
    name: str,
    progress: Progress,
    *,
    arms: dict[str, dict[str, Any]],
    claims: Sequence[tuple[str, str]],
    subject: str = "digits-vit",
    seeds: Sequence[int] = SEEDS,
) -> dict[str, Any]:
    """Run all arms; a claim (better, worse) holds when the better arm's loss is lower, with its 95 % interval
    over the seeds. Paired by seed.
    """
    measured = {label: losses(fields, progress, subject, seeds) for label, fields in arms.items()}
    checked: list[dict[str, Any]] = []
    for better, worse in claims:
        difference = np.subtract(measured[better]["loss"]["values"], measured[worse]["loss"]["values"])
        checked.append({"better": better, "worse": worse} | judged(difference.tolist()))
    left = words((f"{c['better']} < {c['worse']}", c["holds"]) for c in checked)
    means = ", ".join(f"{label} {m['loss']['mean']:.3f}" for label, m in measured.items())
    return {
        "subject": subject,
        "arms": measured,
        "claims": checked,
        "holds": together(c["holds"] for c in checked),
        "note": "; ".join(part for part in (f"test loss: {means}", left) if part),
    }
