"""What there is: instruments by command-line name, method cards by name."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workbench.errors import BadInput
from workbench.families import FAMILIES, import_families
from workbench.instruments import Instrument
from workbench.results import Result


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
    import difflib

    known = catalog()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise BadInput(f"instrument: {name!r} is unknown; {hint}known: {', '.join(known)}")
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
    measure: Callable[..., dict[str, Any]] | None = None  # (name, progress) -> evidence record

    def evidence(self) -> dict[str, Any] | None:
        """The stored measurement (`data/evidence/FAMILY/NAME.json`),
        or None when nothing was measured yet.
        """
        from workbench.storage import data_folder

        file = data_folder() / "evidence" / self.family / f"{self.name}.json"
        return json.loads(file.read_text()) if file.exists() else None


@functools.lru_cache(1)
def methods() -> dict[str, Method]:
    """Every method card by name; each family lists its own in `workbench.FAMILY.cards.CARDS`."""
    cards: dict[str, Method] = {}
    for family in FAMILIES:
        try:
            found = importlib.util.find_spec(f"workbench.evidence.{family}.cards")
        except ModuleNotFoundError:
            found = None
        if found is not None:
            for card in importlib.import_module(f"workbench.evidence.{family}.cards").CARDS:
                cards[card.name] = card
    return cards


Result.finds = find
