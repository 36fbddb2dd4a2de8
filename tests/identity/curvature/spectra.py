"""Spectra, random matrices, Taylor expansions and networks whose response or slope is known."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.identity.pairs import Draw, beside
from tests.identity.repositories import source
from tests.identity.scripts import loaded
from tests.identity.training.batch_sizes import on_bench, softmax
from tests.identity.training.layer_optimizers import network
from workbench.curvature.estimators import flatness, traces
from workbench.curvature.estimators.batch_theory import shifted_eigenvalue
from workbench.curvature.estimators.lanczos import Lockstep
from workbench.curvature.estimators.quadratic import predicted_change
from workbench.curvature.operators.curvature_operator import DenseOperator, curvature_operator
from workbench.storage.identity import AUTHORS, FP64, PEER


def spectrum(draw: Draw, size: int) -> Tensor:
    basis = torch.linalg.qr(draw.normal(size, size, dtype=torch.float64))[0]
    return basis * torch.logspace(2, -2, size, dtype=torch.float64) @ basis.T


@beside(
    "slq",
    peer="curvlinops-for-pytorch",
    kind=PEER,
    compared="the density on 200 points, mean of 4 probes",
    inputs="a 60 x 60 symmetric matrix of decaying spectrum, 12 Lanczos steps, the same probes, fp64",
    tolerance=1e-9,
)
def slq(draw: Draw) -> tuple[Tensor, Tensor]:
    """Theirs does not orthogonalise again, so few steps; its Gaussians are as wide as it makes them."""
    from curvlinops.papyan2020traces import spectrum as peer

    matrix, probes, steps = spectrum(draw, 60), draw.normal(4, 60, dtype=torch.float64), 12
    bounds = (float(torch.linalg.eigvalsh(matrix)[0]), float(torch.linalg.eigvalsh(matrix)[-1]))
    taken = iter(probes)
    with (
        patch.object(peer, "randn", lambda *size, **given: next(taken).clone()),
        patch.object(peer, "approximate_boundaries", lambda *given, **more: bounds),
    ):
        grid, theirs = peer.lanczos_approximate_spectrum(matrix, steps, 200, num_repeats=4)
    run = Lockstep(DenseOperator(matrix), probes.clone(), steps)
    list(run.run())
    width = 1.1 * (bounds[1] - bounds[0]) / 2 * 2 / (steps - 1) / math.sqrt(8 * math.log(3.0))
    ours = run.quadrature().densities(grid.numpy(), width).mean(0)
    return theirs, torch.from_numpy(ours)


@beside(
    "slq",
    peer="moments of the whole matrix",
    kind=FP64,
    compared="the first 16 moments of the quadrature of each probe, each over its size",
    inputs="a 60 x 60 symmetric matrix of decaying spectrum, 30 Lanczos steps, 4 normal probes, fp64",
    tolerance=1e-9,
)
def slq_moments(draw: Draw) -> tuple[Tensor, Tensor]:
    """A Gauss quadrature of m nodes has the first 2 m - 1 moments z^T H^k z / z^T z."""
    matrix, probes = spectrum(draw, 60), draw.normal(4, 60, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix)
    weights = (probes @ vectors).square() / probes.square().sum(1, keepdim=True)
    run = Lockstep(DenseOperator(matrix), probes.clone(), 30)
    list(run.run())
    theirs = torch.stack([weights @ values**k for k in range(1, 17)])
    ours = torch.stack([torch.from_numpy(run.quadrature().moment(k)) for k in range(1, 17)])
    return torch.ones_like(theirs), ours / theirs


@beside(
    "batch-size-theory",
    peer="Benaych-Georges & Nadakuditi 2011, the transform of a semicircle by quadrature",
    kind=FP64,
    compared="the shifted eigenvalues and the edge",
    inputs="eigenvalues 0.3 to 30 of 1000 x 1000 noise, batches of 16 to 512 of 2048, V = 400",
    tolerance=1e-10,
)
def batch_size_theory(draw: Draw) -> tuple[Tensor, Tensor]:
    """An eigenvalue v shows where the mean of 1 / (z - x) over the noise's eigenvalues x is 1 / v, outside of
    them; where the equation has no solution there, at their edge.
    """
    from scipy.integrate import quad
    from scipy.optimize import brentq

    size, noise, items = 1000.0, 400.0, 2048.0
    theirs, ours = [], []
    for batch in (16.0, 64.0, 512.0):
        entry = noise / size**2 / batch * (1 - batch / items)  # variance of an entry of the batch's noise
        edge = 2 * math.sqrt(size * entry)

        def mean(z: float, edge: float = edge) -> float:
            """By the angle, in which the semicircle's density has no end."""
            found = quad(lambda a: math.sin(a) ** 2 / (z - edge * math.cos(a)), 0, math.pi, epsabs=1e-13)
            return 2 / math.pi * found[0]

        for value in (0.3, 1.0, 3.0, 10.0, 30.0):
            least = edge * (1 + 1e-9)
            beyond = mean(least) > 1 / value
            found = brentq(lambda z: mean(z) - 1 / value, least, 100.0, xtol=1e-12) if beyond else edge  # noqa: B023
            theirs.append(found)
            ours.append(shifted_eigenvalue(value, noise, size, batch, items))
    return torch.tensor(theirs, dtype=torch.float64), torch.tensor(ours, dtype=torch.float64)


