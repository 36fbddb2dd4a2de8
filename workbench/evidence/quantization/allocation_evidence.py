"""The measurements behind the cards of widths that differ from layer to layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from workbench.evidence.harness import SEEDS, below, interval, together
from workbench.evidence.quantization.evidence import opened
from workbench.evidence.quantization.leaderboard import redrawn
from workbench.progress import Progress
from workbench.quantization.allocation.allocate import Allocate

ALLOCATED: dict[str, Any] = dict(
    budget=3.0,
    widths=[2, 3, 4, 8],
    group_size=4096,
    calibration_examples=64,
    predict_examples=128,
    draws=1,
    test_examples=1024,
)


def allocations(
    sensitivity: Literal["gauss-newton", "trace", "eigenvalue", "variance", "linearity"],
    subjects: tuple[str, ...] = ("bytelm", "minilm-docstrings"),
    seeds: tuple[int, ...] = SEEDS,
    **more: Any,
) -> Callable[[str, Progress], dict[str, Any]]:
    """Average of 3 bits, GPTQ with a zero point and a scale a row:
    the allocation against uniform, random and reversed at the same size.
    """

    def measure(name: str, progress: Progress) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        settings = ALLOCATED | {"sensitivity": sensitivity} | more
        for subject in subjects:
            for seed in progress.track(seeds, f"{name} on {subject}"):
                instrument = Allocate(**settings, seed=seed)
                facts = instrument.run(
                    redrawn(opened(subject), seed, ALLOCATED["predict_examples"]), Progress()
                ).facts
                rows.append(
                    {"subject": subject, "seed": seed}
                    | {
                        k: facts[k]
                        for k in ("dense_loss", "loss", "uniform_loss", "random_loss", "reversed_loss")
                    }
                )
        notes, held = [], []
        for subject in subjects:
            mine = [r for r in rows if r["subject"] == subject]
            for rival in ("uniform", "random", "reversed"):
                mean, low, high = interval([r["loss"] - r[f"{rival}_loss"] for r in mine])
                held.append(below(low, high))
                notes.append(f"{subject} minus {rival} {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
        return {
            "holds": together(held),
            "note": "; ".join(notes),
            "rows": rows,
            "settings": settings,
            "seeds": list(seeds),
        }

    return measure


def interactions(name: str, progress: Progress) -> dict[str, Any]:
    """Average of 3 bits on the bytelm: the allocation that knows what pairs of layers cost against
    the additive one of the same size.
    """
    rows = []
    settings: dict[str, Any] = ALLOCATED | {"sensitivity.interactions": True, "draws": 0}
    for seed in progress.track(SEEDS, name):
        facts = (
            Allocate(**settings, seed=seed)
            .run(redrawn(opened("bytelm"), seed, ALLOCATED["predict_examples"]), Progress())
            .facts
        )
        rows.append({"seed": seed, "joint": facts["loss"], "additive": facts["additive_loss"]})
    mean, low, high = interval([r["joint"] - r["additive"] for r in rows])
    return {
        "holds": below(low, high),
        "note": (
            f"bytelm at 3 bits on average, minus the additive allocation {mean:+.4f} [{low:+.4f}, "
            f"{high:+.4f}] nats"
        ),
        "rows": rows,
        "settings": settings,
        "seeds": list(SEEDS),
    }
