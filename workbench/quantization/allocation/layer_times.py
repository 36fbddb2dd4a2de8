"""Measured times of layers at each width, as a table on disk holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from workbench.errors import BadInput
from workbench.values import number_of


class Named(Protocol):
    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class LayerName:
    """A layer of which no more than the name is at hand."""

    name: str


def layer_times(path: str | Path, layers: Sequence[Named], widths: Sequence[int]) -> NDArray[np.float64]:
    """(layers, widths) milliseconds from a CSV with columns layer (a glob; the last row that matches wins),
    width and milliseconds.

    `BadInput` when the file cannot be read, lacks a column, holds a time that is not positive,
    or leaves a layer and width out.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError, OverflowError) as error:
        raise BadInput(f"times: {path} cannot be read as CSV ({error})") from None
    if missing := {"layer", "width", "milliseconds"} - set(table.columns):
        raise BadInput(
            f"times: {path} lacks the columns {', '.join(sorted(missing))}; "
            f"it has {', '.join(map(str, table.columns))}"
        )
    values = np.array([number(text) for text in table["milliseconds"]], dtype=np.float64)
    good = np.isfinite(values) & (values > 0)
    if not good.all():
        raise BadInput(
            f"times: {path} holds milliseconds that are not positive numbers, "
            f"the first in line {int(np.argmin(good)) + 2}"
        )
    found = np.full((len(layers), len(widths)), np.nan)
    for glob, width, value in zip(table["layer"], map(number, table["width"]), values, strict=True):
        for i, layer in enumerate(layers):
            if width in widths and fnmatchcase(layer.name, glob.strip()):
                found[i, list(widths).index(int(width))] = value
    if len(gaps := np.argwhere(np.isnan(found))):
        raise BadInput(
            f"times: {path} has no time of {layers[gaps[0][0]].name} at width {widths[gaps[0][1]]}; "
            f"every layer needs one at each of {list(widths)}"
        )
    return found


def number(text: str) -> float:
    """The number a cell writes; NaN for anything else."""
    found = number_of(text.strip(), "times")
    return float("nan") if found is None else float(found)
