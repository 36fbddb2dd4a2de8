"""What chooses widths, beside all choices, and real-valued widths by bisection."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.identity.pairs import Draw, beside
from workbench.storage.identity import FP64, PEER


def numbers(found: Any) -> Tensor:
    return torch.from_numpy(np.array(found, dtype=np.float64))


def budgets(sizes: np.ndarray) -> list[float]:
    low, high = sizes.min(1).sum(), sizes.max(1).sum()
    return [float(low + share * (high - low)) for share in (0.0, 0.3, 0.6, 1.0)]


def cheapest(costs: np.ndarray, sizes: np.ndarray) -> list[float]:
    """The least cost within each budget, of all choices."""
    rows = np.arange(len(costs))
    choices = [np.array(c) for c in itertools.product(range(costs.shape[1]), repeat=len(costs))]
    return [
        min(costs[rows, c].sum() for c in choices if sizes[rows, c].sum() <= budget + 1e-9)
        for budget in budgets(sizes)
    ]


def falling(draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """(costs, sizes) of six layers at four widths."""
    widths = np.array([2.0, 3.0, 4.0, 8.0])
    noise = draw.normal(6, 4, dtype=torch.float64).numpy()
    costs = np.exp(noise / 3) * 4.0**-widths * 2.0 ** np.arange(6)[:, None]
    sizes = widths * np.array([32, 64, 96, 128, 256, 512])[:, None]
    return costs, sizes


@beside(
    "integer-program",
    "dynamic-program",
    peer="all choices",
    kind=FP64,
    compared="the least cost at four budgets",
    inputs="six layers of 32 to 512 weights, four widths, costs that fall fourfold a bit with noise, fp64",
    tolerance=1e-9,
)
def solvers(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.quantization.allocation.solver import WIDTH_SOLVER

    costs, sizes = falling(draw)
    theirs = cheapest(costs, sizes)
    found = [
        WIDTH_SOLVER.chosen(name)(costs, sizes, budget).cost
        for name in ("integer-program", "dynamic-program")
        for budget in budgets(sizes)
    ]
    return numbers(theirs * 2), numbers(found)


@beside(
    "log-variance",
    peer="Huang and Schultheiss 1963",
    kind=FP64,
    compared="real-valued widths at an average of 3 bits",
    inputs="nine layers of 32 to 8,192 weights, sensitivities and variances over six powers of ten, fp64",
    tolerance=1e-9,
)
def log_variance(draw: Draw) -> tuple[Tensor, Tensor]:
    """Where n s v ln 4 4^-b = mu n for all layers; the multiplier mu by bisection on the average width."""
    from workbench.quantization.allocation.integer_program import log_variance as ours

    s, v = (np.exp(2 * draw.normal(9, dtype=torch.float64).numpy()) for _ in range(2))
    n = 2.0 ** np.arange(5, 14)
    low, high = -80.0, 80.0
    for _ in range(200):
        middle = (low + high) / 2
        widths = np.log(s * v * math.log(4) / math.exp(middle)) / math.log(4)
        low, high = (middle, high) if (n * widths).sum() > 3 * n.sum() else (low, middle)
    return torch.from_numpy(widths), torch.from_numpy(ours(s, v, n, 3.0))


@beside(
    "integer-program",
    "curvature-allocation",
    peer="nvidia-modelopt",
    kind=PEER,
    compared="the cost of the widths that its integer program chooses at three budgets",
    inputs="six layers of 32 to 512 weights, four widths, costs that fall fourfold a bit with noise",
    tolerance=1e-9,
)
def peers_program(draw: Draw) -> tuple[Tensor, Tensor]:
    """The solver of its AutoQuantize, by PuLP."""
    from modelopt.torch.opt.searcher import LPS

    from workbench.quantization.allocation.solver import WIDTH_SOLVER

    costs, sizes = falling(draw)
    theirs, found = [], []
    for budget in budgets(sizes)[1:]:
        given = {"size": sizes.tolist()}
        chosen, _ = LPS("widths", {"size": budget}, given, costs.tolist())()
        theirs.append(costs[np.arange(6), np.array(chosen)].sum())
        found.append(WIDTH_SOLVER.chosen("integer-program")(costs, sizes, budget).cost)
    return numbers(theirs), numbers(found)
