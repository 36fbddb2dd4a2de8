"""The contract every study implements: an `Instrument` is a frozen set of parameters, `run` turns it into a `Result`.

    spectrum = curvature.Spectrum(probes=4)          # parameters, validated on construction
    result = spectrum.run(subject)                   # cached under (fields, subject fingerprint, code version)
    result.table, result.summary(), result.figure(), result.save("folder")

Fields are the only place where a parameter is declared: controls, command-line options, papermill parameters,
validation messages and documentation are derived from them (see `Instrument.parameters`).
"""

from __future__ import annotations

import functools
import hashlib
import html
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined

from workbench.progress import Progress, TextProgress, interrupt_stops
from workbench.storage import cache_folder, replacing

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.subjects import Subject

NOT_COMPUTING = (
    "reports.py",
    "export_html.py",
    "cli.py",
    "figures.py",
    "studies.py",
    "overview.py",
    "cards.py",
    "registry.py",
)
FAMILIES = ("curvature", "pruning", "quantization", "latency", "training", "scaling")


class BadInput(ValueError):
    """The user asked for something that cannot be done; one line names the field, the value, what is accepted and the fix."""


def parameter(
    default: Any = PydanticUndefined,
    help: str = "",
    *,
    unit: str = "",
    scale: Literal["linear", "log"] = "linear",
    step: float | None = None,
    **bounds: Any,
) -> Any:
    """One field of an instrument. `bounds` are pydantic's `ge`, `gt`, `le`, `lt`, `min_length`, ..."""
    extra: dict[str, Any] = {"unit": unit, "scale": scale, "step": step}
    return Field(default, description=help, json_schema_extra=extra, **bounds)


