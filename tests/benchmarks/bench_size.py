"""What runs hold and take on a real language model, run by hand:
`python tests/benchmarks/bench_size.py [NAME ...]`.

Each row is a process of its own: peak resident memory (mapped files included) less what the process holds
after its imports, as a multiple of the checkpoint's bytes; CPU seconds on one thread. Losses before and
after, and predictions, are left out where the instrument can leave them out (`prune` measures TEST windows).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

WINDOWS = 128
TEST = 8
GPTQ = {"rounding": "gptq", "format": "int4", "test_examples": 0}
RUNS: dict[str, tuple[str, dict[str, object]]] = {
    "GPTQ, 4 bits": ("quantize", GPTQ),
    "Wanda, 50 %": ("prune", {"method": "wanda"}),
    "SparseGPT, 50 %": ("prune", {"method": "sparsegpt"}),
}


def resident(what: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (at most so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what + ":"))


def measure(subject: str, windows: int, instrument: str, fields: dict[str, object]) -> dict[str, float]:
    """Peak above the imports and CPU seconds of one run, in this process."""
    import torch
    import transformers  # noqa: F401

    import workbench
    import workbench.quantization
    from workbench.progress import Progress

    torch.set_num_threads(1)
    made = workbench.catalog()[instrument](predict_examples=0, calibration_examples=windows, **fields)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    on = workbench.subject(subject)
    on = on.with_split("test", {name: column[:TEST] for name, column in on.split("test").items()})
    size = sum(p.numel() * p.element_size() for p in on.model.parameters())
    began, wall = time.process_time(), time.perf_counter()
    made.run(on, Progress(), cache=False)
    return {
        "checkpoint": size,
        "peak": resident("VmHWM") - before,
        "cpu": time.process_time() - began,
        "wall": time.perf_counter() - wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"rows: {', '.join(RUNS)}")
    parser.add_argument("--subject", default="smollm2")
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.subject, asked.windows, *RUNS[asked.one])))
        return
    print("| run | peak, GB | x checkpoint | CPU s | wall s |\n|---|---|---|---|---|")
    for name in asked.names or RUNS:
        command = [sys.executable, __file__, "--one", name]
        command += ["--subject", asked.subject, "--windows", str(asked.windows)]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        peak, share = found["peak"] / 1e9, found["peak"] / found["checkpoint"]
        print(f"| {name} | {peak:.2f} | {share:.2f} | {found['cpu']:.0f} | {found['wall']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
