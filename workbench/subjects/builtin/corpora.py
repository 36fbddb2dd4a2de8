"""Text that every installation has: the running interpreter's standard library and the docstrings
of packages.

Both are read from files, never imported, and every document is assigned to a split by a hash of its name
alone. So a document that exists in two Python versions is in the same split in both,
and none is in two splits.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

SPLITS = ("train", "validation", "test")

#: Byte vocabulary: 0..255 are bytes, then the two special tokens.
DOCUMENT_START = 256
PADDING = 257
BYTE_VOCABULARY = 258

#: Folders of the standard library that hold tests, other people's packages,
#: or files that are built per machine.
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "lib-dynload",
    "__pycache__",
}


@dataclass(frozen=True)
class Document:
    """One file (or one help topic): its name decides the split, its text is UTF-8."""

    name: str
    text: bytes

    @property
    def split(self) -> str:
        return split_of(self.name)


def split_of(name: str, validation: float = 0.05, test: float = 0.05) -> str:
    """The split of a document, from the SHA-256 of its name:
    about 5 % validation, 5 % test, the rest train.
    """
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if position < test:
        return "test"
    return "validation" if position < test + validation else "train"


def standard_library() -> list[Document]:
    """The standard library's own source and its help topics, sorted by name.

    Left out: tests, C extensions' build records (``_sysconfigdata*``), third-party folders, and the character
    tables that gencodec.py generates (120 near-copies of one file: text from one split would be in another).
    ``pydoc_data.topics`` enters as one document per topic,
    with real line ends instead of one escaped dictionary.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = list(_library_files(root))
    topics = import_module("pydoc_data.topics").topics
    documents += [Document(f"pydoc_data/topics/{name}", text.encode()) for name, text in topics.items()]
    return sorted(documents, key=lambda document: document.name)


def _library_files(root: Path) -> Iterator[Document]:
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        if _SKIPPED_FOLDERS.intersection(folders) or any(part.startswith("config-") for part in folders):
            continue
        if path.name.startswith("_sysconfigdata") or relative.as_posix() == "pydoc_data/topics.py":
            continue
        text = path.read_bytes().replace(b"\r\n", b"\n")
        if text.strip() and b"gencodec.py" not in text:
            yield Document(relative.as_posix(), text)


def digest(documents: Iterable[Document]) -> str:
    """SHA-256 over names and texts in order: two corpora with the same digest are the same corpus."""
    state = hashlib.sha256()
    for document in documents:
        state.update(f"{document.name}\0{len(document.text)}\0".encode())
        state.update(document.text)
    return state.hexdigest()


def byte_stream(documents: Iterable[Document]) -> np.ndarray:
    """All documents as one int16 array of byte tokens, each document after one ``DOCUMENT_START``."""
    pieces: list[np.ndarray] = []
    for document in documents:
        pieces.append(np.array([DOCUMENT_START], dtype=np.int16))
        pieces.append(np.frombuffer(document.text, dtype=np.uint8).astype(np.int16))
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int16)


def byte_windows(documents: Iterable[Document], length: int, count: int | None = None) -> torch.Tensor:
    """Non-overlapping windows of the byte stream, int64 of shape (windows, length).

    With ``count``, that many windows (or all, if there are fewer) at even spacing through the whole stream,
    so a bounded split still sees every kind of document.
    """
    stream = byte_stream(documents)
    whole = len(stream) // length
    windows = stream[: whole * length].reshape(whole, length)
    if count is not None and count < whole:
        windows = windows[(np.arange(count) * whole) // count]
    return torch.from_numpy(windows.astype(np.int64))


def texts(split: str) -> list[str]:
    """The standard library's documents as text, in the order of a hash of their names,
    so any prefix is mixed.

    `split` is train, calibration, validation or test. Calibration is a tenth of the training files, which
    `texts` then leaves out of train: a model tuned on one can be calibrated on the other.
    """
    chosen = []
    for document in standard_library():
        order = hashlib.sha256(b"order " + document.name.encode()).digest()
        home = "calibration" if document.split == "train" and order[0] < 26 else document.split
        if home == split:
            chosen.append((order, document.text.decode("utf-8", errors="replace")))
    return [text for _, text in sorted(chosen)]
