"""What of a model's weights is resident: memory that is given back while the weights stay what they are.

The weights of a safetensors checkpoint lie in its mapped file. Whoever reads them gets the file's pages into
the process's memory, where they stay for as long as nobody needs it; a walk over blocks that gives back each
block's when it leaves it holds one block of the dense model and the changed blocks, not two models. The next
to read such a weight gets its pages from the system's cache of files.

A run whose changed blocks do not fit beside each other either has a `Disk`: what it makes of a block is put
into a file without a name, and given back like the checkpoint's own. The numbers are the same.

All of this knows Linux; elsewhere nothing is given back, and there is no `Disk`.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import gc
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

PAGES = "/proc/self/pagemap"
#: Of an entry of the page map (Documentation/admin-guide/mm/pagemap.rst): the page is in memory; and it is a
#: file's or shared, so that nothing has been written to it that is not there too.
PRESENT, OF_FILE = np.uint64(1 << 63), np.uint64(1 << 61)
DONTNEED = 4
DELETED = " (deleted)"  # at the end of the name of a mapped file that has none any more


@functools.cache
def library() -> Any:
    """The C library's `madvise` and `malloc_trim`, or None."""
    if not sys.platform.startswith("linux") or not os.access(PAGES, os.R_OK):
        return None
    found = ctypes.CDLL(None)
    if not hasattr(found, "malloc_trim"):
        return None
    found.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found.malloc_trim.argtypes = (ctypes.c_size_t,)
    return found


def let_go(tensors: Iterable[Tensor]) -> int:
    """Give back the pages of these tensors that a mapped file holds as they are; the number of bytes.

    Pages of a checkpoint that were written to since it was opened are the process's own and stay. Nobody may
    write to the tensors meanwhile.
    """
    system = library()
    if system is None:
        return 0
    page, total = os.sysconf("SC_PAGESIZE"), 0
    places = {place for tensor in tensors if (place := extent(tensor)) is not None}
    places = {(start, end) for start, end in places if end - start >= page}
    if not places:
        return 0
    pages = os.open(PAGES, os.O_RDONLY)
    try:
        for start, end in places:
            first, last = -(-start // page), end // page
            if last <= first:
                continue
            entries = np.frombuffer(os.pread(pages, 8 * (last - first), 8 * first), np.uint64)
            clean = (entries & (PRESENT | OF_FILE)) == (PRESENT | OF_FILE)
            edges = np.flatnonzero(np.diff(clean.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
            for begin, stop in edges.tolist():
                size = (stop - begin) * page
                if system.madvise((first + begin) * page, size, DONTNEED) == 0:
                    total += size
    finally:
        os.close(pages)
    return total


def of_files(tensors: Iterable[Tensor]) -> bool:
    """Whether all of these tensors lie in mapped files, so that `let_go` gives them back. Reads none."""
    return library() is not None and all(file is not None for file in files_of(tensors))


def files_of(tensors: Iterable[Tensor]) -> Iterator[Path | None]:
    """Of each tensor the mapped file that it lies in, None where it lies in none. The name of a file that has
    lost its own ends in `DELETED`.
    """
    ranges = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            place, _, _, _, inode, *name = line.rstrip("\n").split(maxsplit=5)
            if inode != "0":
                start, end = (int(edge, 16) for edge in place.split("-"))
                ranges.append((start, end, name[0] if name else ""))
    ranges.sort()
    starts = [start for start, _, _ in ranges]
    for tensor in tensors:
        found = extent(tensor)
        index = -1 if found is None else bisect.bisect_right(starts, found[0]) - 1
        inside = found is not None and index >= 0 and found[0] < ranges[index][1]
        yield Path(ranges[index][2]) if inside else None


def extent(tensor: Tensor) -> tuple[int, int] | None:
    """Where a tensor's storage begins and ends in the process's memory."""
    if tensor.device.type != "cpu" or tensor.is_meta or not tensor.numel():
        return None
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def trim() -> None:
    """Give back what lies free between allocations: between large temporary tensors, new weights are placed
    that stay, and the gaps beside them would.
    """
    system = library()
    if system is not None:
        system.malloc_trim(0)


def reclaim() -> None:
    """Give back what nobody reaches any more. A changed model and its modules know each other, so it waits
    for Python's collector, which counts objects and not their bytes.
    """
    gc.collect()
    trim()


def from_file(file: Path, size: int) -> Tensor:
    """A file's bytes as memory: what is written to the tensor is written to the file."""
    import torch

    return torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8)


class Disk:
    """Memory in files without names, in a folder: they go when the last tensor in them does.

    keeps : where files are made while they are to keep their names
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keeps: Path | None = None

    def space(self, like: Tensor) -> Tensor:
        """A tensor of the same shape and type, contiguous, with no values yet. `CannotWrite` where the disk
        has no room: whoever wrote to a file's memory without room would be killed.
        """
        import torch

        from workbench.storage.writing import told_of

        if like.device.type != "cpu" or not like.numel():
            return torch.empty_like(like)
        folder = self.keeps or self.folder
        with told_of(folder, "memory"):
            number, name = tempfile.mkstemp(dir=folder)
        try:
            with told_of(folder, "memory"), os.fdopen(number, "wb"):
                os.posix_fallocate(number, 0, like.nbytes)
            flat = from_file(Path(name), like.nbytes)
        except BaseException:
            os.unlink(name)
            raise
        if self.keeps is None:
            os.unlink(name)
        return flat.view(like.dtype).view(like.shape)

    def placed(self, value: Any) -> Any:
        """A tensor with the values of one, its pages given back; what is none as it is."""
        if not hasattr(value, "untyped_storage"):
            return value
        made = self.space(value)
        made.copy_(value.detach())
        let_go([made])
        return made

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Let these parameters and buffers lie here, where they do not lie in files already; where files keep
        their names, in such a one each.
        """
        held = list(tensors)
        for tensor, file in zip(held, files_of(held), strict=True):
            if file is None or (self.keeps is not None and not self.has(file)):
                tensor.data = self.placed(tensor)
        let_go(held)

    def has(self, file: Path | None) -> bool:
        """Whether this is a file of the folder where they keep their names."""
        return file is not None and file.parent == self.keeps and not file.name.endswith(DELETED)


ACTIVE: ContextVar[Disk | None] = ContextVar("ACTIVE", default=None)


def disk() -> Disk | None:
    """Where what is done with goes in the run that goes on; None where it stays in memory."""
    return ACTIVE.get()


@contextlib.contextmanager
def on_disk(folder: Path) -> Iterator[None]:
    """Inside, runs hold one block's worth: what they have made of the others lies in files in `folder`."""
    before = ACTIVE.set(Disk(folder))
    try:
        yield
    finally:
        ACTIVE.reset(before)


def cloned(tensor: Tensor) -> Tensor:
    """A copy, where a run's changed weights go."""
    place = disk()
    return tensor.clone() if place is None else place.placed(tensor)


def empty_like(tensor: Tensor) -> Tensor:
    """Room for a tensor of this shape and type, where a run's changed weights go."""
    import torch

    place = disk()
    return torch.empty_like(tensor) if place is None else place.space(tensor)
