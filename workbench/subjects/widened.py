"""A checkpoint of narrow numbers as one of float32 in files: computing is float32, and a model that is opened
from such files lies in them instead of in memory.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workbench.storage.resident import disk
from workbench.storage.writing import scratch
from workbench.subjects.checkpoint_files import SIZES

NARROW = ("F16", "BF16")


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

    made: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in header.items():
        dtype = "F32" if entry["dtype"] in NARROW else entry["dtype"]
        begin, stop = entry["data_offsets"]
        size = (stop - begin) * SIZES[dtype] // SIZES[entry["dtype"]]
        made[name] = {"dtype": dtype, "shape": entry["shape"], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(made).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as output, safe_open(str(source), "pt") as tensors:
        output.write(struct.pack("<Q", len(text)) + text)
        for name, entry in header.items():
            value = tensors.get_tensor(name)
            output.write(bytes_of(value.float() if entry["dtype"] in NARROW else value))


def bytes_of(value: Any) -> memoryview:
    import torch

    return memoryview(value.contiguous().view(-1).view(torch.uint8).numpy())
