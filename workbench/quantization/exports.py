"""The kinds of files that a changed model is written as for other programs, and what can be said of one
before anything is computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import BadInput, unknown_name
from workbench.quantization.export import to_compressed_tensors, to_onnx
from workbench.quantization.export_gguf import check_subject, to_gguf
from workbench.quantization.gguf_blocks import BLOCK, PLAIN, TYPES
from workbench.quantization.quantize import Quantize
from workbench.subjects import Subject


@dataclass(frozen=True)
class Export:
    """ending : of the file beside a result, or of the folder's name after the result's
    formats : beginnings of the names of formats that it takes, or whole names
    """

    write: Callable[..., Path]
    ending: str
    formats: tuple[str, ...]
    whole_names: bool = False

    @property
    def folder(self) -> bool:
        return not self.ending.startswith(".")

    def takes(self, format: str) -> bool:
        return format in self.formats if self.whole_names else format.startswith(self.formats)

    def place(self, out: str | os.PathLike[str], name: str) -> Path:
        """Where it goes beside a result in the folder `out`: a file in it, or a folder next to it."""
        if self.folder:
            return Path(f"{os.fspath(out).rstrip(os.sep)}{self.ending}")
        stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
        return Path(out) / f"{stem or 'model'}{self.ending}"


EXPORTS = {
    "gguf": Export(to_gguf, ".gguf", (*TYPES, *PLAIN), whole_names=True),
    "compressed-tensors": Export(to_compressed_tensors, "-compressed-tensors", ("int", "uint", "e4m3fn")),
    "onnx": Export(to_onnx, ".onnx", ("int", "uint")),
}
#: Settings of `quantize` that leave more than numbers on a grid, and the value that does not.
NEUTRAL = {"salient": "none", "transform": "none", "activations": "none", "adapter": "none", "kv_bits": 0}


def export_called(kind: str) -> Export:
    if kind not in EXPORTS:
        raise unknown_name("export", kind, EXPORTS)
    return EXPORTS[kind]


def check_settings(kind: str, steps: Sequence[Any]) -> None:
    """`BadInput` where the settings of a run say that its model cannot be exported."""
    export, last = export_called(kind), steps[-1]
    if not type(last).changes_model:
        raise BadInput(f"export: {last.name()} changes no model, so there is none to export; leave it out")
    for step in steps:
        if not isinstance(step, Quantize):
            continue
        for field, neutral in NEUTRAL.items():
            if (value := getattr(step, field)) != neutral:
                raise BadInput(
                    f"export: {kind} has no place for {field} {value}; use {field} {neutral}, or save the "
                    "result without it"
                )
        for name in formats_of(step):
            if not export.takes(name):
                raise BadInput(
                    f"export: {kind} has no place for the format {name}; it takes "
                    f"{', '.join(export.formats)}{'' if export.whole_names else ' (any width)'}"
                )


def formats_of(step: Quantize) -> list[str]:
    """Names of the formats that a quantization will use."""
    chosen = [step.format, *(step.format.with_options(bits=width) for width in step.layer_bits.values())]
    return [choice().name for choice in chosen]


def check_on(kind: str, steps: Sequence[Any], on: Subject) -> None:
    """`BadInput` where the subject's classes and shapes say that what comes of it cannot be exported."""
    if kind != "gguf":
        if not hasattr(on.model, "save_pretrained") and kind == "compressed-tensors":
            raise BadInput(
                "export: only a transformers model can be written as a compressed-tensors checkpoint"
            )
        return
    check_subject(on)
    for step in steps:
        if isinstance(step, Quantize):
            check_groups(step, on)


def check_groups(step: Quantize, on: Subject) -> None:
    """`BadInput` for a layer whose groups ggml's blocks do not divide."""
    for layer in on.layers(step.layers):
        width, group = layer.shape[-1], step.group_for(layer)
        whole = width % BLOCK == 0 and (group == width or group % BLOCK == 0)
        if not whole and step.format_for(layer.name).name in TYPES:
            raise BadInput(
                f"export: gguf has blocks of {BLOCK} inputs, {layer.name} has {width} inputs in groups of "
                f"{group}; use a group_size that is a multiple of {BLOCK}, and leave out layers whose inputs "
                "are none"
            )
