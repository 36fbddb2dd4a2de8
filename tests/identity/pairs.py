"""A pair: a function that gives their numbers and ours on the same seeded inputs, and what is stored."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.identity.repositories import COMMITS, checked_out
from workbench.storage import data_folder, replacing
from workbench.storage.identity import FP64, TABLE, incomplete

#: Numbers of each side that a record shows.
SHOWN = 4


@dataclass
class Draw:
    """Seeded inputs of a pair; the shapes drawn are stored beside the seed."""

    seed: int
    shapes: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers."""
        self.shapes.append(list(shape))
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def inputs(self, rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Correlated rows (rows, width) whose features differ in size by up to ten."""
        sizes = torch.logspace(0, 1, width, dtype=torch.float64)
        mixed = self.normal(rows, width, dtype=torch.float64) + self.normal(rows, 1, dtype=torch.float64)
        return (mixed * sizes / 10**0.5).to(dtype)


@dataclass(frozen=True)
class Pair:
    """`run(draw)` gives (theirs, ours), tensors of one shape.

    methods : names of cards and of axes' entries that the numbers speak for
    peer, version : whose code; a package's version is read from what is installed
    compared, inputs : "the rounded weights", "64 x 128 normal weights, 4 bits"
    tolerance : largest absolute difference that counts as equal; 0 for bit for bit
    """

    methods: tuple[str, ...]
    peer: str
    kind: str
    compared: str
    inputs: str
    tolerance: float
    run: Callable[[Draw], tuple[Tensor, Tensor]]
    version: str = ""
    seed: int = 0
    finding: str = ""


#: Registered so far; `every_pair` reads all files.
PAIRS: list[Pair] = []


def beside(*methods: str, **about: Any) -> Callable[[Callable[[Draw], tuple[Tensor, Tensor]]], Any]:
    """Register a function as a `Pair`."""

    def registered(run: Callable[[Draw], tuple[Tensor, Tensor]]) -> Any:
        PAIRS.append(Pair(methods, run=run, **about))
        return run

    return registered


def every_pair() -> list[Pair]:
    """The pairs of all files here."""
    for module in pkgutil.walk_packages([str(Path(__file__).parent)], "tests.identity."):
        if not module.name.rpartition(".")[2].startswith(("test_", "__")):
            importlib.import_module(module.name)
    return PAIRS


def installed(pair: Pair) -> str | None:
    """The peer's version; None for a package or a checkout that is not there."""
    if pair.peer in COMMITS and not checked_out(pair.peer):
        return None
    if pair.version or pair.kind in (TABLE, FP64):
        return pair.version
    try:
        return importlib.metadata.version(pair.peer).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def measured(pair: Pair, version: str) -> dict[str, Any]:
    """The record of a pair, its method left open."""
    draw = Draw(pair.seed)
    theirs, ours = (values.detach().double().flatten() for values in pair.run(draw))
    assert theirs.shape == ours.shape, (pair.methods, theirs.shape, ours.shape)
    gap = float((theirs - ours).abs().max())
    size = float(theirs.abs().max())
    return {
        "method": "",
        "peer": pair.peer,
        "version": version,
        "kind": pair.kind,
        "compared": pair.compared,
        "inputs": pair.inputs,
        "seed": pair.seed,
        "shapes": draw.shapes,
        "theirs": [float(f"{v:.9g}") for v in theirs[:SHOWN].tolist()],
        "ours": [float(f"{v:.9g}") for v in ours[:SHOWN].tolist()],
        "difference": float(f"{gap:.3g}"),
        "relative": float(f"{gap / size if size else gap:.3g}"),
        "tolerance": pair.tolerance,
        "equal": gap <= pair.tolerance,
        "finding": pair.finding,
        "date": datetime.date.today().isoformat(),
        "command": "",
    }


def store(name: str, record: dict[str, Any]) -> None:
    """Put a record in its method's file, in the place of an earlier one of the same comparison."""
    record = record | {"method": name, "command": f"python -m tests.identity {name}"}
    assert not (wrong := incomplete(record)), f"{name}: {wrong}"
    file = data_folder() / "evidence" / "identity" / f"{name}.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    same = ("peer", "kind", "compared", "inputs")
    records = [other for other in kept if any(other[key] != record[key] for key in same)] + [record]
    with replacing(file, private=True) as draft:
        draft.write_text(json.dumps(records, indent=1, allow_nan=False) + "\n", encoding="utf-8")
