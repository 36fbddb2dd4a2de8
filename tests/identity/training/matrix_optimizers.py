"""The registered optimizers beside authors' repositories and peers' packages, several steps in float64."""

from __future__ import annotations

import contextlib
import importlib
import io
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.identity.pairs import Draw, beside
from tests.identity.repositories import part_of, source
from tests.identity.scripts import Torch, loaded, taken, uncompiled
from tests.identity.training.optimizers import INPUTS, LR, Make, stepped
from workbench.storage.identity import AUTHORS, PEER
from workbench.training.optimizer.optimizers import make_optimizer

WEIGHTS = dict(compared="the weights", inputs=INPUTS, tolerance=1e-9)
SQUARE = ((12, 12), (9, 9), (7,))


def registered(name: str, lr: float = LR, decay: float = 0.0, **options: Any) -> Make:
    """The axis' entry on a model that holds these parameters."""
    return lambda weights: make_optimizer(name, lr, decay, **options)(nn.ParameterList(weights))


def rounded_by_none() -> Any:
    """While entered, nothing is rounded to bfloat16: their iterations run in the precision given."""
    return patch.object(torch.Tensor, "bfloat16", lambda values: values)


@beside(
    "soap",
    **source("nikhilvyas/SOAP"),
    kind=AUTHORS,
    compared="the weights (both find eigenbases in float32)",
    inputs="25 steps of two normal matrices (12 x 12, 9 x 9) and a vector on seeded normal gradients, fp64",
    tolerance=1e-5,
)
def soap(draw: Draw) -> tuple[Tensor, Tensor]:
    """Two and a half times the ten steps between eigenbases; square, as the first gradient's squares have no
    eigenbasis of their own on the longer side of another.
    """
    module = loaded("nikhilvyas/SOAP", "soap.py")

    def theirs(weights: list[nn.Parameter]) -> Optimizer:
        groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0}]
        return module.SOAP(groups, lr=LR, max_precond_dim=2048)

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # their averages are of the default dtype
    try:
        return stepped(draw, theirs, registered("soap", decay=0.1), shapes=SQUARE, steps=25)
    finally:
        torch.set_default_dtype(before)


@beside(
    "mars",
    **source("AGI-Arena/MARS"),
    kind=AUTHORS,
    compared="the weights (ours adds eps before the bias correction, and 1e-15 under the root)",
    inputs="10 steps of two normal matrices (12 x 20, 20 x 9) and a vector on seeded normal gradients, fp64",
    tolerance=1e-4,
)
def mars(draw: Draw) -> tuple[Tensor, Tensor]:
    """Vectors follow AdamW in both; their rate and decay are those of the entry. Each side has its own
    gradients: theirs keeps the tensor itself as the last one.
    """
    module = loaded("AGI-Arena/MARS", "MARS/optimizers/mars.py")
    return stepped(
        draw,
        lambda ws: module.MARS(ws, lr=LR, weight_decay=0.1, lr_1d=LR, weight_decay_1d=0.0),
        registered("mars", decay=0.1),
        shapes=((12, 20), (20, 9), (9,)),
    )


@beside(
    "kron",
    peer="kron-torch",
    kind=PEER,
    compared="the weights (theirs solves in float32; its noise on the momentum, 3e-4 of it, taken out)",
    inputs=INPUTS,
    tolerance=1e-6,
)
def kron(draw: Draw) -> tuple[Tensor, Tensor]:
    """The same probes: each side draws from torch's generator, one tensor a step."""
    with uncompiled():
        peer = importlib.import_module("kron_torch.kron")
    quiet = Torch(finfo=lambda dtype: SimpleNamespace(eps=0.0, tiny=torch.finfo(dtype).tiny))
    made = registered("kron", decay=0.1)
    with patch.object(peer, "torch", quiet), contextlib.redirect_stdout(io.StringIO()):
        return stepped(
            draw,
            lambda ws: seeded(peer.Kron(ws, lr=LR, weight_decay=0.1, precond_dtype=torch.float64)),
            lambda ws: seeded(made(ws)),
        )


def seeded(optimizer: Optimizer) -> Optimizer:
    torch.manual_seed(0)
    return optimizer