def hessian_of(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient, Hessian) of the cross-entropy in all weights, by torch.func."""
    names = dict(model.named_parameters())
    flat = torch.cat([p.detach().flatten() for p in names.values()])

    def loss(values: Tensor) -> Tensor:
        parts = values.split([p.numel() for p in names.values()])
        weights = {n: part.view_as(p) for (n, p), part in zip(names.items(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, weights, x), y)

    return torch.func.grad(loss)(flat), torch.func.hessian(loss)(flat)


def expanded(draw: Draw) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A network, its examples, a change of all weights (flat, biases as they are), and what we predict of it:
    (layers, first and second order).
    """
    model = network(draw, 5, 6, 3)
    x, y = draw.normal(24, 5, dtype=torch.float64), draw.normal(24, 3).argmax(1)
    deltas = {
        "0": draw.normal(6, 5, dtype=torch.float64),
        "2": draw.normal(3, 6, dtype=torch.float64),
    }
    changes = torch.cat([deltas["0"].flatten(), torch.zeros(6), deltas["2"].flatten(), torch.zeros(3)])
    found = predicted_change(on_bench(model, x, y), deltas, examples=24, batch_size=7)
    ours = torch.tensor([found.by_layer[name] for name in "02"], dtype=torch.float64)
    return model, x, y, changes, ours


def shares(gradient: Tensor, product: Tensor, changes: Tensor) -> Tensor:
    """(layers, first and second order) of the flat gradient and the Hessian's product with the change."""
    places = (slice(0, 30), slice(36, 54))  # the weights; biases lie between
    return torch.stack(
        [torch.stack([gradient[at] @ changes[at], changes[at] @ product[at] / 2]) for at in places]
    )


TAYLOR = dict(
    compared="first and second order of each layer's share",
    inputs="a 5-6-3 network with cross-entropy, 24 examples in batches of 7, normal changes of all weights",
    tolerance=1e-12,
)


@beside("quadratic-prediction", peer="the whole gradient and Hessian by torch.func", kind=FP64, **TAYLOR)
def quadratic_prediction(draw: Draw) -> tuple[Tensor, Tensor]:
    model, x, y, changes, ours = expanded(draw)
    gradient, hessian = hessian_of(model, x, y)
    return shares(gradient, hessian @ changes, changes), ours


