"""What measuring the distance of two models costs, and how many texts it takes; run by hand:
`python tests/benchmarks/bench_fidelity.py time [--subject smollm2] [--windows 64]` and
`... texts [--subject smollm2] [--examples 64]`.

time : CPU seconds of all measures of one domain, the dense model's answers included, in times of two plain
    forward passes with logits over the same windows, by turns in one process; and what the process holds
    at its peak beyond both models.
texts : GPTQ and rounding to nearest against the dense model, at 3 and 4 bits in groups of 64, a scale each:
    texts until the 95 % interval of the paired difference of the two excludes 0, (1.96 sd / mean)^2 of the
    differences by text, for the divergence, the loss and the accuracy (of a language model: the share of
    tokens whose first word is the dense model's).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import workbench
from workbench.measures import compare
from workbench.measures.language import TokenPairs
from workbench.measures.reference import Comparison, batch_of
from workbench.progress import Progress
from workbench.quantization import Quantize
from workbench.subjects import Subject
from workbench.subjects.changes import baked

PROCESS = Path("/proc/self")


def rounded(on: Subject, bits: int, rounding: str, calibration: int = 32) -> Subject:
    fields = dict(calibration_examples=calibration, predict_examples=0, test_examples=0)
    asked = Quantize(format=f"int{bits}", granularity="group", group_size=64, rounding=rounding, **fields)
    made = asked.run(on, Progress()).subject
    assert made is not None
    return made


def held(kind: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, the highest since `forget_peak`."""
    line = next(row for row in (PROCESS / "status").read_text().splitlines() if row.startswith(kind))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    (PROCESS / "clear_refs").write_text("5")


@torch.no_grad()
def passes(models: list[Subject], windows: int, batch_size: int) -> float:
    began = time.process_time()
    for on in models:
        for batch in on.batches("test", batch_size, windows):
            on.task.output(on.model, batch)
    return time.process_time() - began


def time_it(name: str, windows: int, turns: int) -> None:
    on = workbench.subject(name)
    other = rounded(on, 4, "nearest", 1)
    other = other.with_model(baked(other.model))  # its weights are put together before, as a saved model's
    batch_size = batch_of(on, "test")
    passes([on, other], 1, batch_size)  # the weights lie in a file until they are read
    ratios = []
    for turn in range(turns):
        dense = on.with_model(on.model)  # nothing is remembered of it
        before = held("VmRSS")
        forget_peak()
        began = time.process_time()
        found = compare(dense, other, "test", windows, batch_size=batch_size).measures()
        seconds, peak = time.process_time() - began, held("VmHWM") - before
        plain = passes([on, other], windows, batch_size)
        ratios.append(seconds / plain)
        print(
            f"turn {turn}: measures {seconds:.1f} s CPU, two plain passes {plain:.1f} s: {ratios[-1]:.3f}; "
            f"peak {peak / 1e6:.0f} MB beyond both models; KL {found['kl']:.5f}",
            flush=True,
        )
    print(f"median {statistics.median(ratios):.3f} of two plain passes (goal 1.25; memory 200 MB)")


def by_text(found: Comparison) -> dict[str, NDArray[np.float64]]:
    """Each text's divergence and loss, and its accuracy or the share of tokens whose first word stays."""
    pairs = found.pairs
    if isinstance(pairs, TokenPairs):
        rows = {"divergence": pairs.divergence, "loss": -pairs.changed_log_p}
        rows["same first word"] = pairs.same_top.astype(float)
        ends = np.flatnonzero(np.diff(pairs.window)) + 1
        return {k: np.array([part.mean() for part in np.split(v, ends)]) for k, v in rows.items()}
    place = np.arange(len(pairs.target))
    return {
        "divergence": found.distances(),
        "loss": -pairs.changed[place, pairs.target],
        "accuracy": (pairs.changed.argmax(-1) == pairs.target).astype(float),
    }


def texts(name: str, examples: int) -> None:
    on = workbench.subject(name)
    for bits in (3, 4):
        found = {}
        for rounding in ("gptq", "nearest"):
            other = rounded(on, bits, rounding)
            found[rounding] = by_text(compare(on, other, "test", examples, batch_size=batch_of(on, "test")))
            del other
        for measure in found["gptq"]:
            apart = found["gptq"][measure] - found["nearest"][measure]
            mean, spread = apart.mean(), apart.std(ddof=1)
            half = 1.96 * spread / len(apart) ** 0.5
            needed = len(apart) * (half / mean) ** 2 if mean else np.inf
            print(
                f"{name} {bits} bits, {measure}: GPTQ - nearest {mean:.5f} +- {half:.5f} over {len(apart)} "
                f"texts; texts needed {needed:.1f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("time", "texts"))
    parser.add_argument("--subject", default="smollm2")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    space = parser.parse_args()
    torch.set_num_threads(1)
    if space.what == "time":
        time_it(space.subject, space.windows, space.turns)
    else:
        texts(space.subject, space.examples)


if __name__ == "__main__":
    main()
