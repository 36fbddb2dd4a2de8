"""One proposal over a pool of 1,000 candidates, from 500 fitted runs and 10 laws.

    python tests/benchmarks/bench_next_run.py

CPU seconds (run with OMP_NUM_THREADS=1), medians of five: a proposal from laws that are fitted, what building
the beliefs takes, and a batch of ten; fitting, resampling and calibrating the ten laws once stands beside it.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import numpy as np
import pandas as pd

from workbench.scaling import Proposer, law
from workbench.scaling.proposing.proposals import beliefs_of

LAWS = (
    "chinchilla",
    "kaplan",
    "over-training",
    "power-compute",
    "power-params",
    "E + A/params**0.3 + B/tokens**beta",
    "E + A/params**alpha + B/tokens**0.37",
    "E + A/params**0.35 + B/tokens**beta",
    "E + (A/params + B/tokens)**alpha",
    "E + A/params**alpha + B/tokens**0.4",
)
TRUTH = {"E": 1.8, "A": 480, "B": 2000, "alpha": 0.35, "beta": 0.37}


def timed(function: object, repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        function()  # type: ignore[operator]
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def main() -> None:
    n, d = (g.ravel() for g in np.meshgrid(np.logspace(7, 9, 20), np.logspace(9, 10.5, 25)))
    noise = 0.004 * np.random.default_rng(0).standard_normal(500)
    runs = {"params": n, "tokens": d}
    runs["loss"] = law("chinchilla").predict(TRUTH, runs) * np.exp(noise)
    began = time.process_time()
    made = Proposer(
        runs, LAWS, "params=7e9, tokens=1.4e11", "params=1e7:3e9:40, tokens=1e9:1e11:25", starts=64
    )
    fitted = time.process_time() - began
    print(made.stack.table.to_string(index=False))
    print(f"left out: {dict(made.stack.left_out)}")
    print(
        f"{len(made.pool):,} candidates, {len(made.runs)} runs, {len(made.stack.members)} laws in the stack"
    )
    everywhere = pd.concat([made.target, made.pool], ignore_index=True)
    made.stack = replace(made.stack, weights=np.full(len(made.stack.members), 1 / len(made.stack.members)))
    building = timed(lambda: setattr(made, "beliefs", beliefs_of(made.stack, everywhere)))
    print(f"all of them plausible: one proposal {timed(made.ask):.2f} s, its beliefs {building:.2f} s")
    ten = timed(lambda: made.ask(10, budget=1e23), 1)
    print(f"a batch of ten: {ten:.2f} s; all fits before it {fitted:.0f} s")


if __name__ == "__main__":
    main()
