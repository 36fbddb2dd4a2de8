"""What runs hold and take on a real language model, run by hand:
`python tests/benchmarks/bench_size.py [CASE ...] [--subject smollm2] [--windows 128] [--phases]`.

Each row is a process of its own: peak resident memory (mapped files included) less what the process holds
after its imports, as a multiple of the checkpoint's bytes; CPU seconds on one thread. Losses before and
after, and predictions, are left out where the instrument can leave them out (`prune` measures `--test`
windows). With `--phases` also what was held at most in every phase, by the label that the progress shows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workbench.progress import Progress

GPTQ = {"rounding": "gptq", "format": "int4", "test_examples": 0}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "gptq": ("quantize", GPTQ),
    "nearest": ("quantize", GPTQ | {"rounding": "nearest"}),
    "wanda": ("prune", {"method": "wanda"}),
    "sparsegpt": ("prune", {"method": "sparsegpt"}),
}
USUAL = ("gptq", "wanda", "sparsegpt")


def status() -> dict[str, int]:
    """Bytes of this process's memory by the kernel's names: VmRSS, VmHWM, RssAnon, RssFile."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {parts[0][:-1]: int(parts[1]) << 10 for parts in lines if parts[-1] == "kB"}


class Phases(Progress):
    """The peak of every phase: what is held at most from one label to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.label, self.found, self.peak = "open", dict[str, tuple[int, int, int]](), 0
        self.restart()

    def restart(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def show(self, label: str, done: int, total: int | None) -> None:
        if label != self.label:
            self.close(label)

    def close(self, label: str = "") -> None:
        now = status()
        self.peak = max(self.peak, now["VmHWM"])
        before = self.found.get(self.label, (0, 0, 0))
        known = (now["VmHWM"], now["RssAnon"], now["RssFile"])
        self.found[self.label] = max(before, known)
        self.label = label
        self.restart()


def repeated(on: Any, split: str, count: int) -> Iterator[tuple[str, Any]]:
    """The columns of a split, again and again until there are so many examples."""
    for name, column in on.split(split).items():
        yield name, column.repeat(-(-count // len(column)), *[1] * (column.ndim - 1))


def measure(asked: argparse.Namespace, instrument: str, fields: dict[str, object]) -> Any:
    """Peak above the imports and CPU seconds of one run, in this process."""
    import torch
    import transformers  # noqa: F401

    import workbench
    import workbench.quantization

    torch.set_num_threads(1)
    made = workbench.catalog()[instrument](predict_examples=0, calibration_examples=asked.windows, **fields)
    before = status()["VmRSS"]
    phases = Phases()
    drawn = {"data": "random", "max_length": asked.length} if Path(asked.subject).is_dir() else {}
    on = workbench.subject(asked.subject, memory=asked.memory, **drawn)
    for split, count in (("calibration", asked.windows), ("test", asked.test)):
        on = on.with_split(split, {name: column[:count] for name, column in repeated(on, split, count)})
    size = sum(p.numel() * p.element_size() for p in on.model.parameters())
    phases.close("begin")
    began, wall = time.process_time(), time.perf_counter()
    result = made.run(on, phases, cache=False, memory=asked.memory)
    phases.close("end")
    return {
        "checkpoint": size,
        "peak": phases.peak - before,
        "cpu": time.process_time() - began,
        "wall": time.perf_counter() - wall,
        "phases": {label: [peak - before, *rest] for label, (peak, *rest) in phases.found.items()},
        "held": status()["VmRSS"] - before,
        "facts": result.facts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"any of {', '.join(CASES)}")
    parser.add_argument("--subject", default="smollm2")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows")
    parser.add_argument("--test", type=int, default=8, help="test windows, where an instrument measures any")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window of drawn data")
    parser.add_argument("--memory", help="what a run may hold; below the model's size it works in files")
    parser.add_argument("--phases", action="store_true", help="also the peak of every phase")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked, *CASES[asked.one]), default=str))
        return
    print("| run | peak, GB | x checkpoint | CPU s | wall s |\n|---|---|---|---|---|")
    for case in asked.cases or USUAL:
        command = [sys.executable, __file__, "--one", case, "--subject", asked.subject]
        command += ["--windows", str(asked.windows), "--test", str(asked.test)]
        command += ["--length", str(asked.length)]
        command += [] if asked.memory is None else ["--memory", asked.memory]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE, text=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        peak, share = found["peak"] / 1e9, found["peak"] / found["checkpoint"]
        print(f"| {case} | {peak:.2f} | {share:.2f} | {found['cpu']:.0f} | {found['wall']:.0f} |", flush=True)
        for label, (most, anonymous, mapped) in found["phases"].items() if asked.phases else ():
            print(
                f"  {label}: {most / found['checkpoint']:.2f} at most above the imports; at its end "
                f"{anonymous / 1e6:.0f} MB of the process's own and {mapped / 1e6:.0f} MB of files"
            )
        if asked.phases:
            print(f"  held at the end: {found['held'] / found['checkpoint']:.2f}; {found['facts']}")


if __name__ == "__main__":
    main()
