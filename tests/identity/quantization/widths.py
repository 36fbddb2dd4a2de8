"""Widths that differ from layer to layer, beside dense matrices, brute force and bisection."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from tests.identity.pairs import Draw, beside
from tests.identity.quantization.quantized_training import joined
from tests.identity.quantization.width_solvers import budgets, cheapest, numbers
from workbench.storage.identity import FP64

NETWORK = "a network 6-5-4-3 with tanh, 12 examples that it tells right, fp64; two changes a layer"
DERIVED = dict(kind=FP64, inputs=NETWORK, tolerance=1e-9)
SIZES, EXAMPLES, SEED = (6, 5, 4, 3), 12, 7


class Small:
    """The network as a subject, and as a function of its weights in one vector."""

    def __init__(self, draw: Draw) -> None:
        import workbench
        from workbench.progress import Progress
        from workbench.quantization.allocation.width_cost import Candidates

        parts: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(SIZES):
            parts += [nn.Linear(wide, narrow, dtype=torch.float64), nn.Tanh()]
            parts[-2].weight.data = draw.normal(narrow, wide, dtype=torch.float64)
            parts[-2].bias.data = draw.normal(narrow, dtype=torch.float64)
        self.x = draw.normal(EXAMPLES, SIZES[0], dtype=torch.float64)
        model = nn.Sequential(*parts[:-1])
        self.y = model(self.x).argmax(-1)
        split = {"inputs": self.x, "labels": self.y}
        self.on = workbench.subject(model, data=dict.fromkeys(("train", "calibration", "test"), split))
        self.layers = self.on.layers("*")
        self.biases = [p.detach() for name, p in model.named_parameters() if "bias" in name]
        self.weights = torch.cat([layer.weight.detach().flatten() for layer in self.layers])
        ends = np.cumsum([math.prod(layer.shape) for layer in self.layers])
        self.places = [slice(end - math.prod(x.shape), end) for end, x in zip(ends, self.layers, strict=True)]
        self.deltas = {
            layer.name: [draw.normal(*layer.shape, dtype=torch.float64) / size for size in (4, 10)]
            for layer in self.layers
        }
        rows = [
            {
                "layer": layer.name,
                "width": width,
                "weights": math.prod(layer.shape),
                "weight_error": float(delta.square().sum() / layer.weight.detach().square().sum()),
            }
            for layer in self.layers
            for width, delta in zip((2, 3), self.deltas[layer.name], strict=True)
        ]
        self.given = Candidates(
            self.on, self.layers, (2, 3), pd.DataFrame(rows), self.deltas, EXAMPLES, SEED, Progress()
        )

    def cost(self, name: str, **options: Any) -> Any:
        from workbench.quantization.allocation.width_cost import WIDTH_COST

        return WIDTH_COST.chosen(name, **options)(self.given)

    def logits(self, weights: Tensor, x: Tensor) -> Tensor:
        for place, (wide, narrow) in enumerate(itertools.pairwise(SIZES)):
            x = x @ weights[self.places[place]].view(narrow, wide).T + self.biases[place]
            x = x.tanh() if place < len(SIZES) - 2 else x
        return x

    def loss(self, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        def value(weights: Tensor) -> Tensor:
            z = self.logits(weights, x)
            return (z.exp().sum(-1).log() - z[torch.arange(len(y)), y]).mean()

        return value

    def hessian(self, part: slice = slice(None)) -> np.ndarray:
        found = torch.autograd.functional.hessian(self.loss(self.x[part], self.y[part]), self.weights)
        return np.asarray(found)

    def traces(self, probes: int, seed: int) -> np.ndarray:
        """z_l (H z)_l of the dense Hessian, averaged over the signs that a seed gives."""
        hessian, found = self.hessian(), np.zeros(len(self.layers))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(probes):
            signs = [torch.randint(0, 2, layer.shape, generator=generator) * 2 - 1 for layer in self.layers]
            z = torch.cat([s.flatten() for s in signs]).numpy().astype(np.float64)
            found += [float(z[p] @ (hessian @ z)[p]) / probes for p in self.places]
        return found

    def changes(self) -> list[tuple[slice, np.ndarray]]:
        """Every candidate's place and change."""
        return [
            (place, delta.flatten().numpy())
            for place, layer in zip(self.places, self.layers, strict=True)
            for delta in self.deltas[layer.name]
        ]


