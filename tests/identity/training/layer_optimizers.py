"""Optimizers of first order and those that need more than gradients, beside authors' code or written out."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.identity.pairs import Draw, beside
from tests.identity.repositories import source
from tests.identity.scripts import loaded, taken
from tests.identity.training.optimizers import INPUTS, LR, SHAPES, STEPS
from workbench.storage.identity import AUTHORS, FP64
from workbench.training.optimizer.mkor import rank_one_inverse
from workbench.training.optimizer.optimizers import make_optimizer

DECAY = 0.1
SUMS = dict(kind=FP64, compared="the weights", inputs=INPUTS, tolerance=1e-12)
Derive = Callable[[Tensor, Tensor], Tensor]


def summed(
    draw: Draw, name: str, derived: Derive, decay: float = 0.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """`derived(start, gradients (steps, ...))` beside the registered optimizer's weights."""
    starts = [draw.normal(*shape, dtype=torch.float64) for shape in SHAPES]
    gradients = [draw.normal(STEPS, *shape, dtype=torch.float64) for shape in SHAPES]
    weights = [nn.Parameter(start.clone()) for start in starts]
    optimizer = make_optimizer(name, LR, decay, **options)(nn.ParameterList(weights))
    for step in range(STEPS):
        for weight, rows in zip(weights, gradients, strict=True):
            weight.grad = rows[step].clone()
        optimizer.step()
    theirs = [derived(start, rows) for start, rows in zip(starts, gradients, strict=True)]
    return torch.cat([t.flatten() for t in theirs]), torch.cat([w.detach().flatten() for w in weights])


def averages(rows: Tensor, beta: float) -> Tensor:
    """The bias-corrected averages of all steps as one product with their weights, (steps, ...)."""
    t = torch.arange(len(rows), dtype=torch.float64)
    weights = torch.tril(beta ** (t[:, None] - t[None]).clamp_min(0))
    return torch.tensordot(weights / weights.sum(1, keepdim=True), rows, 1)


@beside("adamw", peer="Loshchilov & Hutter 2019, as sums over all steps", **SUMS)
def adamw(draw: Draw) -> tuple[Tensor, Tensor]:
    def derived(start: Tensor, rows: Tensor) -> Tensor:
        moves = averages(rows, 0.9) / (averages(rows.square(), 0.95).sqrt() + 1e-8)
        left = (1 - LR * DECAY) ** torch.arange(STEPS - 1, -1, -1, dtype=torch.float64)
        return start * (1 - LR * DECAY) ** STEPS - LR * torch.tensordot(left, moves, 1)

    return summed(draw, "adamw", derived, DECAY)


@beside("sgd", peer="Polyak 1964, as sums over all steps", **SUMS)
def sgd(draw: Draw) -> tuple[Tensor, Tensor]:
    """A gradient of step s has moved the weights by 1 + mu + ... + mu^(T - 1 - s) of the rate in the end."""

    def derived(start: Tensor, rows: Tensor) -> Tensor:
        left = torch.arange(STEPS, 0, -1, dtype=torch.float64)
        return start - LR * torch.tensordot((1 - 0.9**left) / (1 - 0.9), rows, 1)

    return summed(draw, "sgd", derived)


@beside("adagrad", peer="Duchi, Hazan & Singer 2011, as sums over all steps", **SUMS)
def adagrad(draw: Draw) -> tuple[Tensor, Tensor]:
    def derived(start: Tensor, rows: Tensor) -> Tensor:
        return start - LR * (rows / (rows.square().cumsum(0).sqrt() + 1e-10)).sum(0)

    return summed(draw, "adagrad", derived)


@beside("lamb", peer="You et al. 2020, algorithm 2", **SUMS)
def lamb(draw: Draw) -> tuple[Tensor, Tensor]:
    """With the bias correction, which the authors' code leaves out; the other pair is without."""

    def derived(start: Tensor, rows: Tensor) -> Tensor:
        moves = averages(rows, 0.9) / (averages(rows.square(), 0.999).sqrt() + 1e-6)
        w = start.numpy().copy()
        for move in moves.numpy():
            u = move + DECAY * w
            w -= LR * min(np.sqrt((w**2).sum()), 10.0) / np.sqrt((u**2).sum()) * u
        return torch.from_numpy(w)

    return summed(draw, "lamb", derived, DECAY)


