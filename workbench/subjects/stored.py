"""The number format that a checkpoint's weights have on disk: computing is float32, saving goes back to it
wherever no weight would be rounded. A model larger than memory is opened from float32 files in its place, and
files are written one tensor after another.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.storage.resident import cloned, disk, let_go
from workbench.storage.writing import scratch
from workbench.subjects.checkpoint_files import SIZES

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
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
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
    torch.float8_e8m0fnu: "F8_E8M0",
}


def commonest(counts: Counter[str]) -> torch.dtype:
    """The format of most numbers: counts of safetensors' names for dtypes."""
    known = Counter({name: count for name, count in counts.items() if name in FLOATS})
    return FLOATS[known.most_common(1)[0][0]] if known else torch.float32


def stored_dtype(model: nn.Module) -> torch.dtype:
    """The format a model was opened from; float32 for one that was made here."""
    found = getattr(model, "stored_dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def held_dtype(model: nn.Module) -> torch.dtype:
    """The format that most of a model's numbers have in memory."""
    counts = Counter[str]()
    for parameter in model.parameters():
        counts[NAMES.get(parameter.dtype, "")] += parameter.numel()
    return commonest(counts)


def dense_size(model: nn.Module) -> int:
    """Bytes of one weight of the checkpoint a model was opened from, 4 at most, which is what it is opened
    to; of one in memory where the model was made here.
    """
    if isinstance(getattr(model, "stored_dtype", None), torch.dtype):
        return min(4, stored_dtype(model).itemsize)
    return held_dtype(model).itemsize


def survives(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether every number of the weight is one of the narrower format."""
    return torch.equal(weight.to(dtype).to(weight.dtype), weight)


def bytes_of_weights(model: nn.Module, weights: Iterable[Tensor]) -> int:
    """Bytes that one of these weights takes in a saved checkpoint."""
    dtype = stored_dtype(model)
    if dtype.itemsize < 4 and all(survives(weight.detach(), dtype) for weight in weights):
        return dtype.itemsize
    return held_dtype(model).itemsize


def saved_size(model: nn.Module) -> int:
    """Bytes of a model's parameters, in the formats they are saved in, and buffers; tied weights once."""
    tensors = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(
        t.numel() * (bytes_of_weights(model, [t]) if t.dtype == torch.float32 else t.element_size())
        for t in tensors.values()
    )


@torch.no_grad()
def narrow(model: nn.Module) -> bool:
    """Put the parameters that would not be rounded into the format the model was opened from, in place;
    True when some had to stay as they are.
    """
    dtype = stored_dtype(model)
    if dtype.itemsize >= 4:
        return False
    left = False
    for parameter in model.parameters():
        if parameter.dtype == torch.float32 and survives(parameter, dtype):
            narrow = parameter.data.to(dtype)
            parameter.data = narrow if disk() is None else cloned(narrow)
        elif parameter.is_floating_point():
            left = True
    return left


def declare_wide(folder: Path) -> None:
    """Say float32 in a saved config, so that others read every tensor without rounding it."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["dtype"] = "float32"
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


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
                raw: Any = value.contiguous().view(-1).view(torch.uint8).numpy()
                output.write(memoryview(raw))
            let_go([value])
