"""Fields as people write them: bounds, values, the first paragraph of a docstring."""

from __future__ import annotations

import re
from typing import Any


def shown(value: Any) -> str:
    """A value as it would be typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(shown(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def bounds_text(info: Any) -> str:
    """0 <= x < 1, x > 0, x >= 1: the bounds of a number; at least 2: a list's length;
    gradient or random: the words that a text may be.
    """
    low = high = ""
    more = []
    for rule in info.metadata:
        for name, sign in (("ge", "<="), ("gt", "<")):
            if (bound := getattr(rule, name, None)) is not None:
                low = f"{shown(bound)} {sign} x"
        for name, sign in (("le", "<="), ("lt", "<")):
            if (bound := getattr(rule, name, None)) is not None:
                high = f"{sign} {shown(bound)}"
        if (length := getattr(rule, "min_length", None)) is not None and info.annotation is not str:
            more.append(f"at least {length}")
        if (step := getattr(rule, "multiple_of", None)) is not None:
            more.append(f"a multiple of {shown(step)}")
        if words := words_of(getattr(rule, "pattern", None) or ""):
            more.append(" or ".join(words))
    if low and high:
        return "; ".join([f"{low} {high}", *more])
    if low:
        bound, sign, _ = low.split()
        more.insert(0, f"x {'>=' if sign == '<=' else '>'} {bound}")
    if high:
        more.insert(0, f"x {high}")
    return "; ".join(more)


def words_of(pattern: str) -> list[str]:
    """The words that `^(gradient|random)$` accepts; none for a pattern that is no list of words."""
    found = re.fullmatch(r"\^\(([\w|-]+)\)\$", pattern)
    return found[1].split("|") if found else []


def paragraph(cls: type) -> str:
    """The first paragraph of a class's docstring on one line."""
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())
