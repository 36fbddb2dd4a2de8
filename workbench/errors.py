"""What is said to somebody who asked for something that cannot be done."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable
from typing import get_args, get_origin

from pydantic import BaseModel, ValidationError

#: Characters of a message that are still one readable line, and of a word in it: the rest is the user's.
LONGEST, LONGEST_WORD = 3000, 300


class BadInput(ValueError):
    """The user asked for something that cannot be done; one line names the field, the value,
    what is accepted and the fix. Whatever it quotes, it is one line, and not an endless one.
    """

    def __init__(self, text: object = "") -> None:
        super().__init__(one_line(said(text)))


def said(error: object) -> str:
    """The words of an error or anything else, even of one that has none."""
    try:
        return str(error)
    except Exception:  # whatever a stranger's class does
        return f"a {type(error).__name__} without words"


def one_line(text: str) -> str:
    """Line breaks and control characters become spaces; what is too long is cut in the middle."""
    line = re.sub(r"\s*[\x00-\x08\n-\r\x0e-\x1f\x7f\x85\u2028\u2029]\s*", " ", text).strip()
    line = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: shortened(word[0], LONGEST_WORD), line)
    return shortened(line, LONGEST)


def shortened(text: str, length: int) -> str:
    """`text` without its middle where it is longer than `length`."""
    half = (length - 5) // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


class Stopped(BadInput):
    """Somebody asked to stop before there was anything to report."""


class NotFinite(BadInput):
    """Numbers overflowed where nothing that came in does; where the first did is looked for."""


class Notice(UserWarning):
    """Something a user should know that stops nothing: one line."""


def notice(text: str) -> None:
    """Say it: a line of its own on the command line, a warning in Python."""
    warnings.warn(text, Notice, stacklevel=3)


def unknown_name(field: str, name: object, known: Iterable[str], otherwise: str = "") -> BadInput:
    """`name` is not one of the known ones; the closest is offered. `otherwise`: what is accepted besides."""
    names = list(known)
    hint = did_you_mean(name, names)
    return BadInput(
        f"{field}: {name!r} is unknown; {hint + ' ' if hint else ''}known: {', '.join(names)}{otherwise}"
    )


def did_you_mean(name: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f"did you mean {close[0]}?" if close else ""


def describe(error: ValidationError, cls: type[BaseModel]) -> str:
    """A pydantic error as one line: field, value, what would be accepted."""
    lines = []
    for item in error.errors():
        count = values_asked(item["loc"], cls) if item["type"] in ("missing", "too_long") else 0
        field = ".".join(str(part) for part in item["loc"][: 1 if count else None]) or cls.__name__
        if count:
            lines.append(f"{field}: {item['input']!r} is not accepted, it should be {count} values")
        elif item["type"] == "extra_forbidden":
            hint = did_you_mean(field, cls.model_fields)
            fields = ", ".join(cls.model_fields)
            lines.append(f"{field}: unknown field{'; ' + hint if hint else ''} (fields: {fields})")
        elif item["type"] == "missing":
            lines.append(f"{field}: is missing, and has no default")
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            shown = f"{item['input']!r} is not accepted, it should be "
            if item["type"] == "value_error":
                shown = ""
            lines.append(f"{field}: {shown}{message}")
    return "; ".join(lines)


def values_asked(place: tuple[int | str, ...], cls: type[BaseModel]) -> int:
    """How many values a field of fixed length takes; 0 where it has none, or where the place is deeper."""
    info = cls.model_fields.get(str(place[0])) if place else None
    kind = info.annotation if info is not None else None
    fixed = get_origin(kind) is tuple and Ellipsis not in get_args(kind)
    return len(get_args(kind)) if fixed and len(place) <= 2 else 0
