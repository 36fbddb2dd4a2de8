"""What learned roundings reconstruct, a layer's outputs or a window of blocks': gradients by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.identity.pairs import Draw, beside
from tests.identity.quantization.learned_roundings import problem_of
from tests.identity.quantization.quantized_training import joined
from workbench.storage.identity import FP64

BLOCK = "two blocks of a 12 x 12 layer with a bias, other weights than the dense ones, 10 tokens, fp64"


class Free(nn.Module):
    """A rounding that learns the values themselves and keeps the gradient that it was given."""

    signed, exact, angular, learning_rate = False, True, False, 0.0

    def __init__(self, problem: Any, values: Tensor) -> None:
        super().__init__()
        self.problem, self.values, self.seen = problem, nn.Parameter(values), list[Tensor]()
        self.values.register_hook(self.seen.append)

    def soft(self, progress: float) -> Tensor:
        return self.values

    def hard(self) -> tuple[Tensor, None]:
        return self.values.detach(), None

    def penalty(self, progress: float) -> None:
        return None


def block_gradients(draw: Draw, divergence: bool) -> tuple[Tensor, Tensor]:
    """The gradients by two linear layers' rounded weights of what two blocks put out, ours by autograd,
    theirs by hand.
    """
    from workbench.progress import Progress
    from workbench.quantization.activations.sequential import Call
    from workbench.quantization.rounding.blockwise import reconstruct
    from workbench.subjects import Layer

    parts: Any = [nn.Linear(12, 12, dtype=torch.float64) for _ in range(2)]
    weights, rounded = ([draw.normal(12, 12, dtype=torch.float64) / 3 for _ in range(2)] for _ in range(2))
    inputs = draw.normal(2, 5, 12, dtype=torch.float64)
    for part, weight in zip(parts, weights, strict=True):
        part.weight.data, part.bias.data = weight.clone(), draw.normal(12, dtype=torch.float64)
    with torch.no_grad():
        calls = [[Call((x,), {}, parts[0](x)) for x in (inputs, parts[0](inputs))]]
        target = parts[1](parts[0](inputs))
    names = ["first", "last"]
    model = nn.ModuleDict(dict(zip(names, parts, strict=True)))
    layers = [Layer(name, part) for name, part in model.items()]
    given = [SimpleNamespace(weight=weight, masked=lambda values: values) for weight in weights]
    made = [Free(one, values.clone()) for one, values in zip(given, rounded, strict=True)]
    modules: Any = {name: [part] for name, part in zip(names, made, strict=True)}
    generator = torch.Generator().manual_seed(0)
    reconstruct(
        model, names, layers, modules, calls, [[target]], 1, generator, Progress(), divergence=divergence
    )

    x, t = inputs.reshape(-1, 12).numpy(), target.reshape(-1, 12).numpy()
    (first, last), (b1, b2) = (r.numpy() for r in rounded), (p.bias.detach().numpy() for p in parts)
    hidden = x @ first.T + b1
    out = hidden @ last.T + b2
    slope = 2 * (out - t) / np.square(t).sum()
    if divergence:  # d KL(p || softmax(z)) / dz = softmax(z) - p, a mean over tokens
        p, z = (np.exp(v) / np.exp(v).sum(1, keepdims=True) for v in (t, out))
        slope = slope + (z - p) / len(x)
    theirs = ((slope @ last).T @ x, slope.T @ hidden)
    return joined(*map(torch.from_numpy, theirs)), joined(*(part.seen[0] for part in made))


@beside(
    "gradient-ptq",
    peer="Li et al. 2021, BRECQ, eq. 10",
    kind=FP64,
    compared="the gradients by the rounded weights, of a block's outputs",
    inputs=BLOCK,
    tolerance=1e-9,
)
def gradient_ptq(draw: Draw) -> tuple[Tensor, Tensor]:
    return block_gradients(draw, divergence=False)


@beside(
    "cbq",
    peer="Ding et al. 2025, CBQ",
    kind=FP64,
    compared="the gradients by the rounded weights of a window of two blocks, divergence included",
    inputs=BLOCK,
    tolerance=1e-9,
)
def cbq_window(draw: Draw) -> tuple[Tensor, Tensor]:
    return block_gradients(draw, divergence=True)


@beside(
    "gradient-ptq",
    peer="Nagel et al. 2020, eq. 13",
    kind=FP64,
    compared="the gradient by the rounded weights, of a layer's outputs",
    inputs="24 x 64 normal weights and rounded ones, 256 correlated inputs, fp64",
    tolerance=1e-9,
)
def layer_objective(draw: Draw) -> tuple[Tensor, Tensor]:
    """2 (Q - W) X X^T from the inputs themselves, in units of their mean energy and of a row's mean step."""
    from workbench.quantization.number.grid import fit
    from workbench.quantization.rounding.learned import learn

    problem = problem_of(draw, "int4")
    rows = Draw(draw.seed)
    rows.normal(24, 64, dtype=torch.float64)
    inputs = rows.inputs(256, 64, dtype=torch.float64).numpy()
    values = problem.weight + draw.normal(24, 64, dtype=torch.float64) / 8
    ours: Any = Free(problem, values.clone())
    ours.base = fit(problem.weight, problem.format, "channel")
    ours.step = ours.base.columns(64)[0].double().expand(24, 64)
    ours.options, ours.grid = SimpleNamespace(steps=1), lambda: ours.base
    ours.hard = lambda: (values, ours.base)
    learn(ours)
    outputs = inputs @ (values - problem.weight).numpy().T
    energy = np.square(inputs).sum() / 64
    step = np.square(ours.base.scale.double().numpy())
    return torch.from_numpy(2 * outputs.T @ inputs / energy / step), ours.seen[0]
