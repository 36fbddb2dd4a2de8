"""Measurements of studies rather than methods: bfloat16 training, what matters to learned roundings,
learned binary points.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from workbench.evidence.harness import SEEDS, interval
from workbench.evidence.quantization.evidence import opened
from workbench.evidence.quantization.leaderboard import redrawn
from workbench.evidence.training.evidence import told, tuned
from workbench.progress import Progress
from workbench.quantization.quantize import Quantize
from workbench.quantization.trained.train_quantized import TrainQuantized
from workbench.training.loop import fit as fit_weights

TRAINED: dict[str, Any] = {"steps": 150, "batch_size": 64}
RATE, TEST = 1e-3, 512
LEARNED = ("adaround", "flexround", "signround", "adaquant")


def half_precision(name: str, progress: Progress) -> dict[str, Any]:
    """The digits transformer from random weights with forward and backward passes in bfloat16 and float32
    weights, against float32 throughout.
    """
    settings: dict[str, Any] = {"steps": 300, "batch_size": 32}
    rates = (1e-3, 3e-3, 1e-2)
    found = {
        arm: tuned(opened("digits-vit"), rates, settings | fields, progress, f"{name}: {arm}")
        for arm, fields in {"fp32": {}, "bf16": {"precision": "bf16"}}.items()
    }
    spread = float(np.std(found["fp32"]["values"], ddof=1))
    mean, low, high = interval(
        [a - b for a, b in zip(found["bf16"]["values"], found["fp32"]["values"], strict=True)]
    )
    note = (
        f"digits-vit from random weights, bf16 minus fp32 {mean:+.4f} [{low:+.4f}, {high:+.4f}] nats; "
        f"fp32's standard deviation over seeds {spread:.4f}"
    )
    return {
        "holds": abs(mean) < spread,
        "note": note,
        "found": told(found),
        "settings": settings,
        "rates": list(rates),
    }


def what_matters(name: str, progress: Progress) -> dict[str, Any]:
    """Test loss of the digits transformer at 3 bits over {learned rounding} x {layer, block} x {64, 256
    calibration examples} x three draws of them: how far the mean moves between the levels of each factor."""
    rows = []
    shared: dict[str, Any] = {
        "format": "int3",
        "granularity": "channel",
        "rounding.steps": 100,
        "predict_examples": 0,
        "test_examples": TEST,
    }
    grid = list(itertools.product(LEARNED, ("layer", "block"), (64, 256), SEEDS))
    for rounding, objective, examples, seed in progress.track(grid, name):
        on = redrawn(opened("digits-vit"), seed, examples)
        fields = {
            "rounding": rounding,
            "rounding.objective": objective,
            "calibration_examples": examples,
            "seed": seed,
        }
        rows.append(fields | {"loss": float(Quantize(**(shared | fields)).run(on, Progress()).facts["loss"])})
    effects = {}
    for factor in ("rounding", "rounding.objective", "calibration_examples", "seed"):
        means = [
            float(np.mean([r["loss"] for r in rows if r[factor] == level]))
            for level in dict.fromkeys(r[factor] for r in rows)
        ]
        effects[factor] = max(means) - min(means)
    note = (
        "digits-vit, 3 bits, largest minus smallest mean loss: "
        + ", ".join(f"{factor} {found:.4f}" for factor, found in effects.items())
        + " nats"
    )
    return {
        "holds": effects["rounding"] > max(effects["calibration_examples"], effects["seed"]),
        "note": note,
        "effects": effects,
        "rows": rows,
        "settings": shared,
        "seeds": list(SEEDS),
    }


def binary_points(name: str, progress: Progress) -> dict[str, Any]:
    """The digits transformer in fixed point of 8, 6 and 4 bits, each tensor's binary point trained, against
    as many dense steps and then the one binary point for all tensors with the least validation loss; and at 8
    bits with one, two and three signed powers of two a weight.
    """
    on = opened("digits-vit")
    rows: list[dict[str, Any]] = []
    for seed in progress.track(SEEDS, name):
        dense = on.copy()
        fit_weights(
            dense,
            steps=TRAINED["steps"],
            batch_size=TRAINED["batch_size"],
            learning_rate=RATE,
            weight_decay=0.0,
            schedule="linear",
            warmup=0.0,
            seed=seed,
        )
        for bits in (8, 6, 4):
            found = {}
            for fraction in range(2, 9):
                rounded = Quantize(
                    format=f"fixed{bits}.{fraction}",
                    calibration_examples=8,
                    predict_examples=0,
                    test_examples=TEST,
                    seed=seed,
                ).run(dense, Progress(), cache=False)
                assert rounded.subject is not None
                found[rounded.subject.evaluate("validation", limit=TEST)["loss"]] = (
                    fraction,
                    float(rounded.facts["loss"]),
                )
            fraction, loss = found[min(found)]
            rows.append({"seed": seed, "side": f"{bits} bits, one point", "loss": loss, "fraction": fraction})
        for bits, terms in ((8, 0), (6, 0), (4, 0), (8, 1), (8, 2), (8, 3)):
            trained = TrainQuantized(
                **TRAINED,
                method={"name": "fixed", "bits": bits, "nonzero_bits": terms},
                learning_rate=RATE,
                test_examples=TEST,
                seed=seed,
            ).run(on, Progress(), cache=False)
            side = f"{bits} bits, trained" + (f", {terms} powers" if terms else "")
            rows.append(
                {
                    "seed": seed,
                    "side": side,
                    "loss": float(trained.facts["loss"]),
                    "accuracy": float(trained.facts["accuracy"]),
                }
            )

    def losses(side: str) -> list[float]:
        return [r["loss"] for r in rows if r["side"] == side]

    gaps = {
        bits: interval(
            [
                a - b
                for a, b in zip(
                    losses(f"{bits} bits, trained"), losses(f"{bits} bits, one point"), strict=True
                )
            ]
        )
        for bits in (8, 6, 4)
    }
    powers = {terms: float(np.mean(losses(f"8 bits, trained, {terms} powers"))) for terms in (1, 2, 3)}
    note = "digits-vit, trained minus one point after as many dense steps: " + ", ".join(
        f"{b} bits {m:+.4f} [{low:+.4f}, {high:+.4f}]" for b, (m, low, high) in gaps.items()
    )
    note += (
        " nats; loss with 1, 2, 3 powers of two "
        + ", ".join(f"{v:.4f}" for v in powers.values())
        + f", any {np.mean(losses('8 bits, trained')):.4f}"
    )
    return {
        "holds": gaps[4][0] < 0,
        "note": note,
        "rows": rows,
        "settings": TRAINED | {"learning_rate": RATE},
        "seeds": list(SEEDS),
    }
