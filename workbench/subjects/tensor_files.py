"""Safetensors files written one tensor after another, and a checkpoint of narrow numbers as one of float32:
computing is float32, and a model that is opened from such files lies in them instead of in memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.storage.resident import disk, let_go
from workbench.storage.writing import scratch
from workbench.subjects.checkpoint_files import SIZES

NARROW = ("F16", "BF16")
#: What safetensors calls torch's types.
NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}


@contextlib.contextmanager
def in_float32(source: str | Path, is_plain: bool) -> Iterator[str | Path]:
    """A folder with the same checkpoint in float32 while a run is to hold little and the checkpoint is
    narrower; else the checkpoint itself. Whoever has mapped the files keeps them when the folder goes.
    """
    place = disk()
    files = sorted(Path(source).glob("model*.safetensors")) if place is not None and is_plain else []
    headers = {file: header_of(file) for file in files}
    narrow = any(entry["dtype"] in NARROW for header in headers.values() for entry in header.values())
    if place is None or not narrow:
        yield source
        return
    with scratch(place.folder) as folder:
        for file in Path(source).iterdir():
            if file.is_file() and file not in headers and file.suffix in (".json", ".txt", ".model"):
                shutil.copyfile(file, folder / file.name)
        for file, header in headers.items():
            widen(file, header, folder / file.name)
        yield folder


def header_of(file: Path) -> dict[str, Any]:
    """Tensor -> dtype, shape and place, as a safetensors file's header has it."""
    with file.open("rb") as content:
        (length,) = struct.unpack("<Q", content.read(8))
        found: dict[str, Any] = json.loads(content.read(length))
    found.pop("__metadata__", None)
    return found


def widen(source: Path, header: dict[str, Any], target: Path) -> None:
    """Write a safetensors file whose narrow tensors are float32; one tensor is held at a time."""
    from safetensors import safe_open

    types = {name: "F32" if entry["dtype"] in NARROW else entry["dtype"] for name, entry in header.items()}
    with safe_open(str(source), "pt") as tensors:

        def value_of(name: str) -> Any:
            value = tensors.get_tensor(name)
            return value.float() if header[name]["dtype"] in NARROW else value

        shapes = {name: entry["shape"] for name, entry in header.items()}
        write(target, {name: (types[name], shapes[name]) for name in header}, value_of)


def write_tensors(target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file of tensors that may lie in files; one is held at a time."""

    def value_of(name: str) -> Tensor:
        return tensors[name].detach().cpu()

    write(target, {name: (NAMES[v.dtype], list(v.shape)) for name, v in tensors.items()}, value_of)


def write(target: Path, told: Mapping[str, tuple[str, list[int]]], value_of: Callable[[str], Tensor]) -> None:
    """A safetensors file of tensors (type, shape) whose values are asked for one after another."""
    made: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in told.items():
        begin, end = end, end + math.prod(shape) * SIZES[dtype]
        made[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(made).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as output:
        output.write(struct.pack("<Q", len(text)) + text)
        for name in told:
            value = value_of(name)
            if value.numel():
                output.write(memoryview(value.contiguous().view(-1).view(torch.uint8).numpy()))
            let_go([value])
