"""Measurements of methods below three bits, at bits counted with masks, scales and factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from workbench.instruments import Progress
from workbench.quantization.aware import TrainQuantized
from workbench.quantization.evidence import CALIBRATION, SEEDS, TEST, dense_loss, drawn, interval
from workbench.quantization.quantize import Quantize
from workbench.quantization.salient import effective_bits
from workbench.subjects import Layer, Subject

SHARED: dict[str, Any] = {"granularity": "channel", "examples": CALIBRATION, "predict_examples": 0, "test_examples": TEST}
BINARISED = SHARED | {"format": "binary", "range": "centred", "salient_share": 0.2}
LAYER = BINARISED | {"rounding": "scales", "steps": 60}
BLOCK = LAYER | {"objective": "block", "sequential": True, "steps": 100}
RESTORING: dict[str, Any] = {"method": "adapters", "steps": 40, "batch_size": 4, "test_examples": 64}
RATES = (1e-4, 3e-4, 1e-3)


def share_of_single_weights(layers: Sequence[Layer], columns: float = 0.2) -> float:
    """The largest share of weights, chosen one by one, that takes no more bits on these layers than a share of whole input features."""
    sizes = [layer.shape[-2:] for layer in layers]

    def average(share: float, pattern: str) -> float:
        return float(np.average([effective_bits(*size, share, pattern=pattern) for size in sizes], weights=[np.prod(size) for size in sizes]))

    budget = average(columns, "columns")
    return max(share for share in np.arange(0.005, columns, 0.0025).tolist() if average(share, "weights") <= budget)


def restored(on: Subject, rate: float, seed: int) -> tuple[Subject, float]:
    """(the subject with low-rank terms trained beside its binarised weights and added to them, their validation loss)."""
    start = Quantize(**BINARISED, adapter_rank=8, adapter_steps=0, seed=seed).run(on, Progress()).subject
    tuned = TrainQuantized(**RESTORING, learning_rate=rate, seed=seed).run(start, Progress())
    return tuned.subject, float(tuned.table["validation_loss"].dropna().iloc[-1])


def binarised(name: str, progress: Progress) -> dict[str, Any]:
    """Test loss and bits a weight: two bits by nearest rounding, then PTQ1.61's steps one by one, and single salient weights at the same bits.

    The learned scales of a block and the restored weights are measured on the bytelm alone. The rate of the restoring adapters is the one
    with the least validation loss of the first seed.
    """
    rows: list[dict[str, Any]] = []
    tuning: dict[str, float] = {}
    settings: dict[str, dict[str, Any]] = {
        "nearest, 2 bits": SHARED | {"bits": 2, "symmetric": False}, "nearest, 2 bits, clipped": SHARED | {"bits": 2, "symmetric": False, "range": "mse"},
        "binary": BINARISED | {"salient_share": 0.0}, "salient columns": BINARISED, "salient weights": BINARISED | {"salient_pattern": "weights"},
        "scales of a layer": LAYER, "scales of a block": BLOCK, "restored": BLOCK,
    }  # fmt: skip
    for subject in ("bytelm", "minilm-docstrings"):
        for seed in progress.track(SEEDS, f"{name} on {subject}"):
            on = drawn(subject, seed)
            settings["salient weights"]["salient_share"] = share_of_single_weights(on.layers("blocks"))
            for step, fields in settings.items():
                if subject != "bytelm" and step in ("scales of a block", "restored"):
                    continue
                start = on
                if step == "restored":
                    tuning = tuning or {f"{rate:g}": restored(on, rate, seed)[1] for rate in RATES}
                    start, _ = restored(on, float(min(tuning, key=lambda rate: tuning[rate])), seed)
                facts = Quantize(**fields, seed=seed).run(start, Progress()).facts
                rows.append({"subject": subject, "seed": seed, "step": step, "loss": float(facts["loss"]), "bits": float(facts["average_bits"]),
                             "salient_share": fields.get("salient_share", 0.0)})  # fmt: skip
    pairs = [("salient columns", "binary"), ("salient columns", "salient weights"), ("scales of a layer", "salient columns"), ("scales of a layer", "nearest, 2 bits"),
             ("scales of a block", "scales of a layer"), ("scales of a block", "nearest, 2 bits"), ("restored", "scales of a block")]  # fmt: skip
    holds, notes, differences = True, [], []
    for subject in ("bytelm", "minilm-docstrings"):
        losses = {step: [r["loss"] for r in rows if r["subject"] == subject and r["step"] == step] for step in settings}
        last = "scales of a block" if losses["scales of a block"] else "scales of a layer"
        for first, second in pairs:
            if losses[first]:
                mean, low, high = interval([a - b for a, b in zip(losses[first], losses[second], strict=True)])
                # A step is compared with the one before it, and only the last learned scales with two bits.
                holds &= mean < 0 or (second == "nearest, 2 bits" and first != last)
                notes.append(f"{subject} {first} minus {second} {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
                differences.append({"subject": subject, "first": first, "second": second, "mean": mean, "low": low, "high": high})
    bits = {step: float(np.mean([r["bits"] for r in rows if r["subject"] == "bytelm" and r["step"] == step])) for step in settings}
    return {"holds": bool(holds), "note": "; ".join(notes) + " nats; bits on the bytelm " + ", ".join(f"{k} {v:.2f}" for k, v in bits.items()), "rows": rows,
            "differences": differences, "dense_loss": {subject: dense_loss(subject) for subject in ("bytelm", "minilm-docstrings")}, "settings": settings,
            "restoring": RESTORING, "validation_loss": tuning, "calibration_examples": CALIBRATION, "test_examples": TEST, "seeds": list(SEEDS)}  # fmt: skip
