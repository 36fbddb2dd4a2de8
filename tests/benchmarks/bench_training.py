"""The loop against a bare PyTorch loop, custom optimizers against torch's foreach AdamW, and a sweep's cost per trial. Run by hand.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_training.py

Rounds alternate in one process, so ratios hold on a busy machine; medians of the rounds are printed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn

import workbench
from workbench.training import Sweep, fit
from workbench.training.galore import GaLore
from workbench.training.lamb import LAMB, LARS
from workbench.training.objective import reinitialised
from workbench.training.onebit import OneBitAdam
from workbench.training.order import take
from workbench.training.schedules import cosine
from workbench.training.sophia import Sophia


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
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: cosine(t / steps))
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
    print(f"loop: {found['fit'] / found['bare']:.3f} x a bare loop on bytelm ({found['bare'] / steps * 1e3:.0f} ms of processor time a step)")


#: Passes over all elements of a step: calls of a foreach function, norms among them.
PASSES = {"AdamW foreach": 8, "SGD momentum foreach": 3}
RATIOS = (("LAMB", "AdamW foreach", 11), ("LARS", "SGD momentum foreach", 5), ("GaLore (rank 32, no refresh)", "AdamW foreach", 6),
          ("Sophia (no Hessian)", "AdamW foreach", 7), ("1-bit Adam (compressed, one worker)", "AdamW foreach", 14))  # fmt: skip


def optimizers(count: int = 12, width: int = 512) -> None:
    def stepping(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[], float]:
        weights = [nn.Parameter(torch.randn(width, width)) for _ in range(count)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer = make(weights)
        optimizer.step()

        def run() -> float:
            before = time.process_time()
            for _ in range(3):
                optimizer.step()
            return time.process_time() - before

        return run

    found = alternating({
        "AdamW foreach": stepping(lambda w: torch.optim.AdamW(w, foreach=True)), "LAMB": stepping(lambda w: LAMB(w)),
        "SGD momentum foreach": stepping(lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9, foreach=True)), "LARS": stepping(lambda w: LARS(w)),
        "GaLore (rank 32, no refresh)": stepping(lambda w: GaLore(w, rank=32)), "Sophia (no Hessian)": stepping(lambda w: Sophia(w)),
        "1-bit Adam (compressed, one worker)": stepping(lambda w: OneBitAdam(w, freeze=1)),
    }, 7)  # fmt: skip
    for name, base, passes in RATIOS:
        ratio = found[name] / found[base]
        print(f"{name}: {ratio:.2f} x {base}, {ratio * PASSES[base] / passes:.2f} x at equal passes ({passes} to {PASSES[base]}); {found[name] / 3 * 1e3:.1f} ms a step")


def sweep(trials: int = 40) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = Sweep("bench", {"x": list(range(trials))}, lambda params, trial: {"value": 0.0}, storage=f"sqlite:///{folder}/s.sqlite")
        made.open().close()
        before, cpu = time.perf_counter(), time.process_time()
        made.run(workers=1)
        print(f"sweep: {(time.process_time() - cpu) / trials * 1e3:.1f} ms of processor time, {(time.perf_counter() - before) / trials * 1e3:.1f} ms in all, a trial")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sweep()
    optimizers()
    loop()
