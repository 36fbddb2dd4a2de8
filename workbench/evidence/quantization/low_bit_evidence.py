"""Measurements of methods below three bits, at bits counted with masks, scales and factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from workbench.evidence.harness import SEEDS, interval
from workbench.evidence.quantization.evidence import TEST, dense_loss, drawn
from workbench.progress import Progress
from workbench.quantization.number.split_grid import effective_bits
from workbench.quantization.quantize import Quantize
from workbench.quantization.trained.train_quantized import TrainQuantized
from workbench.subjects import Layer, Subject

CALIBRATION = 32
SHARED: dict[str, Any] = {
    "granularity": "channel",
    "calibration_examples": CALIBRATION,
    "predict_examples": 0,
    "test_examples": TEST,
}
BINARISED = SHARED | {"format": "binary", "range": "centred", "salient": "columns", "salient.share": 0.2}
LAYER = BINARISED | {"rounding": "scales", "rounding.steps": 40}
BLOCK = LAYER | {"rounding.objective": "block"}
RESTORING: dict[str, Any] = {"method": "adapters", "steps": 40, "batch_size": 4, "test_examples": 64}
RATES = (3e-4, 1e-3, 3e-3)


def share_of_single_weights(layers: Sequence[Layer], columns: float = 0.2) -> float:
    """The largest share of weights, chosen one by one, that takes no more bits on these layers than a share
    of whole input features.
    """
    sizes = [(layer.shape[-2], layer.shape[-1]) for layer in layers]

    def average(share: float, pattern: str) -> float:
        return float(
            np.average(
                [effective_bits(*size, share, pattern=pattern) for size in sizes],
                weights=[np.prod(size) for size in sizes],
            )
        )

    budget = average(columns, "columns")
    return max(
        share for share in np.arange(0.005, columns, 0.0025).tolist() if average(share, "weights") <= budget
    )


def restored(on: Subject, rate: float, seed: int) -> tuple[Subject, float]:
    """(the subject with low-rank terms trained beside its binarised weights and added to them, their
    validation loss).
    """
    beginning = Quantize(**BINARISED, adapter={"name": "qlora", "rank": 8}, seed=seed)
    start = beginning.run(on, Progress()).subject
    tuned = TrainQuantized(**RESTORING, learning_rate=rate, seed=seed).run(start, Progress())
    assert tuned.subject is not None
    return tuned.subject, float(tuned.table["validation_loss"].dropna().iloc[-1])


def binarised(name: str, progress: Progress) -> dict[str, Any]:
    """Test loss and bits a weight of the bytelm: two bits by nearest rounding, then PTQ1.61's steps one by
    one, and single salient weights at the same bits. The rate of the restoring adapters is the one with
    the least validation loss of the first seed.
    """
    rows: list[dict[str, Any]] = []
    tuning: dict[str, float] = {}
    settings: dict[str, dict[str, Any]] = {
        "nearest, 2 bits": SHARED | {"format": "uint2"},
        "nearest, 2 bits, clipped": SHARED | {"format": "uint2", "range": "mse"},
        "binary": SHARED | {"format": "binary", "range": "centred"},
        "salient columns": BINARISED,
        "salient weights": BINARISED | {"salient": "weights"},
        "scales of a layer": LAYER,
        "scales of a block": BLOCK,
        "restored": LAYER,
    }
    for seed in progress.track(SEEDS, name):
        on = drawn("bytelm", seed)
        settings["salient weights"]["salient.share"] = share_of_single_weights(on.layers("blocks"))
        for step, fields in settings.items():
            start = on
            if step == "restored":
                tuning = tuning or {f"{rate:g}": restored(on, rate, seed)[1] for rate in RATES}
                start, _ = restored(on, float(min(tuning, key=lambda rate: tuning[rate])), seed)
            facts = Quantize(**fields, seed=seed).run(start, Progress()).facts
            rows.append(
                {
                    "seed": seed,
                    "step": step,
                    "loss": float(facts["loss"]),
                    "bits": float(facts["average_bits"]),
                    "salient_share": fields.get("salient.share", 0.0),
                }
            )
    losses = {step: [r["loss"] for r in rows if r["step"] == step] for step in settings}
    pairs = [
        ("salient columns", "binary"),
        ("scales of a layer", "salient columns"),
        ("scales of a block", "scales of a layer"),
        ("restored", "scales of a layer"),
        ("salient columns", "salient weights"),
        ("scales of a block", "nearest, 2 bits"),
        ("scales of a block", "nearest, 2 bits, clipped"),
    ]
    gaps = {
        f"{first} minus {second}": interval(
            [a - b for a, b in zip(losses[first], losses[second], strict=True)]
        )
        for first, second in pairs
    }
    bits = {step: float(np.mean([r["bits"] for r in rows if r["step"] == step])) for step in settings}
    note = "bytelm, " + "; ".join(f"{pair} {m:+.3f} [{a:+.3f}, {b:+.3f}]" for pair, (m, a, b) in gaps.items())
    return {
        "holds": all(mean < 0 for pair, (mean, _, _) in gaps.items() if not pair.endswith("clipped")),
        "note": note + " nats; bits " + ", ".join(f"{step} {found:.2f}" for step, found in bits.items()),
        "rows": rows,
        "means": {step: float(np.mean(found)) for step, found in losses.items()},
        "dense_loss": dense_loss("bytelm"),
        "settings": settings,
        "restoring": RESTORING,
        "validation_loss": tuning,
        "calibration_examples": CALIBRATION,
        "test_examples": TEST,
        "seeds": list(SEEDS),
    }