@beside("quadratic-prediction", peer="curvlinops-for-pytorch", kind=PEER, **TAYLOR)
def quadratic_product(draw: Draw) -> tuple[Tensor, Tensor]:
    """Its Hessian-vector product; the gradient is autograd's."""
    from curvlinops import HessianLinearOperator

    model, x, y, changes, ours = expanded(draw)
    weights = dict(model.named_parameters())
    operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), list(weights.values()), [(x, y)])
    loss = F.cross_entropy(model(x), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(weights.values()))])
    return shares(gradient, operator @ changes, changes), ours


def traced(draw: Draw) -> tuple[nn.Module, Tensor, Tensor, float]:
    """A network, its examples, and what Hutchinson's mean is for the rows of a Hadamard matrix as probes,
    which make it the trace itself.
    """
    from scipy.linalg import hadamard

    layers = [nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False)]
    for layer in layers:
        layer.weight.data = draw.normal(*layer.weight.shape, dtype=torch.float64)
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    x, y = draw.normal(20, 4, dtype=torch.float64), draw.normal(20, 4).argmax(1)
    rows = torch.from_numpy(hadamard(64)).double()
    with (
        curvature_operator(on_bench(model, x, y), examples=20, batch_size=8, dtype="float64") as operator,
        patch.object(traces, "rademacher", lambda operator, numbers, seed: rows[list(numbers)]),
    ):
        return model, x, y, traces.hutchinson(operator, 64, 0).value


@beside(
    "flatness",
    peer="curvlinops-for-pytorch",
    kind=PEER,
    compared="the trace of the Hessian (probes that span)",
    inputs="a 4-8-4 network without biases with cross-entropy, 20 examples, fp64",
    tolerance=1e-10,
)
def hessian_trace(draw: Draw) -> tuple[Tensor, Tensor]:
    from curvlinops import HessianLinearOperator

    model, x, y, trace = traced(draw)
    operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)])
    whole = operator @ torch.eye(64, dtype=torch.float64)
    return whole.trace().view(1), torch.tensor([trace], dtype=torch.float64)


@beside(
    "flatness",
    peer="the whole Hessian by torch.func, ranks counted out",
    kind=FP64,
    compared="the Hessian's trace (probes that span), the checkpoints at one loss, the rank correlations",
    inputs="a 4-8-4 network without biases and 20 examples; 12 runs of falling losses; 12 models, fp64",
    tolerance=1e-9,
)
def flat(draw: Draw) -> tuple[Tensor, Tensor]:
    model, x, y, trace = traced(draw)
    _, hessian = hessian_of(model, x, y)
    losses = draw.normal(12, 9, dtype=torch.float64).abs().cumsum(1).flip(1)
    runs = [[flatness.Checkpoint(float(loss), step, {}) for step, loss in enumerate(row)] for row in losses]
    goal = losses[:, -1].max()
    steps = (losses > goal).sum(1).double()
    chosen = [float(point.step) for point in flatness.at_one_loss(runs)]
    values = draw.normal(3, 12, dtype=torch.float64)
    ranks = (values[:, :, None] > values[:, None]).sum(2).double()
    ranks = F.normalize(ranks - ranks.mean(1, keepdim=True), dim=1)
    names = ("trace", "top_eigenvalue", "probe_accuracy")
    table = pd.DataFrame(dict(zip(names, values.numpy(), strict=True))).assign(loss=2.0)
    found = flatness.rank_correlations(table)
    mine = [trace, *chosen, found["trace_correlation"], found["top_eigenvalue_correlation"]]
    theirs = torch.cat([hessian.trace().view(1), steps, ranks[:2] @ ranks[2]])
    return theirs, torch.tensor(mine, dtype=torch.float64)


