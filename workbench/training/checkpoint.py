"""Training state on disk: every tensor in one safetensors file, everything else in JSON;
never pickle, never half written.

    state.json      {"checksum": of the text of content, "content": {tensors, checksum, state, history}}
    state.safetensors or state.other.safetensors, whichever the JSON names

A new checkpoint writes its tensors beside the old one's; it counts from the moment its JSON takes the old
one's name, which is one rename. Until then the old one is whole, whatever happens.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.errors import BadInput
from workbench.results import plain
from workbench.unfinished import DamagedCheckpoint

TENSOR = "tensor:"
NOTE = "state.json"
FILES = ("state.safetensors", "state.other.safetensors")
PART = ".part"
HEAD = '{"checksum": "%s", "content": '
#: What reading a file of any content may raise.
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    SafetensorError,
    MemoryError,
)


def flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON-able copy of a nested state; tensors move to `tensors` and leave their key behind.
    Dict keys keep their type.
    """
    if isinstance(value, Tensor):
        # the order of dimensions in memory is kept: matrix products of a transposed matrix round differently
        strides = value.stride()
        order = sorted(range(value.ndim), key=lambda d: -strides[d])
        tensors[path] = value.detach().cpu().permute(order).contiguous().clone()
        return TENSOR + ",".join(map(str, order)) + TENSOR + path
    if isinstance(value, dict):
        return {"dict": [[key, flatten(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [flatten(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item"):
        return value.item()
    raise BadInput(
        f"checkpoint: {path} holds a {type(value).__name__}, which cannot be stored without pickle"
    )


def restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(value, str) and value.startswith(TENSOR):
        _, order, path = value.split(TENSOR, 2)
        inverse = {int(d): i for i, d in enumerate(order.split(","))} if order else {}
        # cloned: tensors of a mapped file are not aligned as allocated ones are,
        # and products of them may round differently
        return tensors[path].clone().permute([inverse[d] for d in range(len(inverse))])
    if isinstance(value, dict):
        ((kind, items),) = value.items()
        if kind == "dict":
            return {key: restore(item, tensors) for key, item in items}
        return (tuple if kind == "tuple" else list)(restore(item, tensors) for item in items)
    return value


def save(folder: Path, state: dict[str, Any], history: list[dict[str, float]]) -> None:
    """Write a checkpoint folder; the one it replaces stays whole until the new one is."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    described = flatten(state, "", tensors)
    name = FILES[1] if named_by(folder) == FILES[0] else FILES[0]
    save_file(tensors, folder / (name + PART))
    settled(folder / (name + PART), folder / name)
    content = {"tensors": name, "checksum": of_file(folder / name), "state": described, "history": history}
    text = json.dumps(content, default=plain)
    (folder / (NOTE + PART)).write_text(HEAD % of_text(text) + text + "}")
    settled(folder / (NOTE + PART), folder / NOTE)
    for other in FILES:
        if other != name:
            (folder / other).unlink(missing_ok=True)


def load(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Read a checkpoint folder; `DamagedCheckpoint` when it is absent, damaged or anything else."""
    folder = Path(folder)
    try:
        content = read_note(folder)
        file = folder / content["tensors"]
        if content["tensors"] not in FILES or of_file(file) != content["checksum"]:
            raise ValueError(f"{file.name} is not what was written: its checksum differs")
        return restore(content["state"], load_file(file)), content["history"]
    except UNREADABLE as error:
        raise damaged(folder, error) from None


def damaged(folder: Path, error: BaseException) -> DamagedCheckpoint:
    reason = " ".join(str(error).split())[:200] or "no reason given"
    return DamagedCheckpoint(
        f"checkpoint: {str(folder)!r} cannot be read ({type(error).__name__}: {reason}); "
        "delete it to start anew (workbench run: --fresh)"
    )


def read_note(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's JSON, once its text is what was written."""
    text = (folder / NOTE).read_text()
    empty = HEAD % ("0" * 64)
    start, content = text[: len(empty)], text[len(empty) : -1]
    if start != HEAD % of_text(content) or text[-1:] != "}":
        raise ValueError(f"{NOTE} is not what was written: its checksum differs")
    found: dict[str, Any] = json.loads(content)
    return found


def named_by(folder: Path) -> str:
    """The file of tensors that the checkpoint in a folder needs; "" when there is no readable one."""
    try:
        return str(read_note(folder)["tensors"])
    except UNREADABLE:
        return ""


def settled(part: Path, target: Path) -> None:
    """A finished file takes its name once it is on the disk, and so is the name."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    if os.name == "posix":
        place = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


def of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def of_file(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def rng_state(device: torch.device) -> dict[str, Any]:
    """The generators that dropout and stochastic rounding draw from."""
    found: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
