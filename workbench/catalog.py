"""What there is: instruments by command-line name, method cards by name."""

from __future__ import annotations

import functools
import importlib.util
import json
from dataclasses import dataclass
from typing import Any

from workbench.errors import unknown_name
from workbench.families import FAMILIES, import_families
from workbench.instruments import Instrument
from workbench.results import Result
from workbench.storage import evidence_folders


def catalog() -> dict[str, type[Instrument]]:
    """Every instrument by command-line name, those a user's own code defines included."""
    import_families()
    found: dict[str, type[Instrument]] = {}

    def walk(cls: type[Instrument]) -> None:
        for sub in cls.__subclasses__():
            if "_run" in vars(sub):
                found[sub.name()] = sub
            walk(sub)

    walk(Instrument)
    return dict(sorted(found.items()))


def find(name: str) -> type[Instrument]:
    """The instrument class called `name` on the command line."""
    known = catalog()
    if name not in known:
        raise unknown_name("instrument", name, known)
    return known[name]


@dataclass(frozen=True)
class Method:
    """A catalog card: a named, published technique, what it needs and the evidence measured for it here."""

    name: str
    family: str
    title: str
    source: str  # authors, year
    formula: str  # plain text or LaTeX
    needs: str  # data, gradients, retraining
    claim: str  # what the source says, checkable here
    row: int | None = None  # the technique list's number

    def evidence(self) -> dict[str, Any] | None:
        """The stored measurement, one's own before the project's (`FAMILY/NAME.json`),
        or None when nothing was measured yet.
        """
        for folder in evidence_folders():
            file = folder / self.family / f"{self.name}.json"
            if file.exists():
                return json.loads(file.read_text())
        return None


@functools.lru_cache(1)
def methods() -> dict[str, Method]:
    """Every method card by name; a family lists its own as METHODS in `workbench.FAMILY.method_cards`
    or `workbench.FAMILY.methods`.
    """
    cards: dict[str, Method] = {}
    for family in FAMILIES:
        for place in ("method_cards", "methods"):
            try:
                found = importlib.util.find_spec(f"workbench.{family}.{place}")
            except ModuleNotFoundError:  # the family is a single file
                found = None
            if found is not None:
                for card in importlib.import_module(f"workbench.{family}.{place}").METHODS:
                    cards[card.name] = card
                break
    return cards


Result.finds = find
