"""Models as tensors by name, one at a time: from a checkpoint's shards, or from a model in memory."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.subjects import Subject, bake
from workbench.subjects.changes import baked
from workbench.subjects.checkpoint_files import check_folder, read_json, tensors_in
from workbench.subjects.checkpoints import unwrapped
from workbench.subjects.gguf_files import is_gguf
from workbench.subjects.identity import files_in, memory_of, saved_as
from workbench.subjects.loaders import builtin_names, subject

#: Changes that put a weight on a number format's grid, by the name they are saved under.
ON_A_GRID = "FakeQuant"


@dataclass(frozen=True)
class Source:
    """A model whose tensors are asked for by name; nothing is held between two of them.

    grids : layers that it holds on the grid of a number format
    """

    name: str
    fingerprint: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    grids: int = 0

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def tensor(self, name: str) -> Tensor:
        """float32, on the CPU."""
        return self.read(name).detach().to("cpu", torch.float32)


def weights_hash(source: Source, names: Iterable[str]) -> str:
    """Of some of a model's tensors as float32, in this order: the same however the model is opened."""
    total = hashlib.sha256()
    for name in names:
        total.update(name.encode())
        total.update(memory_of(source.tensor(name)))
    return total.hexdigest()[:24]


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved floating-point buffers by name, a shared one once, under its first name. The
    values themselves; a model with changes on its weights has to be baked first.
    """
    kept = model.state_dict(keep_vars=True)
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name in kept and value.is_floating_point() and id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def plain(on: Subject) -> Subject:
    """A copy without changes on its weights."""
    copy = on.copy()
    return copy.with_model(bake(copy.model))


def of_subject(on: Subject, name: str = "") -> Source:
    """A model in memory, the changes on its weights computed."""
    tensors = own_tensors(baked(on.model))
    grids = sum(type(c).__name__ == ON_A_GRID for layer in on.layers("*") for c in layer.changes)
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    return Source(name or on.name, on.fingerprint, shapes, tensors.__getitem__, grids)


def of_folder(
    folder: Path, wanted: Collection[str], prefix: str = "", aside: Collection[str] = ()
) -> Source | None:
    """A checkpoint's shards under the names `wanted`, with or without the trunk's `prefix`; None where the
    files name the tensors of the blocks otherwise, so that only the opened model can be asked.

    aside : further names of what is wanted already (tied weights), or that no weight has
    """
    check_folder(folder)
    stored = tensors_in(folder)
    unwrapped_names = {unwrapped(name): name for name in stored}
    known: dict[str, str] = {}
    for name in wanted:
        if spelled := next((each for each in spellings(name, prefix) if each in unwrapped_names), ""):
            known[name] = unwrapped_names[spelled]
    if any(block_of(name) and name not in known for name in wanted):
        return None
    taken = {*known.values(), *(unwrapped_names[name] for name in aside if name in unwrapped_names)}
    known |= {name: key for name, key in unwrapped_names.items() if key not in taken}
    read = functools.partial(
        from_shard, folder, {name: (stored[key].file, key) for name, key in known.items()}
    )
    shapes = {name: stored[key].shape for name, key in known.items()}
    return Source(folder.name, fingerprint_of(folder), shapes, read, grids_in(folder))


def spellings(name: str, prefix: str) -> tuple[str, str, str]:
    """How a checkpoint may call a tensor: as the model does, without the trunk's prefix, or with it."""
    return name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"


def from_shard(folder: Path, places: Mapping[str, tuple[str, str]], name: str) -> Tensor:
    from safetensors import safe_open

    file, key = places[name]
    with safe_open(str(folder / file), "pt") as tensors:
        found: Tensor = tensors.get_tensor(key)
    return found


def fingerprint_of(folder: Path) -> str:
    """That of the subject which the folder was saved from, else of the files of its weights."""
    known = saved_as(folder)
    if known:
        return known
    files = {name: sha for name, sha in files_in(folder).items() if name.endswith(".safetensors")}
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:24]


def grids_in(folder: Path) -> int:
    """Layers that a saved subject holds in a number format."""
    if not (folder / "workbench.json").is_file():
        return 0
    changes = read_json(folder / "workbench.json").get("changes")
    return sum(each.get("change") == ON_A_GRID for each in changes) if isinstance(changes, list) else 0


def block_of(name: str) -> str:
    """The path of the repeated block that a tensor's name lies in ("encoder.layer.3"); "" outside."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: place + 1]) if place else ""


def opened(source: str, on: Subject, field: str) -> Subject:
    """A model that somebody named, as a subject of `on`'s task."""
    own = source in builtin_names() or ".py:" in source or (Path(source) / "workbench.json").is_file()
    options: dict[str, Any] = {} if own else {"data": "random", "task": on.task.name, "max_length": 16}
    try:
        found = subject(source, **options)
    except BadInput as error:
        raise BadInput(f"{field}: {str(error).removeprefix('subject: ')}") from None
    if found.task.name != on.task.name:
        raise BadInput(
            f"{field}: {source!r} has the task {found.task.name}, the subject {on.task.name}; "
            "only models of one task go together"
        )
    return found


def source_of(source: str, on: Subject, field: str) -> Source:
    """A model that somebody named: streamed where it is a folder of safetensors with the subject's names."""
    wanted = own_tensors(baked(on.model))
    folder = Path(source)
    if folder.is_dir() and not is_gguf(source):
        check_kin(folder, on, field)
        aside = on.model.state_dict().keys() - wanted.keys()
        streamed = of_folder(folder, wanted, getattr(on.model, "base_model_prefix", ""), aside)
        if streamed is not None:
            return streamed
        if missing := lacking(folder, wanted, on):
            raise BadInput(
                f"{field}: {source!r} has no {missing}, which the subject has; give one of its architecture"
            )
    return of_subject(opened(source, on, field), folder.name if folder.exists() else source)


def check_kin(folder: Path, on: Subject, field: str) -> None:
    """`BadInput` for a folder whose configuration is of another architecture."""
    if not (folder / "config.json").is_file():
        return
    theirs = read_json(folder / "config.json").get("model_type")
    config: Any = getattr(on.model, "config", None)
    ours = getattr(config, "model_type", None)
    if theirs and ours and theirs != ours:
        raise BadInput(
            f"{field}: {str(folder)!r} is a {theirs}, the subject a {ours}; give models of one architecture"
        )


def lacking(folder: Path, wanted: Collection[str], on: Subject) -> str:
    """The first tensor of a block that the files have under no name; "" where transformers renames what it
    reads, and only the opened model tells.
    """
    if getattr(on.model, "_weight_conversions", None):
        return ""
    names = {unwrapped(name) for name in tensors_in(folder)}
    prefix = getattr(on.model, "base_model_prefix", "")
    spelled = (name for name in wanted if block_of(name))
    return next(
        (n for n in spelled if not names.intersection(spellings(n, prefix))),
        "",
    )
