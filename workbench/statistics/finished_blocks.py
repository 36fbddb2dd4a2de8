"""The blocks that a walk in files has done: a run that was interrupted goes on behind them.

A walk that holds one block has put the others into files (`workbench.storage.resident`). Where a run has a
journal these files have names there, and once a block is done a note says in which of them the weights of its
layers, the changes on them and its answers to the calibration windows lie, with a checksum of each, and what
the run has found out about the block. A walk of the same run takes from there what is whole, and begins with
the first block that is not.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from workbench.storage.resident import Disk, files_of, from_file, let_go
from workbench.subjects import Layer
from workbench.subjects.changes import Change, attach, changes_of, describe_changes, made_again, restack
from workbench.unfinished import Journal

Record = dict[str, Any]  # what JSON holds
Answers = list[dict[str, Any]]  # for each batch of windows: list of blocks -> what its latest block returned
NOTE = "block-{:04d}.json"
PLAIN = (type(None), bool, int, float, str)


class FinishedBlocks:
    """The notes of one walk over `blocks`.

    notes : of the blocks that are whole, in their order;  answers : what the last of them passed on
    """

    def __init__(self, journal: Journal, disk: Disk, blocks: Sequence[str]) -> None:
        self.journal, self.disk, self.blocks = journal, disk, blocks
        self.folder = journal.place("walk")
        self.notes: list[Record] = []
        self.answers: Answers = []
        if journal.usable and self.folder.is_dir():
            self._find()

    def _find(self) -> None:
        notes: list[Record] = []
        for index, block in enumerate(self.blocks):
            note = read(self.folder / NOTE.format(index))
            if note is None or note["block"] != block or not all(map(self._whole, note["tensors"].values())):
                break
            notes.append(note)
        if not notes:
            return
        if len(notes) < len(self.blocks):
            leaves = notes[-1]["leaves"]
            if not all(self._whole(leaf) for leaf in leaves if isinstance(leaf, dict)):
                return
            opened = [self._opened(leaf) if isinstance(leaf, dict) else leaf for leaf in leaves]
            self.answers = tree_unflatten(opened, treespec_loads(notes[-1]["tree"]))
        self.notes = notes

    def _whole(self, place: Record) -> bool:
        """Whether a file holds what was put into it."""
        file = self.folder / str(place["file"])
        if not place["file"]:
            return True
        if not file.is_file() or file.stat().st_size != size_of(place):
            return False
        value = self._opened(place)
        found = checksum(value)
        let_go([value])
        return bool(found == place["checksum"])

    def _opened(self, place: Record) -> Tensor:
        dtype = getattr(torch, place["dtype"])
        if not place["file"]:
            return torch.empty(place["shape"], dtype=dtype)
        return from_file(self.folder / place["file"], size_of(place)).view(dtype).view(place["shape"])

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Inside, what goes to the disk has a name in the folder of the notes."""
        before = self.disk.keeps
        try:
            if self.journal.begin():
                self.folder.mkdir(parents=True, exist_ok=True)
                self._clear()
                self.disk.keeps = self.folder
        except OSError as error:
            self.journal.give_up(error)
        try:
            yield
        finally:
            self.disk.keeps = before

    def take(self, index: int, module: nn.Module) -> Record:
        """Give a block the weights and changes that it had when it was done; what was noted of it."""
        note = self.notes[index]
        opened = {name: self._opened(place) for name, place in note["tensors"].items()}
        made: dict[tuple[str, str], list[Change]] = {}
        for told in note["changes"]:
            change = made_again(told, opened)
            attach(module.get_submodule(told["module"]), told["tensor"], change, told["transposed"])
            made.setdefault((told["module"], told["tensor"]), []).append(change)
        for (path, tensor), changes in made.items():
            holder = module.get_submodule(path)
            restack(holder, tensor, [c for c in changes_of(holder, tensor) if c in changes])
        for name in note["weights"]:
            path, _, last = name.rpartition(".")
            held = module.get_submodule(path)._parameters
            before = held[last]
            held[last] = nn.Parameter(opened[name], before is not None and before.requires_grad)
        let_go(opened.values())
        torch.set_rng_state(torch.tensor(note["random"], dtype=torch.uint8))
        found: Record = note["record"]
        return found

    def put(
        self, index: int, module: nn.Module, layers: Sequence[Layer], record: Record, left: Answers
    ) -> None:
        """Note that a block is done; `left` is what the next one reads."""
        if self.disk.keeps is None or not self.journal.usable:
            return
        leaves, tree = tree_flatten(left)
        if not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):
            self.journal.give_up(f"{self.blocks[index]} passes on more than tensors")
            return
        touched = {layer.module for layer in layers}
        self.disk.keep(t for part in touched for t in (*part.parameters(), *part.buffers()))
        weights = weights_of(module, touched)
        changes, tensors = describe_changes(module)
        changes = [told for told in changes if module.get_submodule(told["module"]) in touched]
        keys = {f"{told['module']}.{told['tensor']}.{told['change']}." for told in changes}
        held = {name: t for name, t in tensors.items() if name[: name.rindex(".") + 1] in keys}
        note = {
            "block": self.blocks[index],
            "changes": changes,
            "weights": list(weights),
            "tensors": self._places(held | weights),
            "record": record,
            "random": torch.get_rng_state().tolist(),
            "tree": treespec_dumps(tree),
        }
        places = self._places({str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)})
        note["leaves"] = [places.get(str(i), leaf) for i, leaf in enumerate(leaves)]
        try:
            write(self.folder / NOTE.format(index), note)
        except OSError as error:
            self.journal.give_up(error)
            return
        self.notes[index:] = [note]
        self._clear()

    def _places(self, tensors: Mapping[str, Tensor]) -> dict[str, Record]:
        """Of each tensor its file, type, shape and checksum."""
        found = {}
        for (name, tensor), file in zip(tensors.items(), list(files_of(tensors.values())), strict=True):
            assert not tensor.numel() or self.disk.has(file), f"{name} has no file of its own"
            found[name] = {
                "file": file.name if file is not None and tensor.numel() else "",
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "checksum": checksum(tensor),
            }
            let_go([tensor])
        return found

    def _clear(self) -> None:
        """Remove what no note tells of: work on a block that was not done, answers that have been read."""
        used = {NOTE.format(index) for index in range(len(self.notes))}
        used |= {place["file"] for note in self.notes for place in note["tensors"].values()}
        if self.notes:
            used |= {leaf["file"] for leaf in self.notes[-1]["leaves"] if isinstance(leaf, dict)}
        for file in self.folder.iterdir():
            if file.name not in used:
                file.unlink(missing_ok=True)


