"""The measurement behind HALO's card: training with quantized products by level of rotation,
and the operands of a real model's products.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.evidence.harness import interval
from workbench.evidence.quantization.evidence import opened
from workbench.evidence.training.evidence import told, tuned
from workbench.progress import Progress
from workbench.quantization.number.formats import named
from workbench.statistics import InputCapture
from workbench.subjects import Subject
from workbench.training.quantized_products import LEVELS, relative_errors

STEPS, BATCH = 400, 32
RATES = (1e-3, 3e-3, 1e-2)
FORMATS = ("int6", "int4")


def rotated_products(name: str, progress: Progress) -> dict[str, Any]:
    """Card measurement: the digits transformer from random weights, every arm with as many learning rates
    tuned on validation, test loss over three seeds; beside it the relative errors of the operands
    and products of the MiniLM's encoder, one batch.

    The claim holds when at int6 both levels end nearer to the full-precision loss than no rotation,
    paired by seed, beyond a 95 % interval.
    """
    on = opened("digits-vit")
    arms: dict[str, dict[str, Any]] = {"fp32": {}} | {
        f"{f} level {level}": {"precision": f, "rotation": level} for f in FORMATS for level in LEVELS
    }
    found = {
        arm: tuned(on, RATES, {"steps": STEPS, "batch_size": BATCH} | fields, progress, f"{name}: {arm}")
        for arm, fields in arms.items()
    }
    gaps = {
        arm: interval([a - b for a, b in zip(record["values"], found["fp32"]["values"], strict=True)])
        for arm, record in found.items()
        if arm != "fp32"
    }
    gains = {
        f"{f} level {level} minus level 0": interval(
            [
                a - b
                for a, b in zip(
                    found[f"{f} level {level}"]["values"], found[f"{f} level 0"]["values"], strict=True
                )
            ]
        )
        for f in FORMATS
        for level in LEVELS[1:]
    }
    holds = all(gains[f"int6 level {level} minus level 0"][2] < 0 for level in LEVELS[1:])
    errors = {f: operand_errors(opened("minilm-docstrings"), f) for f in ("int8", *FORMATS, "e4m3fn")}
    note = (
        f"digits-vit from random weights, {STEPS} steps of {BATCH}, learning rates "
        f"{', '.join(f'{r:g}' for r in RATES)} tuned on validation at the first seed, "
        f"test loss, three seeds, 95 % intervals of paired differences; fp32 {found['fp32']['test']:.3f}; "
        "gap to it: "
        + "; ".join(f"{arm} {mean:+.3f} [{low:+.3f}, {high:+.3f}]" for arm, (mean, low, high) in gaps.items())
        + (
            ". One batch of minilm-docstrings, mean relative error over the encoder's linears as they are "
            "and rotated: "
        )
        + "; ".join(
            f"{f} X {e['X']:.3f} {e['XH']:.3f}, W {e['W']:.3f} {e['WH']:.3f}, E {e['E']:.3f} {e['KE']:.3f}"
            for f, e in errors.items()
        )
    )
    return {
        "holds": holds,
        "fields": {"steps": STEPS, "batch_size": BATCH, "rates": list(RATES)},
        "found": told(found),
        "gap_to_fp32": gaps,
        "differences": gains,
        "operand_errors": errors,
        "note": note,
    }


def operand_errors(on: Subject, format: str, examples: int = 8) -> dict[str, float]:
    """Mean over the linears of the blocks of `relative_errors`, with the kurtosis of X, W and E,
    on one batch of the training split (padding left out).
    """
    layers, batch = on.layers("blocks"), next(on.batches("train", examples))
    keep = batch["attention_mask"].bool()
    inputs: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}

    def output_gradient(layer: str, module: torch.nn.Module, given: Any, made: Tensor) -> None:
        made.register_hook(lambda gradient: errors.update({layer: gradient[keep]}))

    hooks = [
        layer.module.register_forward_hook(lambda m, g, o, layer=layer.name: output_gradient(layer, m, g, o))
        for layer in layers
    ]
    with InputCapture(layers, lambda layer, expert, rows: inputs.update({layer.name: rows})) as capture:
        capture.keep = keep
        torch.autograd.grad(on.loss(batch), [layer.original for layer in layers])
    for hook in hooks:
        hook.remove()
    rows = []
    for layer in layers:
        x, weight, error = inputs[layer.name], layer.weight.detach(), errors[layer.name]
        rows.append(
            relative_errors(x, weight, error, named(format))
            | {f"kurtosis {name}": kurtosis(v) for name, v in zip("XWE", (x, weight, error), strict=True)}
        )
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def kurtosis(x: Tensor) -> float:
    """E x^4 / (E x^2)^2 over all entries: 3 for a Gaussian."""
    square = x.double().square()
    return float(square.square().mean() / square.mean().square())
