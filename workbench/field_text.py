"""Fields as people write them: bounds, values, the first paragraph of a docstring."""

from __future__ import annotations

from typing import Any


def shown(value: Any) -> str:
    """A value as it would be typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(shown(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def bounds_text(info: Any) -> str:
    """0 <= x < 1, x > 0, x >= 1: the bounds of a number; at least two items for a list's length."""
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
    if low and high:
        return "; ".join([f"{low} {high}", *more])
    if low:
        bound, sign, _ = low.split()
        more.insert(0, f"x {'>=' if sign == '<=' else '>'} {bound}")
    if high:
        more.insert(0, f"x {high}")
    return "; ".join(more)


def paragraph(cls: type) -> str:
    """The first paragraph of a class's docstring on one line."""
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())
