"""A saved subject, opened again in a fresh process and its loss compared: what was written is what was meant.

check_saved(subject, folder)    "opened again in a fresh process: loss 1.234, as here"
check_exported(subject, file, "onnx", given)    the same of a file for other programs
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from workbench.errors import BadInput
from workbench.storage.together import PARENT
from workbench.storage.writing import scratch

#: Examples whose loss is compared.
EXAMPLES = 8
#: Relative difference that rounding may make, by the narrowest float among the weights.
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4}
COARSE = 3e-2
#: Seconds a fresh process may take before its answer is not waited for.
PATIENCE = 600


def check_saved(subject: Any, folder: Path) -> str:
    """What the comparison found, or why there was none, as a clause. `BadInput` when the folder does not open
    or has another loss.
    """
    if not subject.has_file:
        return "not opened again: the code of a plain module is not in the folder"
    split = list(subject.splits)[-1]
    here = probe_loss(subject, split)
    code, answer, said = fresh(
        ["-m", "workbench.storage.reopened", "saved", str(folder), split, str(torch.get_num_threads())]
    )
    if code:
        raise BadInput(f"subject: what was saved does not open in a fresh process: {said}; nothing was kept")
    there = float(answer["loss"])
    if not alike(here, there, tolerance(subject.model)):
        raise BadInput(
            f"subject: what was saved has the loss {there:.6g} in a fresh process, {here:.6g} here; "
            "nothing was kept"
        )
    return f"opened again in a fresh process: loss {there:.5g}, as here"


def check_exported(subject: Any, place: Path, kind: str, given: Mapping[str, torch.Tensor]) -> str:
    """The same of an export: its outputs in a fresh process, and the loss that they give here.

    kind : "checkpoint", a folder that `transformers` opens, "onnx", a file that ONNX Runtime runs, or "gguf",
        a file whose loss is computed where it is opened
    given : the columns or inputs of the first examples of the last split, as `probe` draws them
    """
    if kind == "onnx" and importlib.util.find_spec("onnxruntime") is None:
        return "not opened again: onnxruntime is not installed"
    here = probe_loss(subject, list(subject.splits)[-1])
    with scratch() as folder:
        asked, answered = folder / "given", folder / "found"
        save_file({name: column.contiguous().clone() for name, column in given.items()}, asked)
        arguments = [kind, str(place), subject.task.name, str(asked), str(answered)]
        code, told, said = fresh(
            ["-m", "workbench.storage.reopened", *arguments, str(torch.get_num_threads())]
        )
        if code:
            raise BadInput(f"subject: what was exported does not open in a fresh process: {said}")
        output = None if "loss" in told else load_file(answered)["output"]
    there = float(told["loss"] if output is None else subject.task.criterion(output, probe(subject)))
    if not alike(here, there, tolerance(subject.model)):
        raise BadInput(
            f"subject: what was exported has the loss {there:.6g} in a fresh process, {here:.6g} here; "
            "nothing was kept"
        )
    return f"opened again in a fresh process: loss {there:.5g}, as here"


def probe(subject: Any) -> dict[str, torch.Tensor]:
    """The examples whose loss is compared, in the main memory."""
    batch = next(subject.batches(list(subject.splits)[-1], EXAMPLES, EXAMPLES))
    return {name: column.cpu() for name, column in batch.items()}


def fresh(arguments: list[str]) -> tuple[int, dict[str, Any], str]:
    """(exit code, what its last line says as JSON, last line of its errors) of a new interpreter that has
    this package, no network, and nothing of the working directory.
    """
    package = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH", "")) if p)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WORKBENCH_HEADLESS": "1"}
    offline[PARENT] = str(os.getpid())
    try:
        done = subprocess.run(
            [sys.executable, "-P", *arguments],
            env={**os.environ, **offline, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return 1, {}, f"it took longer than {PATIENCE} s"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        return done.returncode, answer, lines[-1] if lines else ""
    except (ValueError, IndexError):
        return done.returncode or 1, {}, lines[-1] if lines else f"exit code {done.returncode}"


def probe_loss(subject: Any, split: str) -> float:
    """Mean loss of the first examples of a split, the model as it is evaluated."""
    training = subject.model.training
    subject.model.eval()
    try:
        with torch.no_grad():
            return float(subject.loss(next(subject.batches(split, EXAMPLES, EXAMPLES))))
    finally:
        subject.model.train(training)


def tolerance(model: torch.nn.Module) -> float:
    on_processor = all(p.device.type == "cpu" for p in model.parameters())
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return (
        max((CLOSE.get(kind, COARSE) for kind in kinds), default=CLOSE[torch.float32])
        if (on_processor)
        else COARSE
    )


def alike(here: float, there: float, relative: float) -> bool:
    if not (math.isfinite(here) and math.isfinite(there)):
        return str(here) == str(there)
    return abs(here - there) <= relative * max(1.0, abs(here))
