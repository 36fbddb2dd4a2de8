"""Whole courses: calibration on a quantized prefix, a training that switches to ternary weights, widths that
are drawn by curvature; each a second time by other means.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.identity.pairs import Draw, beside
from tests.identity.quantized_training import joined, told
from tests.identity.quantized_training_derived import half_to_even, in_16_bits
from tests.identity.width_solvers import numbers
from tests.identity.widths import NETWORK, Small

FP64 = "second derivation in fp64"


@beside(
    "asymmetric-calibration",
    peer="Nagel et al. 2020, section 3.4",
    kind=FP64,
    compared="the weight whose outputs on the quantized prefix' inputs are nearest to the dense layer's",
    inputs="16 x 24 normal weights, 200 correlated inputs and the same with noise, damped by 0.01, fp64",
    tolerance=1e-9,
)
def asymmetric(draw: Draw) -> tuple[Tensor, Tensor]:
    """Least squares by QR of the inputs themselves, with rows that draw towards W in the place of damping."""
    from workbench.quantization.activations.sequential import target

    weight, dense = draw.normal(16, 24, dtype=torch.float64), draw.inputs(200, 24, dtype=torch.float64)
    seen = dense + draw.normal(200, 24, dtype=torch.float64)
    ours = target(weight, seen.T @ seen, dense.T @ seen, 0.01)
    w, x, x_seen = weight.numpy(), dense.numpy(), seen.numpy()
    pull = math.sqrt(0.01 * float(np.square(x_seen).sum() / 24))
    rows, wanted = np.vstack([x_seen, pull * np.eye(24)]), np.vstack([x @ w.T, pull * w.T])
    theirs = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    return torch.from_numpy(theirs), ours


@beside(
    "continual-qat",
    peer="Nielsen et al. 2025",
    kind=FP64,
    compared="the loss of every step and the ternary weights at the end",
    inputs="a 6 x 8 layer, half squared error, 40 steps of AdamW on 4 of 16 examples, decay from 0.02, "
    "a switch after 8 steps, phased in over 16",
    tolerance=1e-5,
)
def continual(draw: Draw) -> tuple[Tensor, Tensor]:
    """The training again in float64, by hand: W + l (Q(W) - W), its gradient that of W, the same batches.
    The product trains in float32.
    """
    from torch.nn.modules.module import register_module_forward_pre_hook

    import workbench
    from workbench.progress import Progress
    from workbench.quantization import TrainQuantized

    weight, inputs = draw.normal(6, 8), draw.normal(16, 8)
    labels = inputs @ draw.normal(8, 6) + draw.normal(16, 6) / 4
    module = nn.Linear(8, 6, bias=False)
    module.weight.data = weight.clone()
    split = {"inputs": inputs, "labels": labels}
    on = workbench.subject(nn.Sequential(module), data=dict.fromkeys(("train", "calibration", "test"), split))
    settings = TrainQuantized(
        layers="*",
        method={"name": "ternary", "ramp": 0.4},
        steps=40,
        batch_size=4,
        learning_rate=0.02,
        switch_at=0.2,
        seed=3,
    )
    batches: list[Tensor] = []

    def note(module: nn.Module, given: Any) -> None:
        if isinstance(module, nn.Sequential) and module.training:
            batches.append(given[0].detach().clone())

    handle = register_module_forward_pre_hook(note)
    try:
        result = settings.run(on, Progress(), cache=False)
    finally:
        handle.remove()
    assert len(batches) == 40 and result.subject is not None
    w, losses = weight.double().numpy(), []
    first, second = np.zeros_like(w), np.zeros_like(w)

    def ternary(w: np.ndarray) -> np.ndarray:
        size = in_16_bits(np.abs(w).mean(1, keepdims=True))
        return np.clip(half_to_even(w / size), -1, 1) * size

    for step, batch in enumerate(batches):
        x = batch.double().numpy()
        rows = [int((inputs - row).square().sum(1).argmin()) for row in batch]
        y = labels[rows].double().numpy()
        share = 0.0 if step < 8 else min(1.0, (step - 7) / 16)
        gap = x @ (w + share * (ternary(w) - w)).T - y
        losses.append(0.5 * np.square(gap).sum(1).mean())
        gradient = gap.T @ x / len(x)
        gradient /= max(1.0, (np.linalg.norm(gradient) + 1e-6))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        w = w - 0.02 * (1 - step / 40) * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    ours = joined(
        torch.tensor(result.table["train_loss"].to_numpy()), result.subject.layers("*")[0].weight.detach()
    )
    return joined(numbers(losses), numbers(ternary(w))), ours


@beside(
    "hasb",
    peer="after Huang et al. 2025; the probabilities are derived in the product",
    kind=FP64,
    compared="each layer's trace by the same four probes, and its chances of four widths",
    inputs=NETWORK,
    tolerance=1e-9,
)
def by_trace(draw: Draw) -> tuple[Tensor, Tensor]:
    """p(b_k) in proportion to t k + (1 - t)(n + 1 - k), t the trace's place on a logarithmic axis, the trace
    from the dense Hessian.
    """
    from workbench.quantization.trained.double_rounding import DoubleRounding, chances_of

    small = Small(draw)
    settings = told(widths=[8, 6, 4, 2], switching="by trace")
    settings.seed = 5
    found = [DoubleRounding.survey(small.on, small.layers, settings)[layer.name] for layer in small.layers]
    ours = [one["trace"] for one in found]
    ours += [chance for one in found for chance in chances_of(one["place"], 4).flip(0).tolist()]
    traces = small.traces(4, 5)
    logs = np.log(np.maximum(traces, 1e-12))
    theirs = list(traces)
    for place in (logs - logs.min()) / (logs.max() - logs.min()):
        odds = np.array([place * k + (1 - place) * (5 - k) for k in (1, 2, 3, 4)])
        theirs += list(odds / odds.sum())
    return numbers(theirs), numbers(ours)
