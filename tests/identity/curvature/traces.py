"""Trace estimators beside curvlinops', on the same probes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

from tests.identity.pairs import Draw, beside
from workbench.curvature.estimators import traces
from workbench.storage.identity import PEER

INPUTS = "a 60 x 60 symmetric matrix of decaying spectrum, fp64, the same probes"
ABOUT = dict(peer="curvlinops-for-pytorch", kind=PEER, compared="the estimate", inputs=INPUTS)


def estimated(
    draw: Draw, module: str, theirs: str, ours: Callable[..., traces.TraceEstimate], products: int
) -> tuple[Tensor, Tensor]:
    size = 60
    basis = torch.linalg.qr(draw.normal(size, size, dtype=torch.float64))[0]
    matrix = basis * torch.logspace(2, -2, size, dtype=torch.float64) @ basis.T
    probes = draw.normal(products, size, dtype=torch.float64)
    probes = probes if theirs == "xtrace" else probes.sign()
    peer = importlib.import_module(f"curvlinops.trace.{module}")
    taken = iter(probes)
    with patch.object(peer, "random_vector", lambda *given: next(taken)):
        answer = getattr(peer, theirs)(matrix, products)
    operator = SimpleNamespace(size=size, matmat=lambda rows: rows @ matrix)
    chosen = lambda operator, numbers, seed: probes[list(numbers)]  # noqa: E731
    with patch.object(traces, "rademacher", chosen), patch.object(traces, "gaussian", chosen):
        found = ours(operator, products)
    return answer.reshape(1), torch.tensor([found.value], dtype=torch.float64)


@beside("hutchinson", tolerance=1e-9, **ABOUT)
def hutchinson(draw: Draw) -> tuple[Tensor, Tensor]:
    return estimated(draw, "hutchinson", "hutchinson_trace", traces.hutchinson, 32)


@beside("hutch++", tolerance=1e-9, **ABOUT)
def hutch_plus_plus(draw: Draw) -> tuple[Tensor, Tensor]:
    return estimated(draw, "meyer2020hutch", "hutchpp_trace", traces.hutch_plus_plus, 30)


@beside("xtrace", tolerance=1e-8, **ABOUT)
def xtrace(draw: Draw) -> tuple[Tensor, Tensor]:
    return estimated(draw, "epperly2024xtrace", "xtrace", traces.xtrace, 30)
