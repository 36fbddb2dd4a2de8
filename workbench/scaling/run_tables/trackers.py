"""Exports and databases of experiment trackers: one row a run, with a `status` that says how it ended."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import BadInput

#: MLflow's SQL stores infinity as the largest double.
LARGEST = 1.797e308
#: Seconds that reading a database may take: a view can be written that never ends.
PATIENCE = 20.0
#: What a chart is drawn over.
AXIS = re.compile(r"(.*/)?_?(global_?)?(step|epoch)s?|relative time( \(.*\))?|wall time", re.IGNORECASE)


def weights_and_biases(table: pd.DataFrame, written: pd.DataFrame | None = None) -> pd.DataFrame:
    """A Weights & Biases export: the runs table as it is, its State being a status, or a chart's history.

    A chart's CSV has a column of steps (or epochs, or time) and "RUN - METRIC" columns (with __MIN and __MAX
    twins): its last values become one row per run. `written`: the same cells as text, which tells a NaN that
    was logged (the run diverged) from a cell that is empty. Any other table is returned unchanged.
    """
    series = [c for c in table if " - " in str(c) and not str(c).endswith(("__MIN", "__MAX", "_step"))]
    axis = [c for c in table if " - " not in str(c) and AXIS.fullmatch(str(c).strip())]
    if not series or not axis or len(series) < (len(table.columns) - 1) // 3:
        return table
    rows: dict[str, dict[str, object]] = {}
    for column in series:
        run, _, metric = str(column).rpartition(" - ")
        there = (
            written[column].str.strip() != ""
            if written is not None and len(written) == len(table) and column in written
            else table[column].notna()
        )
        row = rows.setdefault(run, {"run": run, "status": "unfinished"})
        if not there.any():
            continue
        at = there[there].index[-1]
        value = pd.to_numeric(pd.Series([table[column][at]]), errors="coerce").iloc[0]
        row[metric] = value
        row["step"] = table[axis[0]][at]
        if row["status"] != "diverged":
            row["status"] = "finished" if np.isfinite(value) else "diverged"
    return pd.DataFrame(rows.values())


def tensorboard_exports(folder: Path) -> pd.DataFrame:
    """A folder of TensorBoard scalar downloads (CSV with Wall time, Step, Value), named run-RUN-tag-TAG.csv.

    One row per run, one column per tag with its last value, and `step`; a run whose last value of a tag is
    not finite diverged.
    """
    rows: dict[str, dict[str, object]] = {}
    for file in sorted(folder.rglob("*.csv"))[:10_000]:
        table = pd.read_csv(file)
        if not {"Step", "Value"} <= set(table) or not len(table):
            continue
        stem = file.stem
        run, _, tag = stem.removeprefix("run-").partition("-tag-")
        if not tag:
            run, tag = file.parent.name, stem
        last = table.sort_values("Step").iloc[-1]
        row = rows.setdefault(run, {"run": run, "step": last["Step"], "status": "finished"})
        row[tag.replace("_", "/", 1) if tag.startswith(("eval_", "val_", "train_")) else tag] = last["Value"]
        if not np.isfinite(pd.to_numeric(last["Value"], errors="coerce")):
            row["status"] = "diverged"
    if not rows:
        raise BadInput(
            f"runs: folder {folder.name!r} holds no TensorBoard scalar CSV (columns Wall time, Step, Value)"
        )
    return pd.DataFrame(rows.values())


def database(path: Path, experiment: str | None = None, study: str | None = None) -> pd.DataFrame:
    """An MLflow or Optuna SQLite database, told apart by its tables; opened read-only."""
    until = time.monotonic() + PATIENCE
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        connection.set_progress_handler(lambda: int(time.monotonic() > until), 100_000)
        tables = {
            name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")
        }
        if {"runs", "params"} <= tables and tables & {"latest_metrics", "metrics"}:
            return _mlflow(connection, tables, experiment)
        if {"studies", "trials", "trial_params"} <= tables:
            return _optuna(connection, tables, study)
    finally:
        connection.close()
    raise BadInput(
        f"runs: {path.name} is neither an MLflow nor an Optuna database (tables: "
        f"{', '.join(sorted(map(str, tables))) or 'none'})"
    )


def _number(value: object) -> object:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return value


def _finite(value: Any) -> float:
    """A stored metric: the largest double stands for infinity, nothing for NaN."""
    number = float(value) if value is not None else np.nan
    return float(np.copysign(np.inf, number)) if abs(number) >= LARGEST else number


def _choose(names: list[str], wanted: str | None, kind: str) -> str:
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted in names:
        return wanted
    raise BadInput(
        f"{kind}: {wanted!r} is not in the database, name one of {', '.join(map(str, names))}"
        if wanted
        else f"{kind}: the database holds {len(names)}, name one of {', '.join(map(str, names))}"
    )


def _mlflow(connection: sqlite3.Connection, tables: set[str], experiment: str | None) -> pd.DataFrame:
    """Every active run. A finished one whose last value of a loss is not finite diverged."""
    runs = "select r.run_uuid, r.name, r.status from runs r where r.lifecycle_stage = 'active'"
    arguments: tuple[object, ...] = ()
    if experiment is not None:
        found = [n for (n,) in connection.execute("select name from experiments")]
        runs += " and r.experiment_id = (select experiment_id from experiments where name = ?)"
        arguments = (_choose(found, experiment, "experiment"),)
    rows: dict[str, dict[str, object]] = {
        u: {"run": n or u, "status": str(s or "finished").lower()}
        for u, n, s in connection.execute(runs, arguments)
    }
    for run, key, value in connection.execute("select run_uuid, key, value from params"):
        if run in rows and key != "status":
            rows[run][key] = _number(value)
    if "latest_metrics" in tables:
        metrics = "select run_uuid, key, value, step, is_nan from latest_metrics"
    else:
        metrics = "select run_uuid, key, value, step, is_nan from metrics order by step"
    last: dict[str, int] = {}
    for run, key, value, step, is_nan in connection.execute(metrics):
        if run in rows and key != "status":
            rows[run][key] = np.nan if is_nan else _finite(value)
            last[run] = max(step or 0, last.get(run, 0))
            rows[run]["step"] = last[run]
    for row in rows.values():
        losses = [v for k, v in row.items() if "loss" in str(k).lower() and isinstance(v, float)]
        if row["status"] == "finished" and any(not np.isfinite(v) for v in losses):
            row["status"] = "diverged"
    if not any(row["status"] == "finished" for row in rows.values()):
        raise BadInput(f"runs: the MLflow database holds no finished run{_ends(list(rows.values()))}")
    return pd.DataFrame(rows.values())


def _ends(rows: list[dict[str, object]]) -> str:
    words = [str(row["status"]) for row in rows]
    counted = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    return f" ({counted})" if counted else ""


def _optuna(connection: sqlite3.Connection, tables: set[str], study: str | None) -> pd.DataFrame:
    """Every trial. A pruned one shows the last value that it reported; an infinite one diverged."""
    studies = dict(connection.execute("select study_name, study_id from studies").fetchall())
    chosen = studies[_choose(list(studies), study, "study")]
    trials = connection.execute(
        "select trial_id, number, state from trials where study_id = ?", (chosen,)
    ).fetchall()
    rows: dict[int, dict[str, object]] = {
        i: {"run": f"trial {number}", "status": str(state).lower()} for i, number, state in trials
    }
    if not any(row["status"] == "complete" for row in rows.values()):
        raise BadInput(f"runs: the Optuna study holds no completed trial{_ends(list(rows.values()))}")
    if "trial_intermediate_values" in tables:
        order = "select trial_id, intermediate_value from trial_intermediate_values order by step"
        for trial, value in connection.execute(order):
            if trial in rows:
                rows[trial]["loss"] = _finite(value)
    named = {column[1] for column in connection.execute("pragma table_info(trial_values)")}
    kind = "value_type" if "value_type" in named else "'FINITE'"
    values = f"select trial_id, value, {kind} from trial_values where objective = 0"
    for trial, value, stored in connection.execute(values):
        if trial in rows:
            infinite = {"INF_POS": np.inf, "INF_NEG": -np.inf}
            rows[trial]["loss"] = infinite[stored] if stored in infinite else _finite(value)
            if rows[trial]["status"] == "complete" and not np.isfinite(float(str(rows[trial]["loss"]))):
                rows[trial]["status"] = "diverged"
    for trial, name, value, distribution in connection.execute(
        "select trial_id, param_name, param_value, distribution_json from trial_params"
    ):
        if trial in rows and name != "status":
            choices = json.loads(distribution).get("attributes", {}).get("choices")
            rows[trial][name] = choices[int(value)] if choices else value
    for trial, key, value in connection.execute(
        "select trial_id, key, value_json from trial_user_attributes"
    ):
        if trial in rows and key != "status":
            rows[trial][key] = json.loads(value)
    return pd.DataFrame(rows.values())
