"""Which class of a checkpoint a label of the data is: matched by name, else by number, else refused."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from workbench.errors import BadInput


@dataclass(frozen=True)
class Classes:
    """names : of the classes, in the order of the model's outputs
    place : label as the data writes it -> its class
    note : how they were matched, where that is not plain
    """

    names: list[str]
    place: dict[str, int]
    note: str = ""

    def of(self, value: Any) -> int:
        return self.place[written(value)]


def float_of(value: Any) -> float:
    """A number, or the text of one in a table: Python reads `1_000` and digits of other scripts as well."""
    if isinstance(value, str) and ("_" in value or not value.isascii()):
        raise ValueError(value)
    return float(value)


def number_of(value: Any) -> int | None:
    """The whole number that a label is or spells ("3", 3, 3.0, True); None for any other."""
    try:
        found = float_of(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(found) if math.isfinite(found) and found == int(found) else None


def written(value: Any) -> str:
    """A label as text, one spelling a number: 3, 3.0 and "3" are one label."""
    number = number_of(value)
    return str(value).strip() if number is None else str(number)


def composed(name: str) -> str:
    """A name with each accented letter as one character, however it is encoded."""
    return unicodedata.normalize("NFC", written(name))


def folded(name: str) -> str:
    """A name without what spelling adds: case, and the sign between words; `A-` keeps the one behind it, a
    number the one before it.
    """
    if number_of(name) is not None:
        return written(name)
    words = unicodedata.normalize("NFKC", name).strip()
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", words).casefold()


def distinct(values: Iterable[Any]) -> list[str]:
    """The labels that occur, numbers first and in their order."""
    found = {written(value) for value in values}
    return sorted(found, key=lambda v: (number_of(v) is None, number_of(v) or 0, v))


def untrained(values: Iterable[Any], column: str) -> Classes:
    """The classes of a head that is new: the labels that occur, in order."""
    names = distinct(values)
    if len(names) < 2:
        raise BadInput(
            f"label-column: {column!r} holds one value only ({names[0]!r}); at least two classes are needed"
        )
    between = [name for name in names if number_of(name) is None]
    if between and all(is_number(name) for name in names):
        raise BadInput(
            f"label-column: {column!r} holds numbers such as {between[0]}, which are no classes; give "
            "task=regression, or names in place of the numbers"
        )
    note = f"the new head's {len(names)} classes are {some(names)}"
    return Classes(names, {name: i for i, name in enumerate(names)}, note)


def is_number(name: str) -> bool:
    try:
        return math.isfinite(float_of(name))
    except ValueError:
        return False


def trained(values: Iterable[Any], column: str, id2label: dict[Any, Any]) -> Classes:
    """The classes of a checkpoint, each label matched to one: by its name, by the only number in the names,
    by its number; `BadInput` when neither does.
    """
    names = [str(id2label[key]) for key in sorted(id2label, key=int)]
    labels = distinct(values)
    by_name = [named(label, names) for label in labels]
    if None not in by_name:
        return Classes(names, {v: i for v, i in zip(labels, by_name, strict=True) if i is not None})
    numbers = [number_of(label) for label in labels]
    spelled = [re.findall(r"\d+", name) for name in names]
    if None not in numbers and all(len(found) == 1 for found in spelled):
        by_number = places({int(found[0]): i for i, found in enumerate(spelled)}, numbers, names)
        if by_number is not None:
            return shown(names, labels, by_number)
    if all(number is not None and 0 <= number < len(names) for number in numbers):
        return shown(names, labels, [number for number in numbers if number is not None])
    raise BadInput(
        f"label-column: {column!r} holds {some(labels)}, but the checkpoint's {len(names)} classes are "
        f"{some(names)}; write their names or their numbers 0 to {len(names) - 1} in the data, "
        "or name the classes in id2label of config.json"
    )


def named(label: str, names: list[str]) -> int | None:
    """The one class of this name: exactly, else as composed letters, else without case and signs; None where
    there is none, or several.
    """
    for spelled in (written, composed, folded):
        found = [i for i, name in enumerate(names) if spelled(name) == spelled(label)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def places(known: dict[Any, int], wanted: list[Any], names: list[str]) -> list[int] | None:
    """The class of each wanted key, when all are known and no two classes share one."""
    if len(known) < len(names) or not all(key in known for key in wanted):
        return None
    return [known[key] for key in wanted]


def shown(names: list[str], labels: list[str], found: list[int]) -> Classes:
    pairs = [f"{label} is {names[i]}" for label, i in zip(labels, found, strict=True)]
    plain = all(names[i] in (label, f"LABEL_{label}") for label, i in zip(labels, found, strict=True))
    return Classes(names, dict(zip(labels, found, strict=True)), "" if plain else f"labels: {some(pairs)}")


def some(names: list[str], most: int = 6) -> str:
    return ", ".join(name[:40] for name in names[:most]) + (", ..." if len(names) > most else "")