@beside(
    "one-bit-adam",
    **source("microsoft/DeepSpeed"),
    kind=AUTHORS,
    compared="the weights, by their compression of what workers and server send (kept in float64)",
    inputs="5 steps of Adam, then 10 of four workers, a normal 12 x 20 matrix on seeded normal gradients",
    tolerance=1e-9,
)
def one_bit_adam(draw: Draw) -> tuple[Tensor, Tensor]:
    """The compression is the one that their own test holds their kernels against; torch's Adam warms up."""
    away = SimpleNamespace(
        all_reduce=lambda values: None, get_world_size=lambda: 1, get_rank=lambda: 0, barrier=lambda: None
    )
    device = SimpleNamespace(synchronize=lambda: None)
    send = taken(
        "microsoft/DeepSpeed",
        "tests/onebit/test_nccl_backend.py",
        "torch_sim",
        torch=torch,
        dist=away,
        np=np,
        get_accelerator=lambda: device,
    )["torch_sim"]
    workers, freeze, steps = 4, 5, 15
    start = draw.normal(12, 20, dtype=torch.float64)
    rows = draw.normal(steps, workers, 12, 20, dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    adam = torch.optim.Adam([weight], lr=LR)
    for row in rows[:freeze]:
        weight.grad = row.mean(0)
        adam.step()
    state = adam.state[weight]
    m, root = state["exp_avg"], (state["exp_avg_sq"] / (1 - 0.999**freeze)).sqrt() + 1e-8
    errors, error, theirs = [torch.zeros_like(m)] * workers, torch.zeros_like(m), weight.detach()
    with patch.object(torch.Tensor, "float", torch.Tensor.double):
        for t, row in enumerate(rows[freeze:], freeze + 1):
            sent = [send((0.9 * m + 0.1 * g + e).flatten())[:2] for g, e in zip(row, errors, strict=True)]
            errors = [e.view(12, 20) for _, e in sent]
            whole = torch.stack([c for c, _ in sent]).mean(0).view(12, 20) + error
            m = send(whole.flatten())[0].view(12, 20)
            error = whole - m
            theirs = theirs - LR * m / (1 - 0.9**t) / root
    ours = nn.Parameter(start.clone())
    made = make_optimizer("one-bit-adam", LR, freeze=freeze, workers=workers)(nn.ParameterList([ours]))
    for row in rows:
        made.zero_grad()
        for g in row:
            ((ours * g).sum() / workers).backward()
        made.step()
    return theirs, ours


@beside(
    "mkor",
    **source("Mohammad-Mozaffari/mkor"),
    kind=AUTHORS,
    compared="the inverse, by their rank-one update",
    inputs="20 rank-one updates of a 16 x 16 identity with normal vectors, decay 0.9 as in the paper",
    tolerance=1e-12,
)
def mkor_inverse(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their optimizer mixes 0.05 of the identity in before each update, which the paper does not."""
    update = loaded("Mohammad-Mozaffari/mkor", "mkor/utils/factors.py").sm_inverse
    theirs = ours = torch.eye(16, dtype=torch.float64)
    for vector in draw.normal(20, 16, dtype=torch.float64):
        theirs = update(theirs / 0.9, (0.1**0.5 * vector)[:, None])
        ours = rank_one_inverse(ours, vector, 0.9)
    return theirs, ours


def network(draw: Draw, *widths: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layer = nn.Linear(inputs, outputs).double()
        layer.weight.data = draw.normal(outputs, inputs, dtype=torch.float64) / inputs**0.5
        layer.bias.data = draw.normal(outputs, dtype=torch.float64) / 10
        parts += [layer, nn.Tanh()]
    return nn.Sequential(*parts[:-1])


@beside(
    "mkor",
    peer="Mozaffari et al. 2023, algorithm 1 with dense inverses",
    kind=FP64,
    compared="the weights",
    inputs="25 steps of momentum on a 6-8-3 network and squared errors, the stabiliser at work",
    tolerance=1e-10,
)
def mkor(draw: Draw) -> tuple[Tensor, Tensor]:
    """The averages themselves are kept and inverted anew, and means of inputs and of output gradients come
    from a forward pass written out.
    """
    model, limit = network(draw, 6, 8, 3), 1.3
    batches = [
        (draw.normal(10, 6, dtype=torch.float64), draw.normal(10, 3, dtype=torch.float64)) for _ in range(25)
    ]
    weights = [p.detach().clone() for p in model.parameters()]
    moments = [torch.zeros_like(w) for w in weights]
    sides = [torch.eye(size, dtype=torch.float64) for size in (8, 6, 3, 8)]

    def followed(average: Tensor, vector: Tensor) -> Tensor:
        average = 0.9 * average + 0.1 * vector[:, None] * vector
        inverse = torch.linalg.inv(average)
        if inverse.abs().max() > limit:
            return torch.linalg.inv(0.9 * inverse + 0.1 * torch.eye(len(vector), dtype=torch.float64))
        return average

    for step, (x, y) in enumerate(batches):
        w1, b1, w2, b2 = weights
        h = torch.tanh(x @ w1.T + b1)
        down = 2 * (h @ w2.T + b2 - y) / y.numel()
        up = down @ w2 * (1 - h**2)
        if step % 10 == 0:
            means = (up.sum(0), x.mean(0), down.sum(0), h.mean(0))
            sides = [followed(a, v) for a, v in zip(sides, means, strict=True)]
        grads = [up.T @ x, up.sum(0), down.T @ h, down.sum(0)]
        for i, (left, right) in ((0, sides[:2]), (2, sides[2:])):
            moved = torch.linalg.solve(left, torch.linalg.solve(right, grads[i].T).T)
            grads[i] = moved * grads[i].norm() / moved.norm()
        moments = [0.9 * m + g for m, g in zip(moments, grads, strict=True)]
        weights = [w - LR * m for w, m in zip(weights, moments, strict=True)]
    optimizer = make_optimizer("mkor", LR, threshold=limit)(model)
    for x, y in batches:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return torch.cat([w.flatten() for w in weights]), torch.cat([p.flatten() for p in model.parameters()])


class TwoRanks:
    """`torch.distributed` of two processes as the first sees it; `other` holds the second's gradients."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.groups = groups
        self.other: dict[Tensor, Tensor] = {}

    def get_world_size(self) -> int:
        return 2

    def get_rank(self) -> int:
        return 0

    def new_group(self, ranks: Any) -> str:
        return "alone" if len(ranks) == 1 and ranks != [0, 1] else "both"

    def broadcast(self, values: Tensor, source: int) -> None:
        return None

    def all_reduce(self, values: Tensor, group: str = "both") -> None:
        if group == "both":
            for p, gradient in self.other.items():
                if p.grad is not None and p.grad.data_ptr() == values.data_ptr():
                    values += gradient

    def all_gather(self, into: list[Tensor], mine: Tensor, group: str) -> None:
        into[0].copy_(mine)
        into[1].copy_(torch.cat([self.other[p].flatten() for g in self.groups for p in g["params"]]) * 2)


def hooks() -> Iterator[tuple[str, types.ModuleType]]:
    for name in ("mmcv", "mmcv__runner", "mmcv__runner__hooks", "mmcv__runner__hooks__hook"):
        module = types.ModuleType(name.replace("__", "."))
        module.HOOKS = SimpleNamespace(register_module=lambda: lambda made: made)  # type: ignore[attr-defined]
        module.Hook = object  # type: ignore[attr-defined]
        yield name, module


@beside(
    "agvm",
    **source("Sense-X/AGVM"),
    kind=AUTHORS,
    compared="the weights, and the factors of the modules",
    inputs="20 steps of momentum on a 6-8-8-3 network, halves of 16 examples in their two processes",
    tolerance=1e-9,
)
def agvm(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their hook begins after 500 steps of warm-up, here at once."""
    module = loaded("Sense-X/AGVM", "agvm/optim/agvm_optimizer_hook.py", **dict(hooks()))
    model = network(draw, 6, 8, 8, 3)
    x, y = draw.normal(20, 16, 6, dtype=torch.float64), draw.normal(20, 16, 3, dtype=torch.float64)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    groups = [{"params": list(layer.parameters())} for layer in model if isinstance(layer, nn.Linear)]
    module.dist = ranks = TwoRanks(groups)  # type: ignore[attr-defined]
    hook = module.AgvmOptimizerHook(lr_update_start_iter=0, warmup_iters=0)
    theirs = torch.optim.SGD(groups, lr=LR, momentum=0.9)
    for step in range(20):
        half = F.mse_loss(model(x[step, 8:]), y[step, 8:]) / 2
        found = torch.autograd.grad(half, list(model.parameters()))
        ranks.other = dict(zip(model.parameters(), found, strict=True))
        loss = F.mse_loss(model(x[step, :8]), y[step, :8])
        runner = SimpleNamespace(outputs={"loss": loss}, model=model, optimizer=theirs, iter=step)
        hook.after_train_iter(runner)
    ended = [p.detach().clone().flatten() for p in model.parameters()] + [
        torch.tensor(hook.scale_factors, dtype=torch.float64)
    ]
    model.load_state_dict(start)
    ours = make_optimizer("agvm", LR)(model)
    subject = SimpleNamespace(loss=lambda batch: F.mse_loss(model(batch["x"]), batch["y"]))
    for step in range(20):
        whole = {"x": x[step], "y": y[step]}
        run = SimpleNamespace(
            optimizer=ours, step=step, chosen=range(16), batch=lambda whole=whole: whole, subject=subject
        )
        ours.zero_grad()
        subject.loss(whole).backward()
        for group in ours.param_groups:
            group["lr"] = LR
        ours.prepare(run)  # type: ignore[attr-defined]
        ours.step()
    scales = torch.tensor(list(ours.prepare.scales.values()), dtype=torch.float64)  # type: ignore[attr-defined]
    return torch.cat(ended), torch.cat([p.detach().flatten() for p in model.parameters()] + [scales])
