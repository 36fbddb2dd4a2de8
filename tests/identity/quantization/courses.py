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
from tests.identity.quantization.quantized_training import joined, told
from tests.identity.quantization.quantized_training_derived import half_to_even, in_16_bits
from tests.identity.quantization.width_solvers import numbers
from tests.identity.quantization.widths import NETWORK, Small
from workbench.storage.identity import FP64


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


class Layer:
    """A 6 x 8 layer as a subject of half squared errors on 16 examples, and what is asked of it by hand."""

    def __init__(self, draw: Draw) -> None:
        import workbench

        self.weight, self.inputs = draw.normal(6, 8), draw.normal(16, 8)
        self.labels = self.inputs @ draw.normal(8, 6) + draw.normal(16, 6) / 4
        module = nn.Linear(8, 6, bias=False)
        module.weight.data = self.weight.clone()
        split = {"inputs": self.inputs, "labels": self.labels}
        splits = dict.fromkeys(("train", "calibration", "test"), split)
        self.on = workbench.subject(nn.Sequential(module), data=splits)
        self.batches: list[tuple[np.ndarray, np.ndarray]] = []

    def run(self, settings: Any) -> Any:
        """What an instrument makes of the subject; the batches that it trains on are noted."""
        from torch.nn.modules.module import register_module_forward_pre_hook

        from workbench.progress import Progress

        def note(module: nn.Module, given: Any) -> None:
            if isinstance(module, nn.Sequential) and module.training:
                rows = [int((self.inputs - row).square().sum(1).argmin()) for row in given[0]]
                x, y = (t[rows].double().numpy() for t in (self.inputs, self.labels))
                self.batches.append((x, y))

        handle = register_module_forward_pre_hook(note)
        try:
            return settings.run(self.on, Progress(), cache=False)
        finally:
            handle.remove()


class Adam:
    """AdamW without decay on arrays, all gradients together cut to norm 1, the rate falling to 0."""

    def __init__(self, rate: float, steps: int, *arrays: np.ndarray) -> None:
        self.rate, self.steps, self.step = rate, steps, 0
        self.arrays = list(arrays)
        self.moments = [(np.zeros_like(a), np.zeros_like(a)) for a in arrays]

    def __call__(self, *gradients: np.ndarray) -> None:
        size = math.sqrt(sum(float(np.square(g).sum()) for g in gradients))
        rate = self.rate * (1 - self.step / self.steps)
        self.step += 1
        for index, gradient in enumerate(gradients):
            g = gradient / max(1.0, size + 1e-6)
            first, second = self.moments[index]
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            self.moments[index] = first, second
            root = np.sqrt(second / (1 - 0.999**self.step)) + 1e-8
            self.arrays[index] = self.arrays[index] - rate * first / (1 - 0.9**self.step) / root


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
    from workbench.quantization import TrainQuantized

    layer = Layer(draw)
    settings = {"steps": 40, "batch_size": 4, "learning_rate": 0.02, "switch_at": 0.2, "seed": 3}
    result = layer.run(TrainQuantized(layers="*", method={"name": "ternary", "ramp": 0.4}, **settings))
    assert len(layer.batches) == 40 and result.subject is not None
    descent, losses = Adam(0.02, 40, layer.weight.double().numpy()), []

    def ternary(w: np.ndarray) -> np.ndarray:
        size = in_16_bits(np.abs(w).mean(1, keepdims=True))
        return np.clip(half_to_even(w / size), -1, 1) * size

    for step, (x, y) in enumerate(layer.batches):
        share = 0.0 if step < 8 else min(1.0, (step - 7) / 16)
        w = descent.arrays[0]
        gap = x @ (w + share * (ternary(w) - w)).T - y
        losses.append(0.5 * np.square(gap).sum(1).mean())
        descent(gap.T @ x / len(x))
    found = result.subject.layers("*")[0].weight
    ours = joined(torch.tensor(result.table["train_loss"].to_numpy()), found)
    return joined(numbers(losses), numbers(ternary(descent.arrays[0]))), ours


@beside(
    "ptq-or-qat",
    peer="Esser et al. 2020, LSQ; least squares by search",
    kind=FP64,
    compared="the losses after training through the rounding, and after rounding a dense training, at 3 bits",
    inputs="a 6 x 8 layer, half squared error, 40 steps of AdamW on 4 of 16 examples, decay from 0.02",
    tolerance=1e-5,
)
def ptq_or_qat(draw: Draw) -> tuple[Tensor, Tensor]:
    """Both trainings again in float64, by hand; the product trains in float32."""
    from workbench.quantization.studies.ptq_or_qat import PtqOrQat

    layer = Layer(draw)
    settings = PtqOrQat(layers="*", widths=[3], steps=40, batch_size=4, learning_rate=0.02)
    row = layer.run(settings).table.iloc[0]
    assert len(layer.batches) == 80
    start, x_all, y_all = (t.double().numpy() for t in (layer.weight, layer.inputs, layer.labels))
    dense = Adam(0.02, 40, start)
    for x, y in layer.batches[:40]:
        dense((x @ dense.arrays[0].T - y).T @ x / len(x))
    energy, rounded = np.square(x_all).sum(0), np.zeros_like(start)
    for index, values in enumerate(dense.arrays[0]):
        top, tried = values.max() if values.max() > -values.min() else values.min(), []
        for share in [1.0, *np.linspace(0.975, 0.3, 28)]:
            grid = np.arange(-4, 4) * float(in_16_bits(np.array(-abs(top) * np.sign(top) * share / 4)))
            nearest = grid[np.abs(values[:, None] - grid).argmin(1)]
            tried.append((float((energy * (nearest - values) ** 2).sum()), -share, nearest))
        rounded[index] = min(tried, key=lambda one: one[:2])[2]
    through = Adam(0.02, 40, start, 2 * np.abs(start).mean(1, keepdims=True) / math.sqrt(3))
    for x, y in layer.batches[40:]:
        w, s = through.arrays
        units = w / s
        inside, whole = (units >= -4) & (units <= 3), half_to_even(np.clip(units, -4, 3))
        g = (x @ (whole * s).T - y).T @ x / len(x)
        through(g * inside, (g * (whole - inside * units)).sum(1, keepdims=True) / math.sqrt(8 * 3))
    w, s = through.arrays[0], in_16_bits(through.arrays[1])
    ends = (half_to_even(np.clip(w / s, -4, 3)) * s, rounded)
    losses = [0.5 * np.square(x_all @ end.T - y_all).sum(1).mean() for end in ends]
    return numbers(losses), numbers([row["trained"], row["rounded"]])


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
