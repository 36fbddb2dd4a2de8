"""The loop against a bare PyTorch loop, custom optimizers against torch's foreach AdamW,
and a sweep's cost per trial. Run by hand.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_training.py [sweep] [elementwise] [matrices] [loop]

Rounds alternate in one process, so ratios hold on a busy machine; medians of the rounds are printed.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn

import workbench
from workbench.training import Sweep, fit
from workbench.training.data_order import take
from workbench.training.optimizer.galore import GaLore, projection
from workbench.training.optimizer.kron import Kron
from workbench.training.optimizer.lamb import LAMB
from workbench.training.optimizer.lars import LARS
from workbench.training.optimizer.mkor import MKOR
from workbench.training.optimizer.muon import Muon
from workbench.training.optimizer.one_bit_adam import OneBitAdam
from workbench.training.optimizer.scion import Scion
from workbench.training.optimizer.sophia import Sophia
from workbench.training.schedule.schedules import profile
from workbench.training.sweep.objective import reinitialised


def alternating(candidates: dict[str, Callable[[], float]], rounds: int = 5) -> dict[str, float]:
    """Median processor seconds of each, measured in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            seconds[name].append(run())
    return {name: statistics.median(values) for name, values in seconds.items()}


def loop(steps: int = 4, batch_size: int = 4) -> None:
    on = workbench.subject("bytelm")
    on.splits["validation"] = {k: v[:1] for k, v in on.splits["validation"].items()}
    columns = on.split("train")

    def ours() -> float:
        mine = reinitialised(on, 0)
        before = time.process_time()
        fit(mine, steps=steps, batch_size=batch_size)
        return time.process_time() - before

    def bare() -> float:
        model = reinitialised(on, 0).model.train()
        before = time.process_time()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        shape = profile("cosine")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: shape(t / steps))
        for step in range(steps):
            chosen = take(len(columns["input_ids"]), 0, step * batch_size, batch_size)
            batch = {k: v[chosen] for k, v in columns.items()}
            loss = on.task.loss(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            loss.item()
        model.eval()
        on.with_model(model).evaluate("validation")  # fit ends with an evaluation too
        return time.process_time() - before

    found = alternating({"bare": bare, "fit": ours})
    print(
        f"loop: {found['fit'] / found['bare']:.3f} x a bare loop on bytelm "
        f"({found['bare'] / steps * 1e3:.0f} ms of processor time a step)"
    )


#: Passes over all elements of a step: calls of a foreach function, norms among them.
PASSES = {"AdamW foreach": 8, "SGD momentum foreach": 3}
RATIOS = (
    ("LAMB", "AdamW foreach", 11),
    ("LARS", "SGD momentum foreach", 5),
    ("Sophia (no Hessian)", "AdamW foreach", 8),
    ("1-bit Adam (compressed, one worker)", "AdamW foreach", 12),
)


def stepping(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    count: int,
    width: int,
    steps: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], float]:
    weights = [nn.Parameter(torch.randn(width, width).to(dtype)) for _ in range(count)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = make(weights)
    optimizer.step()

    def run() -> float:
        before = time.process_time()
        for _ in range(steps):
            optimizer.step()
        return (time.process_time() - before) / steps

    return run


def elementwise(count: int = 12, width: int = 512) -> None:
    made: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "AdamW foreach": lambda w: torch.optim.AdamW(w, foreach=True),
        "LAMB": lambda w: LAMB(w),
        "SGD momentum foreach": lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9, foreach=True),
        "LARS": lambda w: LARS(w),
        "Sophia (no Hessian)": lambda w: Sophia(w),
        "1-bit Adam (compressed, one worker)": lambda w: OneBitAdam(w, freeze=1),
    }
    found = alternating({name: stepping(make, count, width) for name, make in made.items()}, 7)
    for name, base, passes in RATIOS:
        ratio = found[name] / found[base]
        print(
            f"{name}: {ratio:.2f} x {base}, {ratio * PASSES[base] / passes:.2f} x at equal passes ({passes} "
            f"to {PASSES[base]}); {found[name] * 1e3:.1f} ms a step"
        )


