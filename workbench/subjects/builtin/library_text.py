"""English about software that every installation has: docstrings and documentation of the project's own
direct dependencies, and Python's help topics, as windows of tokens for a language model.

The unit of splitting is the package, so nothing in test was written beside something in train. The list of
packages is fixed; what each contributes is known by its SHA-256 at the pinned versions, so that other
versions are named and not mistaken for the same text.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import metadata, packages_distributions
from typing import Any

import torch
from torch import Tensor

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.subjects.builtin.docstrings import duplicate_key, module_docstrings, modules

LENGTH = 256  # tokens a window
#: split -> windows, packages in the order in which they are read (an earlier one keeps a text that a later
#: one repeats) and characters at most of each package
SPLITS: dict[str, tuple[int, tuple[str, ...], int]] = {
    "test": (256, ("scipy", "sklearn"), 220_000),
    "validation": (128, ("pandas",), 240_000),
    "other-domain": (
        128,
        (
            "ipykernel",
            "ipywidgets",
            "jupyterlab",
            "nbconvert",
            "nbformat",
            "papermill",
            "pygments",
            "PIL",
            "pydantic",
            "platformdirs",
            "tqdm",
            "joblib",
        ),
        40_000,
    ),
    "train": (
        2048,
        (
            "torch",
            "transformers",
            "numpy",
            "plotly",
            "accelerate",
            "datasets",
            "peft",
            "optuna",
            "pytorch_optimizer",
            "pyarrow",
            "topics",
        ),
        420_000,
    ),
}
CALIBRATION = 128  # windows, of train
#: Python's help topics, read like a package and in no distribution.
TOPICS = "topics"
#: package -> the first 12 digits of the SHA-256 of its text at the versions of constraints.txt
PINNED = {
    "scipy": "ea27526464cd",
    "sklearn": "e89de0a2d85d",
    "pandas": "5fe339b9928f",
    "ipykernel": "ddaf47816176",
    "ipywidgets": "e241bab4a869",
    "jupyterlab": "069afb987c7b",
    "nbconvert": "ee643c651480",
    "nbformat": "50f9e17759a3",
    "papermill": "2e92335cf024",
    "pygments": "c02ea67592e0",
    "PIL": "9acaba28d279",
    "pydantic": "b6f92cdb6a7b",
    "platformdirs": "de88d66f83a0",
    "tqdm": "23c224366bfc",
    "joblib": "973ea6090131",
    "torch": "21f8542819f7",
    "transformers": "d12c3022c164",
    "numpy": "742aa7f9114d",
    "plotly": "4cfcd7f5600b",
    "accelerate": "0feeb2d4212b",
    "datasets": "a7b62bdd21d5",
    "peft": "b9e0b8407276",
    "optuna": "47732eec0525",
    "pytorch_optimizer": "9ffb2cc6491b",
    "pyarrow": "29f798864d04",
    "topics": "db6d6748df62",
}


@dataclass(frozen=True)
class Source:
    """What one package contributes: its documents, one a module, one for its description."""

    package: str
    split: str
    documents: tuple[str, ...]

    @property
    def digest(self) -> str:
        state = hashlib.sha256()
        for document in self.documents:
            state.update(f"{len(document)}\0{document}".encode())
        return state.hexdigest()[:12]


def collect(progress: Progress | None = None) -> list[Source]:
    """The texts of all packages, de-duplicated across them. Raises `BadInput` for one that is missing."""
    seen: set[str] = set()
    found = []
    wanted = [(split, package, limit) for split, (_, names, limit) in SPLITS.items() for package in names]
    for split, package, limit in (progress or Progress()).track(wanted, "read the packages' documentation"):
        found.append(Source(package, split, tuple(bounded(documents(package, seen), limit))))
    return found


def bounded(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Texts until they hold `limit` characters together; the one that passes it is the last."""
    length = 0
    for text in texts:
        yield text
        length += len(text)
        if length >= limit:
            return


def documents(package: str, seen: set[str]) -> Iterator[str]:
    """The package's description, then the docstrings of each module, in the order of a hash of its name.
    Texts in `seen` are left out, and new ones put there.
    """
    if package == TOPICS:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
        for name in sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest()):
            yield from joined([topics[name]], seen)
        return
    if importlib.util.find_spec(package) is None:
        raise BadInput(
            f"subject: the package {package!r} is not installed; 'smollm2' takes its text from "
            f"{', '.join(sorted(name for _, names, _ in SPLITS.values() for name in names))}"
        )
    owners = packages_distributions()
    if package in owners:
        described: Any = metadata(owners[package][0])
        yield from joined([str(described.get_payload())], seen)
    for _, path in modules(package):
        yield from joined(module_docstrings(path), seen)


def joined(texts: Iterable[str], seen: set[str]) -> Iterator[str]:
    """One document of the texts of at least 20 words that say something new; none when there is none."""
    kept = []
    for text in texts:
        key = duplicate_key(text)
        if len(text.split()) >= 20 and key not in seen:
            seen.add(key)
            kept.append(text.strip())
    if kept:
        yield "\n\n".join(kept) + "\n"


def changed(sources: Sequence[Source]) -> dict[str, str]:
    """package -> digest of its text, of those whose text is not that of the pinned versions."""
    return {s.package: s.digest for s in sources if PINNED.get(s.package) != s.digest}


def windows(
    sources: Sequence[Source], encode: Callable[[str], list[int]], boundary: int
) -> dict[str, dict[str, Tensor]]:
    """split -> input ids, attention mask and labels, each (windows, 256) int64.

    The documents of a split are one stream of tokens, each document after the token `boundary`, cut into
    windows that do not overlap; as many as the split has are taken at even spacing and put into the order of
    a hash of what they hold, so that the first n are a mixture of all packages. Raises `BadInput` when a
    split has too little text.
    """
    splits: dict[str, dict[str, Tensor]] = {}
    for split, (count, _, _) in SPLITS.items():
        stream = [
            token
            for source in sources
            if source.split == split
            for document in source.documents
            for token in (boundary, *encode(document))
        ]
        whole = len(stream) // LENGTH
        if whole < count:
            raise BadInput(
                f"subject: the installed packages give {whole} windows of {LENGTH} tokens for {split}, "
                f"{count} are needed; install the versions of constraints.txt"
            )
        cut = torch.tensor(stream[: whole * LENGTH]).view(whole, LENGTH)
        taken = cut[torch.arange(count) * whole // count]
        order = sorted(range(count), key=lambda row: hashlib.sha256(taken[row].numpy().tobytes()).digest())
        splits[split] = language_model_columns(taken[order])
    splits["calibration"] = {k: v[:CALIBRATION].clone() for k, v in splits["train"].items()}
    order_of_use = ("train", "calibration", "validation", "test", "other-domain")
    return {split: splits[split] for split in order_of_use}


def language_model_columns(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text to token ids without special tokens; a notice about length is not wanted for a stream."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return encode
