"""From any table to one with the schema's columns: names mapped, every number checked, units doubted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import BadInput, unknown_name
from workbench.scaling.formulas.formula import Graph, parse
from workbench.scaling.formulas.program import Program
from workbench.scaling.run_tables.schema import SCHEMA, Column

Array = np.ndarray
#: MLflow's SQL stores infinity as the largest double.
INFINITE = 1.797e308
#: Names of the column that says how a run ended, and words of trackers and schedulers for it.
STATUS_NAMES = frozenset(
    f"{whose}{what}" for whose in ("", "run_", "trial_", "job_") for what in ("status", "state")
)
STATUS = {
    **dict.fromkeys(("", "finished", "complete", "completed", "done", "success", "succeeded"), "finished"),
    **dict.fromkeys(("ok", "successful"), "finished"),
    **dict.fromkeys(("running", "waiting", "scheduled", "pending", "preempting", "preempted"), "unfinished"),
    **dict.fromkeys(("unfinished", "paused", "queued"), "unfinished"),
    **dict.fromkeys(("fail", "failed", "error", "errored", "node_fail", "boot_fail"), "failed"),
    **dict.fromkeys(("oom", "out_of_memory", "out of memory"), "failed"),
    **dict.fromkeys(("killed", "canceled", "cancelled", "stopped", "aborted", "interrupted"), "killed"),
    **dict.fromkeys(("timeout", "timed out", "timed_out", "deadline", "revoked"), "killed"),
    **{word: word for word in ("crashed", "pruned", "diverged")},
}


def checked_runs(
    table: Any, columns: str | Mapping[str, str] | None, target: str
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """(finished runs with the schema's names and numbers, runs that did not end well, notes)."""
    notes: list[str] = []
    frame = _rename(_framed(table), mapping(columns), notes).reset_index(drop=True)
    frame, left_out = _drop(frame, target, notes)
    for column in [c for c in frame if c in SCHEMA]:
        frame[column] = _checked(frame[column], SCHEMA[column], str(column))
    frame = frame.reset_index(drop=True)
    _fill(frame, notes)
    _plausible(frame, notes)
    return frame, left_out, notes


def checked_points(table: Any, columns: str | Mapping[str, str] | None = None) -> pd.DataFrame:
    """Runs that have not been made: names as in a run table, every number checked, compute filled."""
    notes: list[str] = []
    frame = _rename(_framed(table), mapping(columns), notes).reset_index(drop=True)
    for column in [c for c in frame if c in SCHEMA]:
        frame[column] = _checked(frame[column], SCHEMA[column], str(column))
    _fill(frame, notes)
    return frame


def _framed(table: Any) -> pd.DataFrame:
    """Any table as a frame: one name a column, cells that can be compared."""
    try:
        frame = (
            table.copy()
            if isinstance(table, pd.DataFrame)
            else pd.DataFrame({k: np.asarray(v) for k, v in dict(table).items()})
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"runs: not a table ({str(error).splitlines()[0] if str(error) else type(error).__name__}); give "
            "columns of equal length"
        ) from None
    if not len(frame):
        raise BadInput("runs: the table has no rows")
    frame.columns = pd.Index([str(c) for c in frame.columns])
    double = frame.columns[frame.columns.duplicated()]
    if len(double):
        raise BadInput(f"runs: two columns are called {double[0]!r}; rename one")
    for column in frame.select_dtypes(exclude=["number", "bool"]):
        frame[column] = frame[column].map(_cell).astype(object)
    return frame


def _cell(value: Any) -> Any:
    """A cell as a number, a text or nothing; whatever else a file holds becomes text."""
    if value is None or isinstance(value, str | bool | float):
        return value
    if isinstance(value, int):
        return float(value) if abs(value) < 2**1000 else np.inf * (1 if value > 0 else -1)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if value is pd.NaT or value is pd.NA:
        return None
    return json.dumps(value, default=str) if isinstance(value, list | dict | tuple) else str(value)


def mapping(text: str | Mapping[str, str] | None) -> dict[str, str]:
    """``"params=Model Size, tokens=D*1e9"`` -> ``{"params": "Model Size", "tokens": "D*1e9"}``."""
    if text is None or isinstance(text, Mapping):
        return dict(text or {})
    result: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, sign, value = part.partition("=")
        if not sign or not name.strip() or not value.strip():
            raise BadInput(
                f"columns: {part!r} is not accepted, write 'params=Model Size, "
                "tokens=D*1e9' (our name = your column or a formula of columns)"
            )
        result[name.strip()] = value.strip()
    return result


def _rename(frame: pd.DataFrame, wanted: dict[str, str], notes: list[str]) -> pd.DataFrame:
    unknown = [n for n in wanted if n not in SCHEMA]
    if unknown:
        raise unknown_name("columns", unknown[0], SCHEMA)
    made: dict[Any, Any] = {}
    for name, source in wanted.items():
        made[name] = frame[source] if source in frame else _formula(frame, name, source)
    lower = {str(c).strip().lower(): c for c in reversed(list(frame.columns))}
    used = set(wanted.values())
    for name, column in SCHEMA.items():
        if name in made or name in frame:
            continue
        for other in column.other_names:
            if other in lower and lower[other] not in used:
                made[name] = frame[lower[other]]
                used.add(lower[other])
                notes.append(f"{name} read from column {lower[other]!r}")
                break
    rest = {c: frame[c] for c in frame if c not in made and c not in used}
    return pd.DataFrame({**made, **rest})


def _formula(frame: pd.DataFrame, name: str, text: str) -> pd.Series:
    graph = Graph()
    known = [str(c) for c in frame if str(c).isidentifier()]
    try:
        node = parse(text, graph, known)
    except BadInput as error:
        raise BadInput(
            f"columns: {name}={text!r} is neither a column ({', '.join(map(str, frame))}) nor a formula of "
            f"columns: {error}"
        ) from None
    if graph.parameters_in(node):
        raise BadInput(
            f"columns: {name}={text!r} names {', '.join(sorted(graph.parameters_in(node)))}, "
            f"not among the columns {', '.join(map(str, frame))}"
        )
    data = {
        c: _checked(frame[c], Column("", low=-np.inf, strict=False), c).to_numpy()
        for c in graph.columns_in(node)
    }
    value = Program(graph, [node], []).bind(data)(np.zeros((1, 0)))[0]
    return pd.Series(np.broadcast_to(value, (1, len(frame)))[0], index=frame.index)


def _tells_the_end(column: Any) -> bool:
    return re.sub(r"[\s./-]+", "_", str(column).strip()).lower() in STATUS_NAMES


def _status(frame: pd.DataFrame, notes: list[str]) -> pd.Series:
    """How each run ended, by a column such as `status` that has words for that. A word that is not known
    beside some that are stands for itself, and for no good end.
    """
    for column in frame:
        if _tells_the_end(column):
            words = frame[column].map(lambda v: "" if v is None or v != v else str(v).strip().lower()[:40])
            words = words.str.removeprefix("trialstate.")
            known = words.isin(STATUS)
            if not (known & (words != "")).any():
                continue
            if not known.all():
                strange = ", ".join(sorted(set(words[~known]))[:4])
                notes.append(
                    f"warning: {column}: {strange} is no known word for how a run ends; such runs are "
                    "left out (write finished, or rename the column)"
                )
            return words.map(STATUS).where(known, words)
    return pd.Series(["finished"] * len(frame), index=frame.index, dtype=object)


def _drop(frame: pd.DataFrame, target: str, notes: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows to fit, rows left out with a status)."""
    status = _status(frame, notes)
    ended = status != "finished"
    if target in frame:
        loss = pd.to_numeric(frame[target], errors="coerce").astype(np.float64)
        loss = loss.mask(loss >= INFINITE, np.inf).mask(loss <= -INFINITE, -np.inf)
        empty = frame[target].isna() | (loss.notna() & ~np.isfinite(loss))
        if (empty | ended).all():
            words = ", ".join(f"{n} {w}" for w, n in status[ended].value_counts().items())
            raise BadInput(
                f"{target}: no row has a finite value{f' and a good end ({words})' if words else ''}"
            )
        silent = empty & ~ended
        status = status.mask(silent & ~frame[target].isna(), "diverged")
        status = status.mask(silent & frame[target].isna(), "unfinished or diverged")
        if silent.any():
            notes.append(
                f"warning: {int(silent.sum())} rows without a finite {target} dropped (unfinished or "
                f"diverged): rows {_list(np.flatnonzero(silent))}"
            )
    if ended.any():
        parts = [
            f"{int((status[ended] == w).sum())} {w} (rows {_list(np.flatnonzero(ended & (status == w)))})"
            for w in status[ended].unique()
        ]
        notes.append(f"warning: {int(ended.sum())} of {len(frame)} runs did not finish: {', '.join(parts)}")
    out = status != "finished"
    kept = [c for c in frame if not _tells_the_end(c)] if ended.any() else list(frame)
    left_out = frame.loc[out, [c for c in kept if c != "status"]].assign(status=status[out])
    frame = frame.loc[~out, kept]
    double = frame.duplicated()
    if double.any():
        notes.append(
            f"warning: {int(double.sum())} exact duplicate rows dropped: rows {_list(np.flatnonzero(double))}"
        )
        frame = frame[~double]
    return frame, left_out.reset_index(drop=True)


def _list(rows: Array) -> str:
    return ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")


def _checked(series: pd.Series, column: Column, name: str) -> pd.Series:
    numbers = pd.to_numeric(series, errors="coerce")
    text = numbers.isna() & series.notna()
    if text.any():
        row = int(np.flatnonzero(text)[0])
        raise BadInput(
            f"{name}: row {series.index[row]} is {series.iloc[row]!r}, expected "
            f"{column.accepted}{f' ({column.unit})' if column.unit else ''}"
        )
    values = numbers.to_numpy(dtype=np.float64)
    bad = column.bad(values)
    if bad.any():
        row = series.index[int(np.flatnonzero(bad)[0])]
        raise BadInput(
            f"{name}: row {row} is {numbers[row]}, expected "
            f"{column.accepted}{f' ({column.unit})' if column.unit else ''}; "
            "correct or drop the row"
        )
    return pd.Series(values, index=series.index)


def _fill(frame: pd.DataFrame, notes: list[str]) -> None:
    if "flops" not in frame and {"params", "tokens"} <= set(frame):
        frame["flops"] = 6.0 * frame.params * frame.tokens
        notes.append("flops filled with 6 x params x tokens")
    elif "tokens" not in frame and {"params", "flops"} <= set(frame):
        frame["tokens"] = frame.flops / (6.0 * frame.params)
        notes.append("tokens filled with flops / (6 x params)")
    elif "params" not in frame and {"tokens", "flops"} <= set(frame):
        frame["params"] = frame.flops / (6.0 * frame.tokens)
        notes.append("params filled with flops / (6 x tokens)")


def _plausible(frame: pd.DataFrame, notes: list[str]) -> None:
    """Units that cannot be right are said, not silently fitted."""
    for name, small in (("params", 1000.0), ("tokens", 1000.0)):
        if name in frame and frame[name].max() < small:
            notes.append(
                f"warning: {name} is at most {frame[name].max():g}: "
                f"in millions or billions? the schema counts {SCHEMA[name].unit} one by one; "
                f"map it with columns='{name}={name}*1e6' (or 1e9)"
            )
    if {"params", "tokens", "flops"} <= set(frame):
        ratio = frame.flops / (6.0 * frame.params * frame.tokens)
        if not 0.1 < ratio.median() < 10:
            notes.append(
                f"warning: flops are {ratio.median():.3g} times 6 x params x tokens in the median: "
                "one of the three has another unit"
            )
    if "loss" in frame and frame.loss.median() > 20:
        notes.append(
            f"warning: loss has median {frame.loss.median():.3g}: "
            "a perplexity? the schema wants nats per token, map it with columns='loss=log(loss)'"
        )
    if "params" in frame and frame.params.nunique() == 1 and len(frame) > 1:
        notes.append(
            f"warning: every run has {frame.params.iloc[0]:.4g} params: "
            "nothing can be learned about model size"
        )