@beside(
    "scion",
    **source("LIONS-EPFL/scion"),
    kind=AUTHORS,
    compared="the weights (their Newton-Schulz kept in float64; it adds 1e-7 to the norm)",
    inputs="10 steps of four normal matrices (12 x 20 to 9 x 5) and a vector on normal gradients, fp64",
    tolerance=1e-6,
)
def scion(draw: Draw) -> tuple[Tensor, Tensor]:
    """The first and last matrix by signs, the others by their spectral norm, vectors by their root mean
    square; constrained, as a weight decay of one is. Their decay takes vectors too: none of the entry's.
    """
    module = loaded("LIONS-EPFL/scion", "scion.py")

    def theirs(ws: list[nn.Parameter]) -> Optimizer:
        groups = [
            {"params": ws[1:3], "norm": "Spectral", "scale": 1.0},
            {"params": [ws[0], ws[3]], "norm": "Sign", "scale": 10.0},
            {"params": ws[4:], "norm": "BiasRMS", "scale": 1.0, "unconstrained": True},
        ]
        return module.Scion(groups, lr=LR, momentum=0.1)

    shapes = ((12, 20), (20, 9), (9, 9), (9, 5), (5,))
    with rounded_by_none():
        return stepped(draw, theirs, registered("scion", decay=1.0), shapes=shapes)


@beside(
    "muon-soft-cap",
    **source("phess2/lipschitz-transformers"),
    kind=AUTHORS,
    compared="the strengths of the cap and the matrices that it gives (theirs kept in float64)",
    inputs="a 12 x 20 and a 20 x 9 normal matrix, caps 1, 2 and 4, steps of norm 0.02, 0.1 and 0.3",
    tolerance=1e-5,
)
def soft_cap(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their strength is the least root of a quartic in float32, ours a bisection of the same condition."""
    from workbench.training.optimizer import muon

    found = taken(
        "phess2/lipschitz-transformers",
        "nanogpt/train_spectral_cap.py",
        "soft_cap",
        "soft_cap_coupling",
        until="=" * 100,
        torch=torch,
        Tensor=Tensor,
    )
    matrices = [draw.normal(*shape, dtype=torch.float64) for shape in ((12, 20), (20, 9))]
    theirs, ours = [], []
    for cap in (1.0, 2.0, 4.0):
        for growth in (0.02, 0.1, 0.3):
            strengths = found["soft_cap_coupling"](cap, 0.0, growth), muon.soft_cap_strength(cap, growth)
            for matrix in matrices:
                matrix = matrix * (cap + growth) / torch.linalg.matrix_norm(matrix, 2)
                with rounded_by_none():
                    theirs.append(found["soft_cap"](matrix, strengths[0]).flatten())
                ours.append(muon.soft_cap(matrix, strengths[1]).flatten())
            theirs.append(torch.tensor([strengths[0]], dtype=torch.float64))
            ours.append(torch.tensor([strengths[1]], dtype=torch.float64))
    return torch.cat(theirs), torch.cat(ours)


@beside(
    "adafactor",
    peer="transformers",
    kind=PEER,
    compared="the weights (a rate below 1 / sqrt(step), no decay: theirs decays by the scaled rate)",
    inputs=INPUTS,
    tolerance=1e-9,
)
def adafactor(draw: Draw) -> tuple[Tensor, Tensor]:
    from transformers.optimization import Adafactor

    return stepped(
        draw,
        lambda ws: Adafactor(ws, lr=LR, scale_parameter=True, relative_step=False, warmup_init=False),
        registered("adafactor"),
    )


@beside("adamw", peer="timm", kind=PEER, **WEIGHTS)
def adamw(draw: Draw) -> tuple[Tensor, Tensor]:
    theirs = part_of("timm", "timm.optim.adamw", ("timm", "timm.optim")).AdamWLegacy
    return stepped(
        draw,
        lambda ws: theirs(ws, lr=LR, betas=(0.9, 0.95), weight_decay=0.1),
        registered("adamw", decay=0.1),
    )


@beside("sgd", peer="timm", kind=PEER, **WEIGHTS)
def sgd(draw: Draw) -> tuple[Tensor, Tensor]:
    """Without decay, which theirs takes off the weights and the entry adds to the gradient."""
    theirs = part_of("timm", "timm.optim.sgdw", ("timm", "timm.optim")).SGDW
    return stepped(draw, lambda ws: theirs(ws, lr=LR, momentum=0.9, weight_decay=0.0), registered("sgd"))