@beside(
    "trace",
    "hawq-v2",
    peer="Dong et al. 2020, HAWQ-V2, eq. 5",
    compared="the traces of the Hessian's blocks by the same eight probes, and the costs",
    **DERIVED,
)
def trace(draw: Draw) -> tuple[Tensor, Tensor]:
    """The dense Hessian of all weights; z_l (H z)_l over their number, times |d|^2 / 2."""
    small = Small(draw)
    found = small.traces(8, SEED)
    costs = [
        max(found[small.places.index(p)], 0) / (p.stop - p.start) * float(d @ d) / 2
        for p, d in small.changes()
    ]
    ours = small.cost("trace", probes=8)
    return numbers([*found, *costs]), numbers([*ours.columns["trace"][::2], *ours.cost])


@beside(
    "curvature",
    peer="LeCun, Denker and Solla 1990",
    compared="the costs from the dense Hessian",
    **DERIVED,
)
def curvature(draw: Draw) -> tuple[Tensor, Tensor]:
    small = Small(draw)
    hessian = small.hessian()
    costs = [max(0.5 * float(d @ hessian[p, p] @ d), 0) for p, d in small.changes()]
    return numbers(costs), numbers(small.cost("curvature").cost)


@beside(
    "eigenvalue",
    "q-bert",
    peer="Shen et al. 2020, Q-BERT, section 3.1",
    compared="|mean| and deviation of the largest eigenvalue over two halves of the data, 300 iterations",
    **(DERIVED | {"tolerance": 1e-6}),
)
def eigenvalue(draw: Draw) -> tuple[Tensor, Tensor]:
    """By `eigvalsh` of every block; the product iterates in 32 bits."""
    from workbench.quantization.allocation.layer_sensitivity import top_eigenvalues

    small = Small(draw)
    found = np.zeros((2, 3))
    for part in range(2):
        hessian = small.hessian(slice(6 * part, 6 * part + 6))
        for row, place in enumerate(small.places):
            values = np.linalg.eigvalsh(hessian[place, place])
            found[part, row] = max(values, key=abs)
    ours = top_eigenvalues(
        small.on, small.layers, 2, EXAMPLES, torch.Generator().manual_seed(0), iterations=300
    )
    theirs = np.stack([found.mean(0), found.std(0, ddof=1)], 1)
    return torch.from_numpy(theirs), numbers([ours[layer.name] for layer in small.layers])


def sampled_gradients(small: Small, samples: int) -> np.ndarray:
    """(examples x samples, weights): gradients at targets drawn by the same uniform numbers."""
    generator = torch.Generator().manual_seed(SEED)
    rows = []
    for x in small.x:
        chances = small.logits(small.weights, x[None]).softmax(-1)[0].numpy()
        for uniform in torch.rand(1, samples, generator=generator, dtype=torch.float64)[0].tolist():
            target = int(np.searchsorted(np.cumsum(chances) / chances.sum(), uniform))
            function = small.loss(x[None], torch.tensor([target]))
            rows.append(torch.autograd.functional.jacobian(function, small.weights).numpy())
    return np.stack(rows)


@beside(
    "gauss-newton",
    "curvature-allocation",
    peer="Yao et al. 2021, HAWQ-V3; Martens 2020, section 9",
    compared="the costs from a dense matrix of the same drawn targets, and what the cheapest widths cost at "
    "four budgets",
    **DERIVED,
)
def curvature_allocation(draw: Draw) -> tuple[Tensor, Tensor]:
    """d.Gd / 2 with G the mean of g g^T; all 2^3 choices of widths."""
    from workbench.quantization.allocation.solver import WIDTH_SOLVER

    small = Small(draw)
    gradients = sampled_gradients(small, 4)
    matrix = gradients.T @ gradients / len(gradients)
    costs = np.array([0.5 * d @ matrix[p, p] @ d for p, d in small.changes()])
    ours = small.cost("gauss-newton", probes=4).cost
    sizes = np.array([[2.0, 3.0]]) * [[p.stop - p.start] for p in small.places]
    theirs, found = cheapest(costs.reshape(3, 2), sizes), []
    for name in ("integer-program", "dynamic-program"):
        solver = WIDTH_SOLVER.chosen(name)
        found += [solver(ours.reshape(3, 2), sizes, budget).cost for budget in budgets(sizes)]
    return joined(numbers(costs), numbers(theirs * 2)), joined(numbers(ours), numbers(found))


