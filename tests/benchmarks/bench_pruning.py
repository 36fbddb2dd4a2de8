"""Pruning against plain reference implementations, run by hand:
`python tests/benchmarks/bench_pruning.py [--repeats 5]`.

SparseGPT and Wanda are written here once more as their papers' pseudo-code, one matrix and one column at
a time, and run on the same MiniLM layers and the same second moments, in turns. Printed: median seconds
of both, their ratio, whether the Wanda masks are identical and how far the reconstruction errors are apart;
the pass over the calibration data that each needs; and oBERT's seconds after the gradients are collected.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import workbench
from workbench.progress import Progress
from workbench.pruning.axes import SALIENCY, Gradients
from workbench.pruning.calibration import Calibration
from workbench.pruning.pattern import Tiles, make_mask
from workbench.pruning.solvers import fisher, obs
from workbench.statistics import second_moments


def reference_sparsegpt(
    weight: torch.Tensor, gram: torch.Tensor, sparsity: float, damp: float = 0.01, block: int = 128
) -> torch.Tensor:
    """Frantar and Alistarh 2023, algorithm 1, with its per-column inner loop."""
    w = weight.clone()
    hessian = gram.clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    hessian.diagonal().add_(damp * gram.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        part, factor = w[:, start:stop].clone(), upper[start:stop, start:stop]
        errors = torch.zeros_like(part)
        cost = part**2 / factor.diagonal() ** 2
        cut = cost.flatten().sort().values[int(cost.numel() * sparsity)]
        drop = cost <= cut
        for j in range(stop - start):
            column = part[:, j].clone()
            new = torch.where(drop[:, j], 0, column)
            error = (column - new) / factor[j, j]
            part[:, j:] -= error[:, None] @ factor[j, j:][None, :]
            part[:, j] = new
            errors[:, j] = error
        w[:, start:stop] = part
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w


def reference_wanda(weight: torch.Tensor, norm: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Sun et al. 2023: sort every row of |w| ||x|| and drop the first share."""
    order = (weight.abs() * norm).sort(dim=-1, stable=True).indices[:, : int(weight.shape[1] * sparsity)]
    return torch.ones_like(weight, dtype=torch.bool).scatter(1, order, False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--subject", default="minilm-docstrings")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gradients", type=int, default=256)
    space = parser.parse_args()
    torch.set_num_threads(1)
    on = workbench.subject(space.subject)
    layers = on.layers()
    calibration = Calibration(on, layers, progress=Progress())
    asked, wanda = Gradients(gradients=space.gradients), SALIENCY.chosen("wanda")
    for what, gram in (("second moments, for SparseGPT", True), ("norms, for Wanda", False)):
        began = time.process_time()
        second_moments(on, layers, examples=calibration.examples, gram=gram)
        print(
            f"{what}: {calibration.examples} examples' inputs to {len(layers)} layers in "
            f"{time.process_time() - began:.2f} s CPU",
            flush=True,
        )
    cases = [
        (layer, layer.weight.detach(), calibration.gram(layer)[0], calibration.norm(layer)[0])
        for layer in layers
    ]
    times: dict[str, list[float]] = {
        "sparsegpt": [],
        "reference sparsegpt": [],
        "wanda": [],
        "reference wanda": [],
    }
    for _ in range(space.repeats):
        for name in times:
            began = time.process_time()
            for layer, weight, gram, norm in cases:
                if name == "sparsegpt":
                    obs.sweep(weight, gram, 0.01, sparsity=0.5)
                elif name == "reference sparsegpt":
                    reference_sparsegpt(weight, gram, 0.5)
                elif name == "wanda":
                    make_mask(wanda(layer, calibration, Tiles(1, 1)), Tiles(1, 1), 0.5, "row")
                else:
                    reference_wanda(weight, norm, 0.5)
            times[name].append(time.process_time() - began)
    middle = {name: statistics.median(values) for name, values in times.items()}
    for name in ("sparsegpt", "wanda"):
        print(
            f"{name}: {middle[name]:.2f} s CPU for {len(layers)} layers, reference "
            f"{middle[f'reference {name}']:.2f} s, ratio {middle[f'reference {name}'] / middle[name]:.2f}"
        )
    gaps, masks = [], True
    for layer, weight, gram, norm in cases:
        ours, theirs = obs.sweep(weight, gram, 0.01, sparsity=0.5)[0], reference_sparsegpt(weight, gram, 0.5)
        gaps.append(
            abs(
                obs.output_error(ours - weight, weight, gram)
                - obs.output_error(theirs - weight, weight, gram)
            )
        )
        masks &= torch.equal(
            make_mask(wanda(layer, calibration, Tiles(1, 1)), Tiles(1, 1), 0.5, "row"),
            reference_wanda(weight, norm, 0.5),
        )
    print(
        f"Wanda masks identical: {masks}; largest gap of SparseGPT's relative output error: {max(gaps):.2e}"
    )
    for layer in layers:  # collected before the clock starts
        calibration.factors(layer, asked)
    damp = calibration.absolute_damp(asked, 0.01)
    began, cpu = time.perf_counter(), time.process_time()
    for layer, weight, _, _ in cases:
        rho = fisher.saliency(weight, calibration.factors(layer, asked), damp, 50)
        fisher.update(weight, make_mask(rho, Tiles(1, 1), 0.7), calibration.factors(layer, asked), damp, 50)
    count = sum(weight.numel() for _, weight, _, _ in cases)
    print(
        f"oBERT over {count / 1e6:.1f} M weights after the gradients: "
        f"{time.perf_counter() - began:.1f} s wall, {time.process_time() - cpu:.1f} s CPU"
    )


if __name__ == "__main__":
    main()