class Instrument(BaseModel):
    """A study with parameters. Subclass, declare fields with `parameter(...)`, implement `_run(on, progress) -> Result`.

    `_run` gets a Subject (or Runs, as `on` declares) already on the right device with a private copy of its model when
    `changes_model` is True, and returns `self.result(...)`; everything else (cache, provenance, seed, stop) is done here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    on: ClassVar[Literal["subject", "runs"]] = "subject"
    changes_model: ClassVar[bool] = False
    cached: ClassVar[bool] = True
    summary_line: ClassVar[str] = ""

    seed: int = parameter(0, "seed of every random choice", ge=0)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise BadInput(describe(error, type(self))) from None

    @classmethod
    def name(cls) -> str:
        """The command-line name: the class name in lower-kebab case (`TopEigenvalues` -> `top-eigenvalues`)."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """Field name -> pydantic FieldInfo, in declaration order, shared fields last."""
        own = {k: v for k, v in cls.model_fields.items() if k not in ("seed", "device")}
        return own | {k: cls.model_fields[k] for k in ("device", "seed") if k in cls.model_fields}

    @classmethod
    def result_class(cls) -> type[Result]:
        """The Result subclass that knows how to draw this instrument's results."""
        return Result

    def check(self, on: Any) -> None:
        """Raise `BadInput` for anything that can be seen to fail before the computation starts."""

    def _run(self, on: Any, progress: Progress) -> Result:
        raise TypeError(f"{type(self).__name__} has no _run")

    def result(self, table: pd.DataFrame, facts: dict[str, Any] | None = None, **more: Any) -> Result:
        return self.result_class()(instrument=self, table=table, facts=facts or {}, **more)

    def run(self, on: Any, progress: Progress | None = None, cache: bool = True) -> Result:
        """Run on a Subject (or Runs). The same fields on the same subject with the same code come from the cache."""
        progress = progress or TextProgress()
        key = self.key(on)
        slot = cache_folder() / "results" / key
        if (
            cache and self.cached and (slot / "result.json").exists()
        ):  # checked when it was stored; checking may compute a derived model
            result = Result.load(slot, open_subject=False)
            if self.changes_model:
                result.subject = on.derived(self, key, lambda: self.run(on, cache=False).subject)
            return result
        self.check(on)
        result = self._measure(on, progress, key)
        if cache and self.cached and not result.partial:
            result.save(slot, with_subject=False)
        return result

    def stored(self, on: Any) -> bool:
        """True when this exact run is in the cache."""
        return self.cached and (cache_folder() / "results" / self.key(on) / "result.json").exists()

    def _measure(self, on: Any, progress: Progress, key: str) -> Result:
        import torch

        prepared = (
            on.prepared(getattr(self, "device", "auto"), copy=self.changes_model)
            if hasattr(on, "prepared")
            else on
        )
        torch.manual_seed(self.seed)
        np.random.seed(self.seed)
        began = time.perf_counter()
        with interrupt_stops(progress):
            result = self._run(prepared, progress)
        if isinstance(progress, TextProgress):
            progress.close()
        result.partial = result.partial or progress.partial
        result.provenance = provenance(on, time.perf_counter() - began) | {"key": key}
        if self.changes_model:
            assert result.subject is not None, f"{self.name()} declares changes_model and returned no subject"
            result.subject.adopt(parent=on, instrument=self, fingerprint=None if result.partial else key)
        return result

    def key(self, on: Any) -> str:
        """Hash of fields, subject fingerprint and code version: the name of this run."""
        device = on.resolve_device(getattr(self, "device", "auto")) if hasattr(on, "resolve_device") else ""
        text = json.dumps(
            [self.name(), self.model_dump(mode="json"), on.fingerprint, str(device), code_version()],
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def with_fields(self, **fields: Any) -> Instrument:
        """A copy with some fields changed, validated."""
        return type(self)(**(self.model_dump() | fields))


class SubjectInstrument(Instrument):
    """An instrument that computes on a model, so it also has a device."""

    device: str = parameter(
        "auto",
        "where to compute: auto (the best present), cpu, cuda or cuda:N",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
    )


def describe(error: ValidationError, cls: type[BaseModel]) -> str:
    """A pydantic error as one line: field, value, what would be accepted."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or cls.__name__
        if item["type"] == "extra_forbidden":
            import difflib

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


@functools.lru_cache(1)
def code_version() -> str:
    """Hash of the package's own source: a changed routine never answers from an old result."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for file in sorted(root.rglob("*.py")):
        if file.name not in NOT_COMPUTING:
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def provenance(on: Any, seconds: float) -> dict[str, Any]:
    """Who made this, from what, with which versions."""
    import platform

    import torch
    import transformers

    from workbench import __version__

    return {
        "on": getattr(on, "name", type(on).__name__),
        "fingerprint": on.fingerprint,
        "data": getattr(on, "data_note", ""),
        "history": list(getattr(on, "history", [])),
        "versions": {
            "workbench": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "code": code_version(),
        "seconds": round(seconds, 3),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@dataclass(eq=False)
class Result:
    """What a run returned: a tidy `table`, one-line `facts`, further `tables` and `arrays`, provenance, and a figure.

    Subclasses override `figure(**view)` (pure: draws, never computes anew) and `view_model()` (what the viewer may change
    without running again). A result of an instrument that changes a model has `.subject`.
    """

    instrument: Instrument
    table: pd.DataFrame
    facts: dict[str, Any]
    tables: dict[str, pd.DataFrame] | None = None
    arrays: dict[str, np.ndarray] | None = None
    provenance: dict[str, Any] | None = None
    partial: bool = False
    subject: Subject | None = None

    def __post_init__(self) -> None:
        self.tables = self.tables or {}
        self.arrays = self.arrays or {}
        self.provenance = self.provenance or {}

    def figure(self, **view: Any) -> go.Figure:
        """The plot of this result; `view` holds settings declared by `view_model`."""
        from workbench.figures import table_figure

        return table_figure(self.table, title=type(self.instrument).__name__)

    def view_model(self) -> type[BaseModel] | None:
        """Settings of `figure(**view)` as a pydantic model (choices may depend on this result); a panel makes controls of them."""
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
        """Write Parquet + JSON + safetensors to `folder` (made by renaming a finished draft); never pickle."""
        from safetensors.numpy import save_file

        folder = Path(folder)
        with replacing(folder) as draft:
            draft.mkdir()
            if with_subject and self.subject is not None:
                self.subject.save_into(draft)
            self.table.to_parquet(draft / "table.parquet")
            for name, table in (self.tables or {}).items():
                table.to_parquet(draft / f"table.{name}.parquet")
            if self.arrays:
                save_file(
                    {k: np.ascontiguousarray(v) for k, v in self.arrays.items()}, draft / "arrays.safetensors"
                )
            content = {
                "instrument": self.instrument.name(),
                "fields": self.instrument.model_dump(mode="json"),
                "facts": self.facts,
                "tables": sorted(self.tables or {}),
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
                f"folder: {str(folder)!r} holds no saved result (no result.json); give a folder written by Result.save"
            )
        content = json.loads((folder / "result.json").read_text())
        instrument = find(content["instrument"])(**content["fields"])
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
            from workbench.subjects import subject

            result.subject = subject(folder)
        return result


def plain(value: Any) -> Any:
    """JSON for numpy scalars, arrays and paths."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return str(value)


def format_fact(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


@functools.lru_cache(1)
def import_families() -> None:
    """Import every family that is there; importing registers its instruments and changes."""
    for family in FAMILIES:
        if importlib.util.find_spec(f"workbench.{family}") is not None:
            importlib.import_module(f"workbench.{family}")


def catalog() -> dict[str, type[Instrument]]:
    """Every instrument by command-line name, those a user's own code defines included."""
    import_families()
    found: dict[str, type[Instrument]] = {}

    def walk(cls: type[Instrument]) -> None:
        for sub in cls.__subclasses__():
            if "_run" in vars(sub):
                found[sub.name()] = sub
            walk(sub)

    walk(Instrument)
    return dict(sorted(found.items()))


def find(name: str) -> type[Instrument]:
    """The instrument class called `name` on the command line."""
    import difflib

    known = catalog()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise BadInput(f"instrument: {name!r} is unknown; {hint}known: {', '.join(known)}")
    return known[name]


@dataclass(frozen=True)
class Method:
    """A catalog card: a named, published technique, what it needs and the evidence measured for it here."""

    name: str
    family: str
    title: str
    source: str  # authors, year
    formula: str  # plain text or LaTeX
    needs: str  # data, gradients, retraining
    claim: str  # what the source says, checkable here
    row: int | None = None  # the technique list's number
    measure: Callable[..., dict[str, Any]] | None = None  # (name, progress) -> evidence record

    def evidence(self) -> dict[str, Any] | None:
        """The stored measurement (`data/evidence/FAMILY/NAME.json`), or None when nothing was measured yet."""
        from workbench.subjects.builtin import data_folder

        file = data_folder() / "evidence" / self.family / f"{self.name}.json"
        return json.loads(file.read_text()) if file.exists() else None


@functools.lru_cache(1)
def methods() -> dict[str, Method]:
    """Every method card by name; each family lists its own in `workbench.FAMILY.cards.CARDS`."""
    cards: dict[str, Method] = {}
    for family in FAMILIES:
        try:
            found = importlib.util.find_spec(f"workbench.evidence.{family}.cards")
        except ModuleNotFoundError:
            found = None
        if found is not None:
            for card in importlib.import_module(f"workbench.evidence.{family}.cards").CARDS:
                cards[card.name] = card
    return cards
