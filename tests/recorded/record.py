"""Runs of instruments and what came of them, kept in `runs.json` so that a change of the code can be shown to
change no result.

    python -m tests.recorded.record            # fills entries that have nothing recorded yet
    python -m tests.recorded.record NAME ...   # records these again

`keys.md` says what an entry holds. A new entry is written into `runs.json` by hand,
without the recorded keys.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pandas as pd
import torch

import workbench
from tests.conftest import ARCHITECTURES, new_cache, tiny
from workbench.progress import Progress

RUNS = Path(__file__).with_name("runs.json")
ASKED = ("name", "instrument", "subject", "after", "fields", "quick", "timed")
RECORDED = ("machine", "start", "facts", "tables", "layers", "parameters")
#: Facts that results have had since the recording, which change none of those that they had.
SINCE = re.compile(r"(kl|distance)(_low|_high)?|units(_left)?")
#: Tables that results have had since then.
TABLES_SINCE = {"calibration"}
TIMING = re.compile(r"second|latency|speedup|duration|milliseconds")


def read() -> dict[str, dict[str, Any]]:
    """Entries by name."""
    return {entry["name"]: entry for entry in json.loads(RUNS.read_text())}


def write(entries: Mapping[str, dict[str, Any]]) -> None:
    """One key of an entry a line, so that a changed number is one changed line."""
    blocks = []
    for entry in entries.values():
        known = {key: entry[key] for key in (*ASKED, *RECORDED) if key in entry}
        lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in known.items()]
        blocks.append(" {\n" + ",\n".join(lines) + "\n }")
    RUNS.write_text("[\n" + ",\n".join(blocks) + "\n]\n")


def machine() -> str:
    """What decides the last digits of a float: torch, the processor's instructions, the number of threads,
    and which kernels are chosen for this processor among those, told by what they give.
    """
    return (
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} thread, digits {digits()}"
    )


@functools.cache
def digits() -> str:
    """A digest of a few steps of a small network: processors of one instruction set round differently."""
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    x, first, second = draw(48, 96), draw(96, 160).requires_grad_(), draw(160, 10).requires_grad_()
    for _ in range(8):
        hidden = torch.nn.functional.gelu(torch.nn.functional.layer_norm(x @ first, (160,)))
        loss = (hidden @ second).log_softmax(-1)[:, 0].mean()
        slopes = torch.autograd.grad(loss, [first, second])
        with torch.no_grad():
            for weight, slope in zip((first, second), slopes, strict=True):
                weight += 0.1 * slope
    values = torch.cat([first.detach().flatten(), second.detach().flatten()])
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:8]


def open_subject(name: str, checkpoints: Mapping[str, Path]) -> workbench.Subject:
    """A built-in, or one of `tests.conftest.tiny` with random data; nothing remembered from another run."""
    if name in ARCHITECTURES:
        return workbench.subject(checkpoints[name], data="random")
    return workbench.subject(name)


def run(entry: dict[str, Any], checkpoints: Mapping[str, Path]) -> tuple[workbench.Subject, Any]:
    """(subject, result) of an entry, computed; `after` is computed first, on the same subject."""
    if before := entry.get("after"):
        on = run(read()[before], checkpoints)[1].subject
    else:
        on = open_subject(entry["subject"], checkpoints)
    torch.manual_seed(0)
    made = workbench.catalog()[entry["instrument"]](**entry["fields"])
    return on, made.run(on, Progress(), cache=False)


def recorded(entry: dict[str, Any], checkpoints: Mapping[str, Path]) -> dict[str, Any]:
    """Everything that is compared. Timings are left out by their names;
    of a `timed` run only names, numbers of rows and strings stay.
    """
    on, result = run(entry, checkpoints)
    known = entry.get("facts", {})
    found: dict[str, Any] = {
        "machine": machine(),
        "start": whole(on.model),
        "facts": {
            key: plain(value)
            for key, value in result.facts.items()
            if not TIMING.search(key) and (key in known or not SINCE.fullmatch(key))
        },
        "tables": {
            name: summed(table)
            for name, table in {"": result.table, **result.tables}.items()
            if name not in TABLES_SINCE
        },
    }
    if entry.get("timed"):
        return found | {
            "facts": {key: value if isinstance(value, str) else "" for key, value in found["facts"].items()},
            "tables": {name: dict.fromkeys(sums, 0.0) for name, sums in found["tables"].items()},
        }
    if result.subject is not None:
        found["layers"] = {layer.name: described(layer.weight) for layer in result.subject.layers("*")}
        found["parameters"] = whole(result.subject.model)
    return found


def plain(value: Any) -> Any:
    """JSON: numpy's numbers as Python's, numbers that are not finite as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    if isinstance(value, (np.generic, torch.Tensor)):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def summed(table: pd.DataFrame) -> dict[str, Any]:
    """Number of rows, and the sum of every column of numbers; what is not finite is left out of a sum."""
    sums: dict[str, Any] = {"rows": len(table)}
    for name in table.columns:
        column = table[name]
        if pd.api.types.is_numeric_dtype(column) and not TIMING.search(str(name)):
            values = column.to_numpy(dtype=np.float64, na_value=np.nan)
            sums[str(name)] = float(values[np.isfinite(values)].sum())
    return sums


def described(weight: torch.Tensor) -> list[Any]:
    """[sha256 of the packed nonzero pattern (16 digits), norm, projection on cos(0), cos(1), ...]
    of an effective weight (..., out, in).
    """
    values = weight.detach().cpu().double().flatten()
    bits = np.packbits((values != 0).numpy())
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode() + bits.tobytes()).hexdigest()[:16]
    wave = torch.arange(len(values), dtype=torch.float64).cos()
    return [digest, float(values.norm()), float(values @ wave)]


def whole(model: torch.nn.Module) -> list[Any]:
    """[number, norm] over all parameters, those of changes included."""
    tensors = [p.detach().double() for p in model.parameters()]
    return [sum(t.numel() for t in tensors), math.sqrt(sum(float(t.square().sum()) for t in tensors))]


def main(named: list[str]) -> None:
    entries = read()
    if unknown := [name for name in named if name not in entries]:
        sys.exit(f"{RUNS.name} has no entry {', '.join(unknown)}")
    chosen = named or [name for name, entry in entries.items() if "facts" not in entry]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {name: Path(folder) / name for name in ARCHITECTURES}
        for name, path in checkpoints.items():
            tiny(name).save_pretrained(path)
        for name in chosen:
            cache = new_cache(Path(folder) / f"cache-{name}")
            kept, began = os.environ.get("WORKBENCH_CACHE"), time.perf_counter()
            os.environ["WORKBENCH_CACHE"] = str(cache)
            try:
                found = recorded(entries[name], checkpoints)
            finally:
                del os.environ["WORKBENCH_CACHE"]
                if kept is not None:
                    os.environ["WORKBENCH_CACHE"] = kept
            print(f"{time.perf_counter() - began:6.2f} s  {name}", flush=True)
            entries[name] = {k: v for k, v in entries[name].items() if k in ASKED} | found
            write(entries)


if __name__ == "__main__":
    main(sys.argv[1:])
