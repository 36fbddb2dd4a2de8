"""Runs: a table of finished training runs with fixed column names and units,
checked before anything is fitted.

>>> runs = Runs.from_table({"N": [1e7, 1e8], "D": [1e9, 1e9], "val_loss": [4.0, 3.2]})
>>> list(runs.table.columns)
['params', 'tokens', 'loss', 'flops']
>>> runs.table.flops.tolist()
[6e+16, 6e+17]
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import notice
from workbench.scaling.run_tables.checks import checked_runs, mapping
from workbench.scaling.run_tables.readers import read
from workbench.scaling.run_tables.schema import SCHEMA

Array = np.ndarray
OWN_SWEEP = "scaling-sweep"
__all__ = ["OWN_SWEEP", "Runs", "mapping", "shipped", "transformer_flops"]


@dataclass
class Runs:
    """Finished runs. `table`: schema columns plus whatever else came along.
    `notes`: what was assumed, filled or dropped. `left_out`: the rows that did not end well, with a `status`
    (diverged, crashed, failed, killed, pruned, unfinished).
    """

    table: pd.DataFrame
    name: str = "runs"
    notes: list[str] = field(default_factory=list)
    history: list[str] = field(default_factory=list)
    left_out: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"Runs({self.name}: {len(self)} runs, {', '.join(c for c in self.table if c in SCHEMA)})"

    def _repr_html_(self) -> str:
        import html

        notes = "".join(f"<li>{html.escape(n)}</li>" for n in self.notes)
        table = self.table.head(20).to_html(index=False, border=0)
        return f"<p>{html.escape(repr(self))}</p><ul>{notes}</ul>{table}"

    @property
    def fingerprint(self) -> str:
        """Hash of the numbers: the same runs give the same cached results."""
        numeric = self.table.select_dtypes("number")
        text = (
            ",".join(map(str, numeric.columns)).encode()
            + np.ascontiguousarray(numeric.to_numpy(dtype=np.float64)).tobytes()
        )
        return "runs-" + hashlib.sha256(text).hexdigest()[:20]

    @property
    def data_note(self) -> str:
        return "; ".join(self.notes)

    def where(self, keep: Array, note: str = "") -> Runs:
        """The rows selected by a boolean mask, index reset."""
        return Runs(
            self.table[np.asarray(keep)].reset_index(drop=True),
            self.name,
            [*self.notes, *([note] if note else [])],
            self.history,
            self.left_out,
        )

    @classmethod
    def open(cls, source: Any, columns: str | Mapping[str, str] | None = None, **reader: Any) -> Runs:
        """Runs from a file (CSV, Parquet, JSON lines, W&B or TensorBoard export, MLflow or Optuna SQLite),
        a DataFrame or a mapping.

        The project's own tables are found from anywhere: "scaling-sweep" (byte-level models of 20 thousand to
        half a million parameters), "training-lr-batch", and "drawn/LAW" for laws that need further columns.
        """
        if isinstance(source, Runs):
            return source
        if isinstance(source, str):
            source = shipped(source) or source
        if isinstance(source, str | Path):
            return cls.from_table(read(source, **reader), columns, name=Path(source).name)
        return cls.from_table(source, columns)

    @classmethod
    def from_table(
        cls,
        table: Any,
        columns: str | Mapping[str, str] | None = None,
        name: str = "runs",
        target: str = "loss",
    ) -> Runs:
        """Map names, check every number, fill `flops`. See :func:`mapping` for `columns`.

        Rows that did not end well (by a status column or without a finite loss) go to `left_out`, exact
        duplicates are dropped, both with a warning. BadInput names row and column of anything else.
        """
        frame, left_out, notes = checked_runs(table, columns, target)
        for note in notes:
            if note.startswith("warning: "):
                notice(note.removeprefix("warning: "))
        return cls(frame, name, notes, left_out=left_out)


def shipped(name: str) -> Path | None:
    """The file of one of the project's own tables, by its name in `data/runs`."""
    from workbench.storage import data_folder

    folder = data_folder() / "runs"
    own = {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for file in (*folder.glob("*.csv"), *folder.glob("drawn/*.csv"))
    }
    return own.get(name) or own.get(name.replace("-", "_"))


def transformer_flops(
    tokens: Array,
    depth: Array,
    width: Array,
    sequence: Array,
    vocabulary: Array,
    feed_forward: Array | None = None,
    gated: bool = True,
    causal: bool = True,
) -> Array:
    """Training FLOPs of a decoder from its shape: 3 x forward, every matrix product counted
    (2 per multiply-add).

    Per token and layer 8 w^2 for attention projections, 4 or 6 w f for the (gated) feed-forward, 4 s w for
    scores and values (half with a causal mask, s being the sequence length); 2 w v for the head.
    Embedding look-ups cost nothing.
    """
    width, depth, sequence = (np.asarray(a, dtype=np.float64) for a in (width, depth, sequence))
    hidden = (
        (8.0 / 3.0 if gated else 4.0) * width
        if feed_forward is None
        else np.asarray(feed_forward, dtype=np.float64)
    )
    layer = (
        8.0 * width**2
        + (6.0 if gated else 4.0) * width * hidden
        + 4.0 * sequence * width * (0.5 if causal else 1.0)
    )
    return (
        3.0
        * np.asarray(tokens, dtype=np.float64)
        * (depth * layer + 2.0 * width * np.asarray(vocabulary, dtype=np.float64))
    )
