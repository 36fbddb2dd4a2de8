"""What a run returned: tables, facts, arrays, provenance, a figure."""

from __future__ import annotations

import html
import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import pandas as pd
from pydantic import BaseModel

from workbench.errors import BadInput
from workbench.storage import replacing

if TYPE_CHECKING:
    import plotly.graph_objects as go


class Asked(Protocol):
    """The instrument of a result, as far as the result and what draws it know it."""

    @classmethod
    def name(cls) -> str: ...

    def model_dump(self, *, mode: str = ...) -> dict[str, Any]: ...

    def run(self, on: Any, progress: Any = None, cache: bool = True) -> Any: ...


@dataclass(eq=False)
class Result:
    """What a run returned: a tidy `table`, one-line `facts`, further `tables` and `arrays`, provenance,
    and a figure.

    Subclasses override `figure(**view)` (pure: draws, never computes anew) and `view_model()` (what
    the viewer may change without running again). A result of an instrument that changes a model has
    `.subject`.
    """

    #: what `load` opens a stored result with; set by `workbench.names` and `workbench.subjects`,
    #: which are above results
    finds: ClassVar[Callable[[str], Any]]
    opens: ClassVar[Callable[[Path], Any]]

    instrument: Asked
    table: pd.DataFrame
    facts: dict[str, Any]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    partial: bool = False
    subject: Any = None  # a `Subject`, of an instrument that changes the model; subjects are above results

    def figure(self, **view: Any) -> go.Figure:
        """The plot of this result; `view` holds settings declared by `view_model`."""
        from workbench.figures import table_figure

        return table_figure(self.table, title=type(self.instrument).__name__)

    def view_model(self) -> type[BaseModel] | None:
        """Settings of `figure(**view)` as a pydantic model (choices may depend on this result);
        a panel makes controls of them.
        """
        return None

    def summary(self) -> str:
        """One line: the facts a reader wants first."""
        shown = ", ".join(
            f"{k.replace('_', ' ')} {format_fact(v)}"
            for k, v in self.facts.items()
            if not isinstance(v, (dict, list))
        )
        note = " (partial: stopped early)" if self.partial else ""
        return f"{self.instrument.name()}{note}: {shown}"

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        rows = self.table.head(60).to_html(
            index=False, border=0, float_format=lambda v: f"{v:.5g}", escape=True
        )
        more = f"<p>{len(self.table) - 60} more rows</p>" if len(self.table) > 60 else ""
        return f"<p>{html.escape(self.summary())}</p>{rows}{more}"

    def save(self, folder: str | os.PathLike[str], with_subject: bool = True) -> Path:
        """Write Parquet + JSON + safetensors to `folder` (made by renaming a finished draft);
        never pickle.
        """
        from safetensors.numpy import save_file

        folder = Path(folder)
        with replacing(folder) as draft:
            draft.mkdir()
            if with_subject and self.subject is not None:
                self.subject.save_into(draft)
            self.table.to_parquet(draft / "table.parquet")
            for name, table in self.tables.items():
                table.to_parquet(draft / f"table.{name}.parquet")
            if self.arrays:
                save_file(
                    {k: np.ascontiguousarray(v) for k, v in self.arrays.items()}, draft / "arrays.safetensors"
                )
            content = {
                "instrument": self.instrument.name(),
                "fields": self.instrument.model_dump(mode="json"),
                "facts": self.facts,
                "tables": sorted(self.tables),
                "provenance": self.provenance,
                "partial": self.partial,
            }
            (draft / "result.json").write_text(json.dumps(content, indent=1, default=plain))
        return folder

    @staticmethod
    def load(folder: str | os.PathLike[str], open_subject: bool = True) -> Result:
        """Read a saved result; `BadInput` when the folder holds none."""
        from safetensors.numpy import load_file

        folder = Path(folder)
        if not (folder / "result.json").is_file():
            raise BadInput(
                f"folder: {str(folder)!r} holds no saved result (no result.json); "
                "give a folder written by Result.save"
            )
        content = json.loads((folder / "result.json").read_text())
        for above in ("workbench.names", "workbench.subjects"):
            importlib.import_module(above)
        instrument = Result.finds(content["instrument"])(**content["fields"])
        arrays = load_file(folder / "arrays.safetensors") if (folder / "arrays.safetensors").exists() else {}
        result = instrument.result(
            pd.read_parquet(folder / "table.parquet"),
            content["facts"],
            tables={name: pd.read_parquet(folder / f"table.{name}.parquet") for name in content["tables"]},
            arrays=arrays,
            provenance=content["provenance"],
            partial=content["partial"],
        )
        if open_subject and (folder / "workbench.json").exists():
            result.subject = Result.opens(folder)
        return result


def plain(value: Any) -> Any:
    """JSON for numpy scalars, arrays and paths."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return str(value)


def format_fact(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
