"""Optimizers beside torch's and pytorch_optimizer's, in double precision over several steps."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.identity.pairs import Draw, beside
from workbench.storage.identity import AUTHORS, PEER

LR, DECAY, STEPS = 0.05, 0.1, 10
SHAPES = ((12, 20), (20, 9))
INPUTS = "10 steps of two normal matrices (12 x 20, 20 x 9) on seeded normal gradients, fp64"
Make = Callable[[list[nn.Parameter]], Optimizer]


def stepped(
    draw: Draw,
    theirs: Make,
    ours: Make,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    dtype: torch.dtype = torch.float64,
    steps: int = STEPS,
) -> tuple[Tensor, Tensor]:
    """The weights after the steps of both on the same gradients."""
    starts = [draw.normal(*shape, dtype=dtype) for shape in shapes]
    gradients = [[draw.normal(*shape, dtype=dtype) for shape in shapes] for _ in range(steps)]
    draw.shapes = draw.shapes[: len(shapes)]
    ended = []
    for make in (theirs, ours):
        weights = [nn.Parameter(start.clone()) for start in starts]
        optimizer = make(weights)
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
        ended.append(torch.cat([weight.detach().flatten() for weight in weights]))
    return ended[0], ended[1]


@beside(
    "lamb",
    peer="pytorch_optimizer",
    kind=PEER,
    compared="the weights (moments without bias correction; theirs adds eps to the ratio's norm)",
    inputs=INPUTS,
    tolerance=1e-6,
)
def lamb(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their `adam_debias` is the one that leaves the rate alone; without it they divide it by 1 - b1^t."""
    from pytorch_optimizer import Lamb

    from workbench.training.optimizer.lamb import LAMB

    return stepped(
        draw,
        lambda ws: Lamb(ws, lr=LR, weight_decay=DECAY, weight_decouple=False, adam_debias=True),
        lambda ws: LAMB(ws, lr=LR, weight_decay=DECAY, bias_correction=False),
    )


@beside("lion", peer="pytorch_optimizer", kind=PEER, compared="the weights", inputs=INPUTS, tolerance=1e-12)
def lion(draw: Draw) -> tuple[Tensor, Tensor]:
    from pytorch_optimizer import Lion as Theirs

    from workbench.training.optimizer.lion import Lion

    return stepped(
        draw,
        lambda ws: Theirs(ws, lr=LR, betas=(0.9, 0.99), weight_decay=DECAY),
        lambda ws: Lion(ws, lr=LR, betas=(0.9, 0.99), weight_decay=DECAY),
    )


@beside("lars", peer="pytorch_optimizer", kind=PEER, compared="the weights", inputs=INPUTS, tolerance=1e-9)
def lars(draw: Draw) -> tuple[Tensor, Tensor]:
    from pytorch_optimizer import LARS as Theirs

    from workbench.training.optimizer.lars import LARS

    return stepped(
        draw,
        lambda ws: Theirs(ws, lr=LR, momentum=0.9, weight_decay=0.0, trust_coefficient=0.01),
        lambda ws: LARS(ws, lr=LR, momentum=0.9, weight_decay=0.0, trust=0.01),
    )


@beside("sophia", peer="pytorch_optimizer", kind=PEER, compared="the weights", inputs=INPUTS, tolerance=1e-9)
def sophia(draw: Draw) -> tuple[Tensor, Tensor]:
    """Both are given the same diagonal of the Hessian in the first step: theirs clips m / h at p and takes lr
    of it, ours m / (gamma h) at one.
    """
    from pytorch_optimizer import SophiaH

    from workbench.training.optimizer.sophia import Sophia

    diagonals = [draw.normal(*shape, dtype=torch.float64) * 20 for shape in SHAPES]
    gamma = 0.05

    def theirs(weights: list[nn.Parameter]) -> Optimizer:
        made = SophiaH(weights, lr=LR / gamma, p=gamma, weight_decay=DECAY * gamma, update_period=10**9)
        plain = made.step

        def step() -> None:
            plain(hessian=[d.clone() for d in diagonals]) if first.pop(0) else plain()

        made.step = step  # type: ignore[method-assign, assignment]
        return made

    def ours(weights: list[nn.Parameter]) -> Optimizer:
        made = Sophia(weights, lr=LR, gamma=gamma, weight_decay=DECAY)
        made.average(weights, diagonals)
        return made

    first = [True] + [False] * STEPS
    return stepped(draw, theirs, ours)


@beside(
    "muon",
    peer="torch",
    kind=PEER,
    compared="the weights (torch's Newton-Schulz in bfloat16, ours in float32)",
    inputs="10 steps of two normal matrices (12 x 20, 20 x 9) on seeded normal gradients",
    tolerance=2e-2,
)
def muon(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.training.optimizer.muon import Muon

    return stepped(
        draw,
        lambda ws: torch.optim.Muon(ws, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
        lambda ws: Muon(ws, lr=LR, weight_decay=DECAY, scale="rms"),
        dtype=torch.float32,
    )


@beside(
    "muon",
    peer="pytorch_optimizer",
    kind=PEER,
    compared="five Newton-Schulz iterations in float64",
    inputs="a 12 x 20 and a 20 x 9 normal matrix",
    tolerance=1e-6,
)
def newton_schulz(draw: Draw) -> tuple[Tensor, Tensor]:
    from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5

    from workbench.training.optimizer.muon import orthogonalise

    matrices = [draw.normal(*shape, dtype=torch.float64) for shape in SHAPES]
    return (
        torch.cat(
            [
                zero_power_via_newton_schulz_5(
                    m.clone(), num_steps=5, eps=1e-7, weights=(3.4445, -4.7750, 2.0315), dtype=torch.float64
                ).flatten()
                for m in matrices
            ]
        ),
        torch.cat([orthogonalise(m).flatten() for m in matrices]),
    )


@beside(
    "galore",
    peer="galore-torch",
    kind=AUTHORS,
    compared="the weights, rank 4, a new subspace every 3 steps",
    inputs="10 steps of two normal matrices (12 x 20, 20 x 9) on seeded normal gradients",
    tolerance=1e-5,
)
def galore(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their package imports bitsandbytes for its 8-bit variant, so its `__init__` is passed by."""
    from workbench.training.optimizer.galore import GaLore

    spec = importlib.util.find_spec("galore_torch")
    assert spec is not None and spec.submodule_search_locations is not None
    package = types.ModuleType("galore_torch")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["galore_torch"] = package
    theirs = importlib.import_module("galore_torch.adamw").AdamW
    how = {"rank": 4, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    return stepped(
        draw,
        lambda ws: theirs([{"params": ws, **how}], lr=LR, eps=1e-8, no_deprecation_warning=True),
        lambda ws: GaLore(ws, lr=LR, eps=1e-8, rank=4, refresh=3, alpha=0.25),
        dtype=torch.float32,
    )
