"""Subjects as GGUF files, for llama.cpp and whatever reads its format.

Values are carried over exactly: the grid of each quantized layer becomes ggml's blocks, everything else is
written in the narrowest type that holds it. What ggml cannot express is refused by name before anything is
written; tensors are written one after another, so that one of them is held at a time.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench.errors import BadInput, notice
from workbench.quantization.gguf_blocks import (
    BLOCK,
    PLAIN,
    PRUNED,
    TYPES,
    bytes_of_row,
    encoded,
    narrowest,
    plain,
    rows_of,
    type_of,
)
from workbench.quantization.gguf_header import (
    Target,
    add_metadata,
    check_header,
    context_of,
    parameters,
    row_order,
    target_of,
    tensor_names,
)
from workbench.quantization.gguf_tokenizer import (
    add_tokenizer,
    check_tokenizer,
    knows_words,
    tokenizer_fields,
)
from workbench.quantization.number.fake_quant import FakeQuant
from workbench.quantization.number.grid import Grid
from workbench.quantization.number.split_grid import SplitGrid
from workbench.storage import replacing
from workbench.storage.forecast import free_bytes, in_words
from workbench.storage.reopening import check_exported, probe
from workbench.storage.resident import let_go
from workbench.storage.writing import scratch
from workbench.subjects import Subject
from workbench.subjects.changes import Change, Mask, changes_of, original_of
from workbench.subjects.stored import stored_dtype

ACCEPTED = ", ".join((*TYPES, *PLAIN))
#: ggml's type -> `general.file_type`, by the type of most weights.
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "BF16": 32,
    "MXFP4": 38,
}
#: Steps of its grid by which a number may come out otherwise, for scales and minima are rounded.
FARTHEST = 0.125


@dataclass(frozen=True)
class Part:
    """A tensor to be written: its llama.cpp name and type, and where its values are."""

    name: str
    kind: str
    shape: tuple[int, ...]
    module: nn.Module
    tensor: str
    transposed: bool
    grid: Grid | None
    order: Tensor | None

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], bytes_of_row(self.kind, self.shape[-1]))


def to_gguf(
    subject: Subject,
    file: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    reopen: bool = True,
    told: Callable[[str], Any] | None = None,
) -> Path:
    """Write a GGUF file: int4, int5, int8 and their unsigned ones in groups of a multiple of 32 inputs (or
    channels, tensors) and mxfp4 as ggml's blocks, other weights as F16, BF16, F32 or Q8_0, whichever holds
    them exactly; with configuration and tokenizer.

    `BadInput` for anything else, by layer. A file that no export wrote is refused unless `overwrite`. Before
    it takes its place it is opened in a fresh process and its loss compared, unless `reopen` is False or that
    process, which holds the whole model in float32, has no room for it; `told` is then called with what came
    of it. Needs the package `gguf` (extra `gguf`).
    """
    if Path(file).suffix.lower() != ".gguf":
        raise BadInput(f"file: {str(file)!r} does not end in .gguf, by which such a file is known")
    model: Any = subject.model
    target, fields = check_subject(subject)
    found = list(parts(subject, target))
    if fields is None:
        notice("gguf: the subject has no tokenizer, so the file has none; llama.cpp needs one")
    length = context_of(model.config)
    with replacing(file, overwrite=overwrite, field="file") as draft:
        with scratch() as folder:
            write(folder / "settings.gguf", subject, target, length, None, [])
            check_header(folder / "settings.gguf", model.config)
            if fields is not None:
                write(folder / "words.gguf", subject, target, length, fields, [])
                check_tokenizer(subject.tokenizer, folder / "words.gguf", own_texts(subject))
        gap = write(draft, subject, target, length, fields, found)
        if gap:
            notice(
                "gguf: scales and minima are stored as 16-bit floats, which rounds some: a weight is off by "
                f"at most {gap:.1e} of a step of its grid"
            )
        if reopen:
            compared = reopened(subject, draft, sum(math.prod(part.shape) for part in found))
            if told is not None:
                told(compared)
            elif compared.startswith("not opened"):
                notice(f"gguf: {compared}")
    return Path(file)


def reopened(subject: Subject, file: Path, numbers: int) -> str:
    """What the comparison in a fresh process found, or why there was none: who reads a file has every number
    in float32 twice for a moment.
    """
    needed, free = 8 * numbers, free_bytes()
    if free is not None and needed > free:
        return f"not opened again: that takes {in_words(needed)}, {in_words(free)} are free"
    return check_exported(subject, file, "gguf", probe(subject))


def check_subject(subject: Subject) -> tuple[Target, dict[str, Any] | None]:
    """The architecture and the tokenizer's fields, None without one; `BadInput` for a subject that has no
    place in a GGUF file whatever its weights are.
    """
    from workbench.subjects.structure.removal import record_of

    if importlib.util.find_spec("gguf") is None:
        raise BadInput("gguf: needs the package gguf, which writes it; pip install gguf")
    model: Any = subject.model
    if named := getattr(model, "without_file", ""):
        raise BadInput(f"gguf: a model changed by {named} has no file format")
    if record_of(model):
        raise BadInput(
            "gguf: the model lost heads or neurons, which the file has no place for; save the subject, which "
            "fills them with zeros, and export what transformers opens"
        )
    target = target_of(model)
    if not knows_words(subject.tokenizer):
        return target, None
    return target, tokenizer_fields(subject.tokenizer, model.config.vocab_size)


def parts(subject: Subject, target: Target) -> Iterator[Part]:
    """What is written, in the order of the model; `BadInput` for what has no place."""
    model: Any = subject.model
    turned = {(id(layer.module), layer.tensor): layer.transposed for layer in subject.layers("*")}
    held = list(parameters(model))
    names = tensor_names(target, model.config.num_hidden_layers, (name for name, _, _ in held))
    for name, module, tensor in held:
        changes = changes_of(module, tensor)
        layer = name.removesuffix(".weight")
        transposed = turned.get((id(module), tensor), False)
        shape = tuple(original_of(module, tensor).shape)
        shape = shape[::-1] if transposed else shape
        grid = grid_of(layer, changes, shape)
        order = row_order(target, names[name], model.config)
        if grid is None:
            kind = narrowest(value_of(module, tensor, transposed), plain_type(model, changes))
            let_go([original_of(module, tensor)])
        else:
            kind = type_of(grid, any(isinstance(change, Mask) for change in changes))
        yield Part(names[name], kind, shape, module, tensor, transposed, grid, order)


def plain_type(model: nn.Module, changes: Sequence[Change]) -> str:
    """The 16-bit type that a weight without a scale is asked to have, or had in its checkpoint."""
    formats = [c.grid.format.name for c in changes if isinstance(c, FakeQuant)]
    if formats:
        return PLAIN[formats[-1]]
    return "BF16" if stored_dtype(model) == torch.bfloat16 else "F16"


def value_of(module: nn.Module, tensor: str, transposed: bool) -> Tensor:
    """A weight as it is in effect, (out, in) or (width,)."""
    value: Tensor = getattr(module, tensor).detach()
    return (value.mT if transposed else value).cpu()


def grid_of(layer: str, changes: Sequence[Change], shape: tuple[int, ...]) -> Grid | None:
    """The grid that a weight is on, in the main memory; None when it is on none that matters to ggml."""
    found: Grid | None = None
    for change in changes:
        if type(change).attached is not Change.attached:
            refuse(layer, f"is computed in another way ({type(change).__name__})")
        if isinstance(change, FakeQuant):
            found = change.grid
        elif found is not None and not isinstance(change, Mask):
            refuse(layer, f"has a term beside its grid ({type(change).__name__})")
    if found is None:
        return None
    if isinstance(found, SplitGrid):
        refuse(layer, "keeps salient weights on a grid of their own")
    if found.transform is not None:
        refuse(layer, "is rounded in the coordinates of an online transform")
    if found.format.name in PLAIN:
        return None
    if found.format.name not in TYPES:
        refuse(layer, f"has the format {found.format.name}")
    if len(shape) != 2:
        refuse(layer, "is a stack of matrices")
    if shape[-1] % BLOCK:
        refuse(layer, f"has {shape[-1]} inputs, no multiple of ggml's blocks of {BLOCK}")
    if found.scale.shape[-1] > 1 and found.group % BLOCK:
        refuse(layer, f"has groups of {found.group}, no multiple of ggml's blocks of {BLOCK}")
    masked = any(isinstance(change, Mask) for change in changes)
    if found.zero is not None:
        if found.format.name not in PRUNED:
            refuse(layer, f"has zero points with {found.format.name}")
        if masked and not bool((found.zero == found.zero.round()).all()):
            refuse(layer, "is pruned and has zero points that are no integers, so that no code is zero")
    return in_main_memory(found)


def in_main_memory(grid: Grid) -> Grid:
    zero = None if grid.zero is None else grid.zero.cpu()
    return Grid(grid.format, grid.scale.cpu(), zero, grid.group)


def refuse(layer: str, reason: str) -> None:
    raise BadInput(
        f"gguf: {layer} {reason}, which ggml cannot express; accepted are {ACCEPTED} with groups of a "
        f"multiple of {BLOCK} inputs, channels or tensors"
    )


def write(
    file: Path,
    subject: Subject,
    target: Target,
    length: int,
    fields: dict[str, Any] | None,
    found: list[Part],
) -> float:
    """Write a file of these tensors, and return by how many steps of its grid a weight is off at most."""
    from gguf import GGMLQuantizationType, GGUFWriter

    model: Any = subject.model
    writer = GGUFWriter(str(file), target.name)
    add_metadata(writer, model.config, subject.name, FILE_TYPES[commonest(found)], length)
    if fields is not None:
        add_tokenizer(writer, fields)
    bytewise: Any = np.dtype(np.uint8)
    for part in found:
        shape = part.bytes_shape
        kind = GGMLQuantizationType[part.kind]
        writer.add_tensor_info(part.name, shape, bytewise, math.prod(shape), raw_dtype=kind)
    gap = 0.0
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in found:
            rows, off = rows_and_gap(part)
            writer.write_tensor_data(rows)
            gap = max(gap, off)
    finally:
        writer.close()
    return gap


@torch.no_grad()
def rows_and_gap(part: Part) -> tuple[np.ndarray, float]:
    """A tensor's bytes, and by how many steps of its grid a number of them is off at most."""
    value = value_of(part.module, part.tensor, part.transposed)
    if part.order is not None:
        value = value[part.order]
    if part.grid is None:
        rows, gap = plain(value, part.kind), 0.0
    else:
        grid = part.grid if part.order is None else rows_of(part.grid, part.order)
        stored = encoded(value, grid, part.kind)
        rows, gap = stored.rows, stored.gap
        if not gap <= FARTHEST:
            raise BadInput(
                f"gguf: {part.name} has scales beyond 16-bit floats: weights come out up to {gap:.1e} steps "
                "of its grid away; quantize it again"
            )
    let_go([original_of(part.module, part.tensor), *buffers(part)])
    return np.ascontiguousarray(rows), gap


def buffers(part: Part) -> Iterator[Tensor]:
    for change in changes_of(part.module, part.tensor):
        yield from change.buffers()


def commonest(found: Sequence[Part]) -> str:
    """The type of most weights."""
    counts: Counter[str] = Counter()
    for part in found:
        counts[part.kind] += math.prod(part.shape)
    return counts.most_common(1)[0][0] if counts else "F32"


def own_texts(subject: Subject) -> list[str]:
    """Some of the subject's own examples as texts."""
    for columns in subject.splits.values():
        if "input_ids" in columns:
            rows = columns["input_ids"][:4].tolist()
            return [subject.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    return []