class Projected(torch.optim.Optimizer):
    """What torch itself offers for GaLore's step: products with a fixed basis around its own foreach AdamW
    of the projections.
    """

    def __init__(self, weights: list[nn.Parameter], rank: int = 32) -> None:
        super().__init__(weights, {})
        self.weights, self.bases = weights, [projection(w.grad, rank)[0] for w in weights]  # type: ignore[arg-type]
        self.reduced = [nn.Parameter(torch.zeros(rank, w.shape[1])) for w in weights]
        self.inner = torch.optim.AdamW(self.reduced, foreach=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for r, basis, w in zip(self.reduced, self.bases, self.weights, strict=True):
            r.grad = basis.mT @ w.grad  # type: ignore[operator]
        self.inner.step()
        for r, basis, w in zip(self.reduced, self.bases, self.weights, strict=True):
            w.addmm_(basis, r, alpha=-1e-3)


class Preconditioned(torch.optim.SGD):
    """What torch itself offers for MKOR's step between two updates of its factors:
    two products a matrix, a norm each, its own foreach SGD.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for w in self.param_groups[0]["params"]:
            eye = self.state[w].setdefault("factor", torch.eye(len(w)))
            direction = eye @ w.grad @ eye
            w.grad.copy_(direction * (w.grad.norm() / direction.norm()))
        super().step()


def mkor(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    layers = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights)
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = weight
    return MKOR(layers, torch.optim.SGD(weights, lr=0.1, momentum=0.9, foreach=True))


def matrices() -> None:
    """Optimizers whose step is matrix products, beside the same products in torch or pytorch_optimizer:
    name, ours, name, theirs, matrices, width, dtype.
    """
    from pytorch_optimizer import SCION
    from pytorch_optimizer import Kron as TheirKron

    short, whole = torch.bfloat16, torch.float32
    pairs: list[
        tuple[
            str,
            Callable[..., torch.optim.Optimizer],
            str,
            Callable[..., torch.optim.Optimizer],
            int,
            int,
            torch.dtype,
        ]
    ] = [
        (
            "GaLore (rank 32, no refresh)",
            lambda w: GaLore(w, rank=32),
            "torch's foreach AdamW",
            lambda w: torch.optim.AdamW(w, foreach=True),
            12,
            512,
            whole,
        ),
        (
            "GaLore (rank 32, no refresh)",
            lambda w: GaLore(w, rank=32),
            "projections around torch's foreach AdamW",
            Projected,
            12,
            512,
            whole,
        ),
        (
            "Muon, bfloat16 weights",
            lambda w: Muon(w),
            "torch.optim.Muon",
            lambda w: torch.optim.Muon(w),
            4,
            256,
            short,
        ),
        (
            "Muon, float32 weights",
            lambda w: Muon(w),
            "torch.optim.Muon, which iterates in bfloat16",
            lambda w: torch.optim.Muon(w),
            4,
            256,
            whole,
        ),
        (
            "Scion, bfloat16 weights",
            lambda w: Scion(w),
            "pytorch_optimizer.SCION",
            lambda w: SCION(w, norm_type=2),
            4,
            256,
            short,
        ),
        (
            "Kron",
            lambda w: Kron(w),
            "pytorch_optimizer.Kron",
            lambda w: TheirKron(w, precondition_dtype=None),
            1,
            48,
            whole,
        ),
        (
            "MKOR over SGD, factors kept",
            mkor,
            "the same products and torch's foreach SGD",
            lambda w: Preconditioned(w, lr=0.1, momentum=0.9, foreach=True),
            6,
            256,
            whole,
        ),
    ]
    for ours, make, theirs, other, count, width, dtype in pairs:
        found = alternating(
            {
                "ours": stepping(make, count, width, dtype=dtype),
                "theirs": stepping(other, count, width, dtype=dtype),
            }
        )
        print(
            f"{ours}: {found['ours'] / found['theirs']:.2f} x {theirs}; {found['ours'] * 1e3:.1f} ms a step",
            flush=True,
        )


def sweep(trials: int = 40) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = Sweep(
            "bench",
            {"x": list(range(trials))},
            lambda params, trial: {"value": 0.0},
            storage=f"sqlite:///{folder}/s.sqlite",
        )
        made.open().close()
        before, cpu = time.perf_counter(), time.process_time()
        made.run(workers=1)
        print(
            f"sweep: {(time.process_time() - cpu) / trials * 1e3:.1f} ms of processor time, "
            f"{(time.perf_counter() - before) / trials * 1e3:.1f} ms in all, a trial"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = {"sweep": sweep, "elementwise": elementwise, "matrices": matrices, "loop": loop}
    for part in sys.argv[1:] or parts:
        parts[part]()