def weights_of(module: nn.Module, touched: Iterable[nn.Module]) -> dict[str, Tensor]:
    """The parameters of some modules inside another, by their names in it, but those of changes."""
    inside = {part for one in touched for part in one.modules() if not isinstance(part, Change)}
    return {
        f"{path}.{name}" if path else name: parameter.detach()
        for path, part in module.named_modules()
        if part in inside
        for name, parameter in part.named_parameters(recurse=False)
    }


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    if not tensor.numel():
        return 0
    flat: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return zlib.crc32(memoryview(flat))


def size_of(place: Record) -> int:
    """Bytes of a tensor of this type and shape."""
    return math.prod(place["shape"]) * getattr(torch, place["dtype"]).itemsize


def write(file: Path, note: Record) -> None:
    """A note with a checksum of its own, in place at once or not at all."""
    text = json.dumps(note)
    part = file.with_suffix(".part")
    part.write_text(f"{zlib.crc32(text.encode())}\n{text}", encoding="utf-8")
    os.replace(part, file)


def read(file: Path) -> Record | None:
    """A note that is as it was written; None otherwise."""
    try:
        told, _, text = file.read_text(encoding="utf-8").partition("\n")
        if told != str(zlib.crc32(text.encode())):
            return None
        found: Record = json.loads(text)
    except (OSError, ValueError):
        return None
    return found
