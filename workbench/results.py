"""What a run returned: tables, facts, arrays, provenance, a figure."""

from __future__ import annotations

import contextlib
import html
import importlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field, create_model

from workbench.errors import BadInput
from workbench.facts import told
from workbench.storage import cache_folder, damage, replacing
from workbench.storage.resident import on_disk
from workbench.storage.writing import READY, place

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
        shown = ", ".join(f"{name} {value}" for name, value in told(self.facts))
        note = " (partial: stopped early)" if self.partial else ""
        return f"{self.instrument.name()}{note}: {shown}"

    def leading(self) -> pd.DataFrame:
        """The rows that a reader wants first, where the table itself is what a figure draws."""
        return self.table

    def calibration(self) -> list[str]:
        """A line for each row of the calibration card."""
        found = self.tables.get("calibration")
        return [] if found is None else [card_line(row) for _, row in found.iterrows()]

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        rows = (
            self.leading()
            .head(60)
            .to_html(index=False, border=0, float_format=lambda v: f"{v:.5g}", escape=True)
        )
        left = len(self.leading()) - 60
        more = f"<p>{left} more rows</p>" if left > 0 else ""
        cards = "".join(f"<p>{html.escape(line)}</p>" for line in self.calibration())
        return f"<p>{html.escape(self.summary())}</p>{rows}{more}{cards}"

    def save(
        self,
        folder: str | os.PathLike[str],
        with_subject: bool = True,
        *,
        overwrite: bool = False,
        told: Callable[[str], Any] | None = None,
    ) -> Path:
        """Write Parquet + JSON + safetensors to `folder`; never pickle. An earlier result there is replaced;
        anything else is refused by name unless `overwrite`.

        told : open the subject again in a fresh process and compare its loss before anything is replaced,
            and say with this what came of it
        """
        if with_subject and self.subject is not None and self.subject.held_back:
            raise BadInput(self.subject.held_back)
        where = on_disk(cache_folder()) if self.provenance.get("in_files") else contextlib.nullcontext()
        with replacing(folder, overwrite=overwrite, field="folder") as draft, where:
            draft.mkdir()
            if with_subject and self.subject is not None:
                self.subject.save_into(draft)
                if told is not None:
                    self.subject.reopened(draft, told)
            self._write(draft)
        return Path(folder)

    def store(self, slot: Path) -> None:
        """Write this result, without weights, to a slot of the cache; a whole one that another process has
        written meanwhile stays.
        """
        with replacing(slot, private=True, first_wins=True, field="cache") as draft:
            draft.mkdir()
            self._write(draft)

    def _write(self, draft: Path) -> None:
        from safetensors.numpy import save_file

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

    @staticmethod
    def load(folder: str | os.PathLike[str], open_subject: bool = True) -> Result:
        """Read a saved result; `BadInput` when the folder holds none, or one that is damaged."""
        folder = place(folder, "folder")
        if not (folder / "result.json").is_file() and not (folder / READY).is_dir():
            raise BadInput(
                f"folder: {str(folder)!r} holds no saved result (no result.json); "
                "give a folder written by Result.save"
            )
        if wrong := damage(folder, but=r"[^/]*model[^/]*|.*\.bin|changes\.safetensors|splits\.safetensors"):
            raise damaged(folder, wrong)
        try:
            result = _read(folder)
        except BadInput:
            raise
        except Exception as error:  # whatever a parser of JSON, Parquet or safetensors makes of other bytes
            raise damaged(folder, " ".join(f"{type(error).__name__}: {error}".split())[:300]) from None
        if open_subject and (folder / "workbench.json").exists():
            result.subject = Result.opens(folder)
        return result


def damaged(folder: Path, reason: str) -> BadInput:
    return BadInput(
        f"folder: the saved result in {str(folder)!r} is damaged: {reason}; run it again, or restore a copy"
    )


def table_in(file: Path) -> pd.DataFrame:
    """A stored table, its texts looked at: Parquet's readers believe that they are UTF-8."""
    import pyarrow.parquet

    pyarrow.parquet.read_table(file).validate(full=True)
    return pd.read_parquet(file)


def _read(folder: Path) -> Result:
    from safetensors.numpy import load_file

    content = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    wanted = {
        "instrument": str,
        "fields": dict,
        "facts": dict,
        "tables": list,
        "provenance": dict,
        "partial": bool,
    }
    for name, kind in wanted.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            raise damaged(folder, f"result.json has no {name!r} that is a {kind.__name__}")
    names = content["tables"]
    if not all(isinstance(n, str) and n and not re.search(r"[/\\\0]", n) for n in names):
        raise damaged(folder, f"{names!r} are no names of tables")
    for above in ("workbench.names", "workbench.subjects"):
        importlib.import_module(above)
    instrument = Result.finds(content["instrument"])(**content["fields"])
    arrays = folder / "arrays.safetensors"
    found: Result = instrument.result(
        table_in(folder / "table.parquet"),
        content["facts"],
        tables={name: table_in(folder / f"table.{name}.parquet") for name in names},
        arrays=load_file(arrays) if arrays.exists() else {},
        provenance=content["provenance"],
        partial=content["partial"],
    )
    with contextlib.suppress(BadInput):  # a partial one may be too empty to be summed up
        found.summary()  # raises where facts are missing
    return found


def plain(value: Any) -> Any:
    """JSON for numpy scalars, arrays and paths."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return str(value)


def card_line(row: pd.Series[Any]) -> str:
    """`calibrated on 128 examples of calibration: 32,768 tokens (256 each, packed; ...), sha256 1f3a...`"""
    told = {name: value for name, value in row.items() if value is not None and value == value}
    line = f"calibrated on {told['examples']:,} examples of {told['split']}"
    if told["decides"] != "weights":
        line = f"{told['decides']} from {told['examples']:,} examples of {told['split']}"
    if "tokens" in told:
        short, long = told["shortest"], told["longest"]
        each = f"{short:,.0f} each" if short == long else f"{short:,.0f} to {long:,.0f} each"
        line += f": {told['tokens']:,.0f} tokens ({', '.join(filter(None, (each, told['layout'])))})"
    names = {"end_of_text": "ends of text", "template": "of the chat template", "other_marks": "other marks"}
    if marks := [f"{told[name]:,.0f} {text}" for name, text in names.items() if told.get(name)]:
        line += f", of these {', '.join(marks)}"
    if "least_share" in told:
        line += f"; experts: {told['unreached']} unreached, least share {100 * told['least_share']:.2g} %"
    source = f"; {told['source']}" if told.get("source") else ""
    return f"{line}; sha256 {told['sha256'][:12]}{source}"


def format_fact(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def choices(name: str, **fields: tuple[str, ...]) -> type[BaseModel]:
    """A pydantic model with one choice a field, the first being the default:
    the view settings of a result.
    """
    return create_model(name, **{k: (Literal[v], Field(v[0], description=k)) for k, v in fields.items()})  # type: ignore[call-overload]