@beside(
    "interactions",
    peer="after Schaefer et al. 2023",
    compared="the cost of every two changes together from a dense matrix, and of the best widths by all "
    "choices at three budgets",
    **DERIVED,
)
def interactions(draw: Draw) -> tuple[Tensor, Tensor]:
    """(d_i + d_j).G(d_i + d_j) / 2 for the pairs of two layers, not the sums of products."""
    from workbench.quantization.allocation.integer_program import with_interactions

    small = Small(draw)
    gradients = sampled_gradients(small, 4)
    matrix, changes = gradients.T @ gradients / len(gradients), small.changes()
    whole = [np.zeros(len(matrix)) for _ in changes]
    for change, (place, d) in zip(whole, changes, strict=True):
        change[place] = d
    quadratic = lambda d: 0.5 * float(d @ matrix @ d)  # noqa: E731
    alone = np.array([quadratic(d) for d in whole])
    theirs, ours = [], []
    joint = small.cost("gauss-newton", probes=4, interactions=True).joint
    for (a, first), (b, second) in itertools.combinations(enumerate(whole), 2):
        if a // 2 != b // 2:
            theirs.append(quadratic(first + second) - alone[a] - alone[b])
            ours.append(2 * joint[a // 2, a % 2, b // 2, b % 2])
    sizes = np.array([[2.0, 3.0]]) * [[p.stop - p.start] for p in small.places]
    choices = [np.array(c) for c in itertools.product((0, 1), repeat=3)]
    for budget in budgets(sizes)[1:]:
        fits = [c for c in choices if sizes[np.arange(3), c].sum() <= budget]
        theirs.append(min(quadratic(sum(whole[2 * i + c[i]] for i in range(3))) for c in fits))
        ours.append(with_interactions(joint, sizes, budget, [0, 0, 0]).cost)
    return numbers(theirs), numbers(ours)


@beside(
    "variance",
    "log-variance",
    peer="Gersho and Gray 1992",
    compared="the costs of widths from the same eight probes of the Hessian's blocks and the variances",
    **(DERIVED | {"tolerance": 1e-6}),
)
def variance(draw: Draw) -> tuple[Tensor, Tensor]:
    """The product's variances are of weights in 32 bits."""
    small = Small(draw)
    found = small.traces(8, SEED)
    shares = np.array([max(t, 0) / (p.stop - p.start) for t, p in zip(found, small.places, strict=True)])
    shares = np.maximum(shares, 1e-3 * shares.max())
    costs = []
    for share, place in zip(shares, small.places, strict=True):
        w = small.weights[place].numpy()
        spread = ((w - w.mean()) ** 2).sum() / (len(w) - 1)
        costs += [0.5 * share * len(w) * spread / 4.0**width for width in (2, 3)]
    return numbers(costs), numbers(small.cost("variance", probes=8).cost)


@beside(
    "linearity",
    "higgs-allocation",
    peer="Malinovskii et al. 2024, HIGGS",
    compared="the slopes of the divergence in the squared size of noise, and the costs of the changes",
    **(DERIVED | {"tolerance": 1e-5}),
)
def linearity(draw: Draw) -> tuple[Tensor, Tensor]:
    """KL from the logits, least squares through the origin by `lstsq`; the product draws its noise in 32
    bits.
    """
    small = Small(draw)
    before = small.logits(small.weights, small.x).log_softmax(-1)
    alphas, costs = [], []
    for place, layer in zip(small.places, small.layers, strict=True):
        generator = torch.Generator().manual_seed(SEED ^ zlib.crc32(layer.name.encode()))
        squares, distances = 0.04 * np.arange(1, 4) / 3, []
        w = small.weights[place]
        for square in squares:
            noise = torch.randn(layer.shape, generator=generator).flatten().double()
            moved = small.weights.clone()
            moved[place] += noise * float(square) ** 0.5 * float(w.norm() / noise.norm())
            after = small.logits(moved, small.x).log_softmax(-1)
            distances.append(float((before.exp() * (before - after)).sum(-1).mean()))
        alpha = float(np.linalg.lstsq(squares[:, None], np.array(distances), rcond=None)[0][0])
        alphas.append(alpha)
        for delta in small.deltas[layer.name]:
            costs.append(max(alpha, 0) * float(delta.square().sum() / w.square().sum()))
    ours = small.cost("linearity")
    found = ours.columns["alpha"].to_numpy()[::2]
    return numbers(alphas + costs), joined(numbers(found), numbers(ours.cost))
