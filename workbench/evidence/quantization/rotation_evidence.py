"""The measurements behind the cards of rotations of the residual stream."""

from __future__ import annotations

from typing import Any

from workbench.evidence.harness import SEEDS, below, interval
from workbench.evidence.quantization.evidence import ROUNDED_INPUTS, opened
from workbench.progress import Progress
from workbench.quantization.quantize import Quantize
from workbench.quantization.rotation.rotate import Rotate


def learned_rotations(name: str, progress: Progress) -> dict[str, Any]:
    """Four-bit weights and activations of the bytelm after learned rotations of the stream and the heads,
    against the Hadamard rotations they started from; GPTQ, down-projections turned online in both.
    """
    rows, on = [], opened("bytelm")
    settings = Quantize(
        format="int4",
        granularity="channel",
        rounding="gptq",
        transform={"name": "hadamard", "only": "*.down_proj"},
        activations={"name": "token", "format": "uint4"},
        calibration_examples=16,
        predict_examples=0,
        test_examples=ROUNDED_INPUTS,
    )
    learning: dict[str, Any] = {
        "kind": {"name": "learned", "steps": 40, "activation_bits": 4, "online": True},
        "calibration_examples": 32,
    }
    for seed in progress.track(SEEDS, name):
        losses = [
            float(
                settings.run(Rotate(**fields, seed=seed).run(on, Progress()).subject, Progress()).facts[
                    "loss"
                ]
            )
            for fields in (learning, {"kind": "hadamard", "kind.heads": True, "calibration_examples": 16})
        ]
        rows.append({"seed": seed, "learned": losses[0], "hadamard": losses[1]})
    mean, low, high = interval([r["learned"] - r["hadamard"] for r in rows])
    return {
        "holds": below(low, high),
        "note": (
            f"bytelm W4A4, {ROUNDED_INPUTS} test examples, learned minus Hadamard {mean:+.4f} [{low:+.4f}, "
            f"{high:+.4f}] nats"
        ),
        "rows": rows,
        "settings": learning,
        "test_examples": ROUNDED_INPUTS,
        "seeds": list(SEEDS),
    }
