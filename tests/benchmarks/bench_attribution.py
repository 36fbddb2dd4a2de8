"""Attribution against plain forward passes, and how well its predictions are met; run by hand:
`python tests/benchmarks/bench_attribution.py [--subject smollm2] [--change w4|wanda] [--disk 2048]`.

Printed: CPU seconds of one forward pass with logits over the windows, of all blocks and of all modules
swapped in one by one (the dense model's own answers and the cheap scores included), their ratio to as many
forward passes; full / sum; what giving the worst three back was predicted to leave and leaves; the worst
parts. An interrupted run of the same settings goes on, and then has no timing of what it did not do.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import workbench
from workbench.measures.attribution import Attribution, Run
from workbench.measures.attribution_result import by_role
from workbench.measures.parts import beside, parts_of
from workbench.measures.suffix import Suffix
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.quantization import Quantize
from workbench.subjects import Subject
from workbench.unfinished import journal
from workbench.unfinished.finished_parts import FinishedParts


def changed(on: Subject, change: str, windows: int) -> Subject:
    """4 bits a weight and a scale a row, rounded to nearest; or half of the weights removed by Wanda."""
    small = on.with_split("test", {k: v[: max(windows, 8)] for k, v in on.split("test").items()})
    if change == "w4":
        fields = dict(calibration_examples=1, predict_examples=0, test_examples=0)
        made = Quantize(format="int4", granularity="channel", **fields).run(small, Progress())
    else:
        made = Prune(method="wanda", sparsity=0.5, predict_examples=0).run(small, Progress())
    print(made.summary(), flush=True)
    return made.subject


@torch.no_grad()
def forward(suffix: Suffix) -> float:
    """CPU seconds of the dense model on all windows, logits included."""
    began = time.process_time()
    for batch in suffix.walk.batches():
        suffix.on.task.output(suffix.on.model, batch)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--subject", default="smollm2")
    parser.add_argument("--change", choices=("w4", "wanda"), default="w4")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--disk", type=float, default=2048.0)
    parser.add_argument("--parts", choices=("blocks", "modules"), default="modules")
    parser.add_argument("--roles", default="", help="CSV that gets a row a kind of module")
    space = parser.parse_args()
    torch.set_num_threads(1)
    on = workbench.subject(space.subject)
    dense, other = beside(on, changed(on, space.change, space.windows))
    fields = dict(changed=space.change, test_examples=space.windows, disk=space.disk, parts=space.parts)
    asked, progress = Attribution(noise=False, **fields), Progress()
    key = "bench-attribution-" + "-".join(str(value) for value in vars(space).values())
    with journal(key, {"instrument": "bench"}, progress) as kept:
        finished = FinishedParts("attribution")
        began = time.process_time()
        levels = ("block", "module") if space.parts == "modules" else ("block",)
        parts = [part for part in parts_of(dense, other) if part.level in levels]
        run = Run(asked, dense, other, parts, finished, progress)
        start = time.process_time() - began
        passes = [forward(run.suffix)]
        run.controls()
        run.predict()
        print(f"dense answers {start:.1f} s, forward {passes[0]:.2f} s, {run.facts}", flush=True)
        for level in levels:
            mine = [part for part in parts if part.level == level]
            began = time.process_time()
            spent = 0.0
            for count, part in enumerate(run.through(mine), 1):
                run.found[part] |= run.measured(part) or {}
                if count % 30 == 0:
                    now = time.process_time()
                    passes.append(forward(run.suffix))
                    spent += time.process_time() - now
                    print(f"{count} of {len(mine)} {level}s", flush=True)
            seconds = time.process_time() - began - spent + start
            one = sum(passes) / len(passes)
            print(
                f"{len(mine)} {level}s: {seconds:.1f} s CPU, forward pass {min(passes):.2f} to "
                f"{max(passes):.2f} s, mean {one:.2f} s: {seconds / (len(mine) * one):.3f} of as many passes",
                flush=True,
            )
            run.repair(level)
        run.asked = Attribution(noise=True, **fields)
        blocks = [part for part in parts if part.level == "block"]
        for part in run.through(blocks):
            run.found[part] |= run.measured(part) or {}
        finished.close()
        result = run.result()
        kept.clear()
    for name, value in result.facts.items():
        print(f"{name}: {value}")
    for table in result.tables.values():
        print(table.to_string())
    if space.roles:
        rows = by_role(result.table).assign(subject=space.subject, change=space.change)
        rows.to_csv(
            space.roles, mode="a", header=not Path(space.roles).exists(), index=False, float_format="%.4g"
        )
    print(result.table.sort_values("kl", ascending=False).groupby("level").head(6).to_string())


if __name__ == "__main__":
    main()
