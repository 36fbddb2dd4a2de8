"""What is said to somebody who asked for something that cannot be done."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import BaseModel, ValidationError


class BadInput(ValueError):
    """The user asked for something that cannot be done; one line names the field, the value,
    what is accepted and the fix.
    """


def unknown_name(field: str, name: object, known: Iterable[str]) -> BadInput:
    """The error for a name that is not there, with the nearest that is."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return BadInput(f"{field}: {name!r} is unknown; {hint}known: {', '.join(names)}")


def describe(error: ValidationError, cls: type[BaseModel]) -> str:
    """A pydantic error as one line: field, value, what would be accepted."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or cls.__name__
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(field, cls.model_fields, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            lines.append(f"{field}: unknown field{hint} (fields: {', '.join(cls.model_fields)})")
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            shown = "" if item["type"] == "missing" else f"{item['input']!r} is not accepted, it should be "
            if item["type"] == "value_error":
                shown = ""
            lines.append(f"{field}: {shown}{message}")
    return "; ".join(lines)
