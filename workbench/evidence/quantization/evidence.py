"""Measurements that test the claims of the quantization methods' cards.

Comparisons share everything but the method: subject, layers, bits, granularity, calibration examples, test
examples. The three seeds draw three calibration sets from the training split (and seed the roundings);
intervals are Student's t over the seeds' paired differences. Nothing is tuned on the test split;
learned roundings get the steps written in the record.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

import workbench
from workbench.evidence.harness import SEEDS, below, interval, together
from workbench.evidence.quantization.leaderboard import redrawn
from workbench.progress import Progress
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import fit
from workbench.quantization.quantize import Quantize
from workbench.subjects import Subject

CALIBRATION, TEST = 64, 256
ROUNDED_INPUTS = (
    64  # test examples where inputs are rounded as well, which takes several times a forward pass
)


@functools.cache
def opened(name: str) -> Subject:
    return workbench.subject(name)


@functools.cache
def drawn(name: str, seed: int) -> Subject:
    """The subject with a calibration split drawn anew from its training split."""
    return redrawn(opened(name), seed, CALIBRATION)


def loss_of(fields: Mapping[str, Any], subject: str, seed: int, test_examples: int = TEST) -> float:
    """Test loss after quantizing with one calibration draw;
    the result cache shares comparators between cards.
    """
    common = {
        "calibration_examples": CALIBRATION,
        "predict_examples": 0,
        "test_examples": test_examples,
        "format": "int3",
        "seed": seed,
    }
    return float(Quantize(**(common | dict(fields))).run(drawn(subject, seed), Progress()).facts["loss"])


@functools.cache
def dense_loss(subject: str, test_examples: int = TEST) -> float:
    return opened(subject).evaluate("test", limit=test_examples)["loss"]


def against(
    method: Mapping[str, Any],
    comparator: Mapping[str, Any],
    subjects: tuple[str, ...] = ("minilm-docstrings", "bytelm"),
    test_examples: int = TEST,
) -> Callable[[str, Progress], dict[str, Any]]:
    """A measurement: test loss of one setting minus another's on the same draws;
    holds when its 95 % interval lies below 0 on every subject.
    """

    def measure(name: str, progress: Progress) -> dict[str, Any]:
        rows, held, notes = [], [], []
        for subject in subjects:
            losses: dict[str, list[float]] = {"method": [], "comparator": []}
            for seed in progress.track(SEEDS, f"{name} on {subject}"):
                for key, fields in (("method", method), ("comparator", comparator)):
                    losses[key].append(loss_of(fields, subject, seed, test_examples))
            mean, low, high = interval(
                [a - b for a, b in zip(losses["method"], losses["comparator"], strict=True)]
            )
            dense = dense_loss(subject, test_examples)
            rows.append(
                {
                    "subject": subject,
                    "dense_loss": dense,
                    **losses,
                    "difference": mean,
                    "low": low,
                    "high": high,
                }
            )
            held.append(below(low, high))
            notes.append(f"{subject} {mean:+.4f} [{low:+.4f}, {high:+.4f}] nats")
        return {
            "holds": together(held),
            "note": "; ".join(notes),
            "rows": rows,
            "settings": dict(method),
            "against": dict(comparator),
            "test_examples": test_examples,
            "calibration_examples": CALIBRATION,
            "seeds": list(SEEDS),
        }

    return measure


def number_formats(name: str, progress: Progress) -> dict[str, Any]:
    """Weight noise of 8-bit formats over the bytelm's matrices, one scale a tensor,
    with the input noise of the heavy-tailed activations.
    """
    from workbench.quantization.activations.activations import ActivationQuant

    on = opened("bytelm")
    inputs: dict[str, torch.Tensor] = {}
    layers = on.layers()
    from workbench.quantization.activations.sequential import collecting

    with torch.no_grad(), collecting(on, layers) as (_, seen):
        on.task.output(on.model, next(on.batches("calibration", 4)))
    for (key, _), found in seen.items():
        inputs[key] = torch.cat(found).float()
    rows: list[dict[str, Any]] = []
    for layer in progress.track(layers, name):
        weight, x = layer.weight.detach().float(), inputs[layer.name]
        for format in ("int8", "e4m3fn", "e5m2", "e3m4"):
            low, high = x.min(), x.max()
            rounded = ActivationQuant(low, high, format=format, granularity="tensor").round(x)
            rows.append(
                {
                    "layer": layer.name,
                    "format": format,
                    "weight_error": float(
                        (fit(weight, named(format), "tensor").round(weight) - weight).square().sum()
                        / weight.square().sum()
                    ),
                    "input_error": float((rounded - x).square().sum() / x.square().sum()),
                }
            )
    means = {
        f: {
            k: float(np.mean([r[k] for r in rows if r["format"] == f]))
            for k in ("weight_error", "input_error")
        }
        for f in ("int8", "e4m3fn", "e5m2", "e3m4")
    }
    outlying = [key for key, x in inputs.items() if x.abs().max() > 60 * x.std()]
    holds = (
        means["e4m3fn"]["weight_error"] < means["e5m2"]["weight_error"]
        and means["e4m3fn"]["input_error"] < means["e5m2"]["input_error"]
    )
    note = ", ".join(
        f"{f}: weights {m['weight_error']:.2e}, inputs {m['input_error']:.2e}" for f, m in means.items()
    )
    return {
        "holds": bool(holds),
        "note": note + f"; {len(outlying)} layers with inputs beyond 60 standard deviations",
        "means": means,
        "rows": rows,
    }
