"""Points that a law is asked about, in words: a cell, a region, or a pool of runs that could be made.

>>> cells("params=7e9, tokens=1.4e11").to_dict("records")
[{'params': 7000000000.0, 'tokens': 140000000000.0, 'flops': 5.88e+21}]
>>> len(cells("params=1e7:1e9:5, tokens=1e9:1e11:4"))
20
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import BadInput, unknown_name
from workbench.scaling.run_tables.checks import checked_points
from workbench.scaling.run_tables.readers import read
from workbench.scaling.run_tables.schema import SCHEMA

Array = np.ndarray
#: More points than this are no pool that somebody means.
MOST = 100_000


def cells(text: str, field: str = "cells") -> pd.DataFrame:
    """The grid of columns written as 'params=1e7:1e9:5, tokens=2e9': one value, or from:to:how many, evenly
    spaced in the logarithm; `flops` is 6 x params x tokens unless it is given.

    BadInput that names `field` and the part that cannot be read.
    """
    axes: dict[str, Array] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, sign, values = (p.strip() for p in part.partition("="))
        if not sign or not name or not values:
            raise BadInput(f"{field}: {part!r} is not accepted, write 'params=1e7:1e9:5, tokens=2e9'")
        if name not in SCHEMA:
            raise unknown_name(field, name, SCHEMA)
        if name in axes:
            raise BadInput(f"{field}: {name} is given twice; write its values once, as from:to:how many")
        axes[name] = _values(values, part, field)
    if not axes:
        raise BadInput(f"{field}: is empty; write 'params=1e7:1e9:5, tokens=2e9'")
    count = int(np.prod([float(len(v)) for v in axes.values()]))
    if count > MOST:
        raise BadInput(f"{field}: {count:,} cells, at most {MOST:,} are accepted; take fewer values a column")
    return points(pd.DataFrame(list(itertools.product(*axes.values())), columns=list(axes)), field)


def _values(text: str, part: str, field: str) -> Array:
    pieces = text.split(":")
    try:
        numbers = [float(p) for p in pieces]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 3) or not np.isfinite(numbers).all():
        raise BadInput(f"{field}: {part!r} is not accepted; give a number, or from:to:how many (1e7:1e9:5)")
    if len(numbers) == 1:
        return np.array(numbers)
    low, high, count = numbers
    if count != int(count) or count < 2 or not 0 < low < high:
        raise BadInput(
            f"{field}: {part!r} is not accepted; from:to:how many needs 0 < from < to and a whole number "
            "of at least 2"
        )
    return np.geomspace(low, high, int(count))


def points(given: Any, field: str, columns: str | Mapping[str, str] | None = None) -> pd.DataFrame:
    """Points from words (`cells`), a file, a DataFrame or a mapping of columns; names as in a run table.

    BadInput for an unreadable file, no rows, or a number that its column does not accept.
    """
    if isinstance(given, str) and "=" in given and not Path(given).is_file():
        return cells(given, field)
    try:
        table = read(given) if isinstance(given, str | Path) else given
        return checked_points(table, columns)
    except BadInput as error:
        raise BadInput(f"{field}: {str(error).removeprefix('runs: ')}") from None