@beside(
    "self-tuning",
    **source("asteroidhouse/self-tuning-networks"),
    kind=AUTHORS,
    compared="the output of a layer at the hyperparameters drawn",
    inputs="a layer of 12 x 20 normal weights, response and gates, two hyperparameters, 10 inputs, fp64",
    tolerance=1e-12,
)
def self_tuning(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.training.models.self_tuning import Hyperparameter, SelfTuningLinear, Setting

    peer = loaded("asteroidhouse/self-tuning-networks", "cnn/hypermodels/hyperlinear.py").HyperLinear
    theirs = peer(20, 12, 2).double()
    for name, p in theirs.named_parameters():
        if name != "elem_scalar":  # a scale of the whole that they begin at one
            p.data = draw.normal(*p.shape, dtype=torch.float64)
    setting = Setting([Hyperparameter("a", 0.1), Hyperparameter("b", 0.3, "fraction")]).double()
    setting.noise.copy_(draw.normal(2, dtype=torch.float64))
    ours = SelfTuningLinear(nn.Linear(20, 12).double(), setting)
    gates = theirs.htensor_to_scalars.weight
    given = {
        "weight": theirs.elem_weight,
        "response": theirs.hnet_weight,
        "gate": gates[:12],
        "bias": theirs.elem_bias,
        "bias_response": theirs.hnet_bias,
        "bias_gate": gates[12:],
    }
    ours.load_state_dict({k: v.detach() for k, v in given.items()})
    x = draw.normal(10, 20, dtype=torch.float64)
    return theirs(x, setting.drawn.detach().expand(10, 2)), ours(x)


@beside(
    "lipschitz-transformer",
    peer="Newhouse et al. 2025, token by token",
    kind=FP64,
    compared="the logits, and the certificate",
    inputs="2 sequences of 7 tokens, width 8, 2 blocks, normal weights, fp64",
    tolerance=1e-10,
)
def lipschitz(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.training.models.lipschitz import LipschitzTransformer

    model = LipschitzTransformer(11, width=8, layers=2, context=9).double()
    for p in model.parameters():
        p.data = draw.normal(*p.shape, dtype=torch.float64) / 8**0.5
    ids = torch.randint(11, (2, 7), generator=draw.generator)
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    unit = lambda table: table / np.sqrt((table**2).mean(1, keepdims=True))  # noqa: E731
    logits = []
    for row in ids.numpy():
        x = (unit(w["tokens.weight"])[row] + unit(w["positions.weight"])[:7]) / 2
        for block in "01":
            q, k, v, o = (w[f"blocks.{block}.0.{name}.weight"] for name in ("query", "key", "value", "out"))
            mixed = [softmax((q @ x[t]) @ (x[: t + 1] @ k.T).T / 8) @ (x[: t + 1] @ v.T) for t in range(7)]
            x = 0.75 * x + 0.25 * np.stack(mixed) @ o.T
            up, down = w[f"blocks.{block}.1.up.weight"], w[f"blocks.{block}.1.down.weight"]
            x = 0.75 * x + 0.25 * np.maximum(x @ up.T, 0) @ down.T
        logits.append(x @ w["head.weight"].T)
    certificate = torch.tensor([bound(w)], dtype=torch.float64)
    logits_of = model(ids)
    ours = torch.tensor([model.certificate()], dtype=torch.float64)
    return torch.cat([torch.from_numpy(np.stack(logits)).flatten(), certificate / certificate]), torch.cat(
        [logits_of.detach().flatten(), ours / certificate]
    )


def bound(w: dict[str, Any]) -> float:
    """Norms by the eigenvalues of Gram matrices; each part L moves the product by 3/4 + L / 4."""
    norm = lambda name: math.sqrt(np.linalg.eigvalsh(w[name].T @ w[name])[-1])  # noqa: E731
    total, radius = norm("head.weight"), 1.0
    for block in "01":
        at = f"blocks.{block}"
        value = norm(f"{at}.0.out.weight") * norm(f"{at}.0.value.weight")
        scores = norm(f"{at}.0.query.weight") * norm(f"{at}.0.key.weight")
        total *= 0.75 + 0.25 * value * (1 + 2 * scores * radius**2)
        radius *= 0.75 + 0.25 * value
        both = norm(f"{at}.1.up.weight") * norm(f"{at}.1.down.weight")
        total, radius = total * (0.75 + 0.25 * both), radius * (0.75 + 0.25 * both)
    return total
