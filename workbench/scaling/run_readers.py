"""Read run tables from files that other tools write.
Nothing is executed and databases are opened read-only.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.errors import BadInput

SUFFIXES = (
    ".csv, .tsv, .csv.gz, .parquet, .jsonl, .json, .db, .sqlite, .sqlite3, or a folder of TensorBoard exports"
)


def read(path: str | Path, **options: str) -> pd.DataFrame:
    """A table with one row per run. options: `experiment` (MLflow) or `study` (Optuna)
    by name where a database holds several.

    BadInput for files that are missing, empty or of an unknown kind.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f"runs: {str(path)!r} does not exist; give a file ({SUFFIXES})")
    if path.is_dir():
        return tensorboard_exports(path)
    name = path.name.lower().removesuffix(".gz")
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".csv": lambda p: weights_and_biases(pd.read_csv(p)),
        ".tsv": lambda p: pd.read_csv(p, sep="\t"),
        ".parquet": pd.read_parquet,
        ".jsonl": lambda p: pd.json_normalize(_json_lines(p)),
        ".json": _json,
        ".db": lambda p: database(p, **options),
        ".sqlite": lambda p: database(p, **options),
        ".sqlite3": lambda p: database(p, **options),
    }
    for suffix, reader in readers.items():
        if name.endswith(suffix):
            try:
                return reader(path)
            except BadInput:
                raise
            except (ValueError, OSError, sqlite3.Error, pd.errors.ParserError, UnicodeDecodeError) as error:
                raise BadInput(
                    f"runs: {path.name} cannot be read as {suffix} ({str(error).splitlines()[0]}); "
                    "is it complete?"
                ) from None
    raise BadInput(f"runs: {path.name} has an unknown ending; accepted: {SUFFIXES}")


def _json_lines(path: Path) -> list[dict[str, object]]:
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise BadInput(f"runs: {path.name} line {number} is not JSON ({error.msg})") from None
    return rows


def _json(path: Path) -> pd.DataFrame:
    content = json.loads(path.read_text())
    if isinstance(content, dict):
        return pd.DataFrame(content)
    if content and isinstance(content[0], list):  # TensorBoard's JSON: [wall time, step, value]
        return pd.DataFrame([{"run": path.stem, "step": content[-1][1], "loss": content[-1][2]}])
    return pd.json_normalize(content)


def weights_and_biases(table: pd.DataFrame) -> pd.DataFrame:
    """A Weights & Biases export: the runs table as it is (unfinished runs marked by an empty loss),
    or a chart's history.

    A chart's CSV has a step column and "RUN - METRIC" columns (with __MIN and __MAX twins): its last values
    become one row per run. Any other table is returned unchanged.
    """
    series = [c for c in table if " - " in str(c) and not str(c).endswith(("__MIN", "__MAX", "_step"))]
    if (
        series
        and len(series) >= (len(table.columns) - 1) // 3
        and any(str(c).lower() in ("step", "global_step", "trainer/global_step") for c in table)
    ):
        rows: dict[str, dict[str, object]] = {}
        step = next(c for c in table if str(c).lower() in ("step", "global_step", "trainer/global_step"))
        for column in series:
            run, _, metric = str(column).rpartition(" - ")
            values = table[column].dropna()
            if len(values):
                rows.setdefault(run, {"run": run})[metric] = values.iloc[-1]
                rows[run]["step"] = table[step][values.index[-1]]
        return pd.DataFrame(rows.values())
    if "State" in table and "Name" in table:
        finished = table["State"].astype(str).str.lower().isin(("finished", ""))
        return table[finished].reset_index(drop=True)
    return table


def tensorboard_exports(folder: Path) -> pd.DataFrame:
    """A folder of TensorBoard scalar downloads (CSV with Wall time, Step, Value), named run-RUN-tag-TAG.csv.

    One row per run, one column per tag with its last value, and `step`.
    """
    rows: dict[str, dict[str, object]] = {}
    for file in sorted(folder.rglob("*.csv")):
        table = pd.read_csv(file)
        if not {"Step", "Value"} <= set(table) or not len(table):
            continue
        stem = file.stem
        run, _, tag = stem.removeprefix("run-").partition("-tag-")
        if not tag:
            run, tag = file.parent.name, stem
        last = table.sort_values("Step").iloc[-1]
        row = rows.setdefault(run, {"run": run, "step": last["Step"]})
        row[tag.replace("_", "/", 1) if tag.startswith(("eval_", "val_", "train_")) else tag] = last["Value"]
    if not rows:
        raise BadInput(
            f"runs: folder {folder.name!r} holds no TensorBoard scalar CSV (columns Wall time, Step, Value)"
        )
    return pd.DataFrame(rows.values())


def database(path: Path, experiment: str | None = None, study: str | None = None) -> pd.DataFrame:
    """An MLflow or Optuna SQLite database, told apart by its tables."""
    with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True) as connection:
        tables = {
            name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")
        }
        if {"runs", "params"} <= tables and tables & {"latest_metrics", "metrics"}:
            return _mlflow(connection, tables, experiment)
        if {"studies", "trials", "trial_params"} <= tables:
            return _optuna(connection, study)
    raise BadInput(
        f"runs: {path.name} is neither an MLflow nor an Optuna database (tables: "
        f"{', '.join(sorted(tables)) or 'none'})"
    )


def _number(value: object) -> object:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return value


def _choose(names: list[str], wanted: str | None, kind: str) -> str:
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted in names:
        return wanted
    raise BadInput(
        f"{kind}: {wanted!r} is not in the database, name one of {', '.join(names)}"
        if wanted
        else f"{kind}: the database holds {len(names)}, name one of {', '.join(names)}"
    )


def _mlflow(connection: sqlite3.Connection, tables: set[str], experiment: str | None) -> pd.DataFrame:
    runs = "select r.run_uuid, r.name, r.status from runs r where r.lifecycle_stage = 'active'"
    arguments: tuple[object, ...] = ()
    if experiment is not None:
        found = [n for (n,) in connection.execute("select name from experiments")]
        runs += " and r.experiment_id = (select experiment_id from experiments where name = ?)"
        arguments = (_choose(found, experiment, "experiment"),)
    rows: dict[str, dict[str, object]] = {
        u: {"run": n or u, "status": s} for u, n, s in connection.execute(runs, arguments)
    }
    for run, key, value in connection.execute("select run_uuid, key, value from params"):
        if run in rows:
            rows[run][key] = _number(value)
    if "latest_metrics" in tables:
        metrics = "select run_uuid, key, value, step, is_nan from latest_metrics"
    else:
        metrics = "select run_uuid, key, value, step, is_nan from metrics order by step"
    last: dict[str, int] = {}
    for run, key, value, step, is_nan in connection.execute(metrics):
        if run in rows:
            rows[run][key] = np.nan if is_nan else value
            last[run] = max(step or 0, last.get(run, 0))
            rows[run]["step"] = last[run]
    finished = [row for row in rows.values() if row["status"] in ("FINISHED", None)]
    if not finished:
        raise BadInput("runs: the MLflow database holds no finished run")
    return pd.DataFrame(finished).drop(columns="status")


def _optuna(connection: sqlite3.Connection, study: str | None) -> pd.DataFrame:
    studies = dict(connection.execute("select study_name, study_id from studies").fetchall())
    chosen = studies[_choose(list(studies), study, "study")]
    trials = connection.execute(
        "select trial_id, number from trials where study_id = ? and state = 'COMPLETE'", (chosen,)
    ).fetchall()
    if not trials:
        raise BadInput("runs: the Optuna study holds no completed trial")
    rows: dict[int, dict[str, object]] = {i: {"run": f"trial {number}"} for i, number in trials}
    for trial, value in connection.execute("select trial_id, value from trial_values where objective = 0"):
        if trial in rows:
            rows[trial]["loss"] = value
    for trial, name, value, distribution in connection.execute(
        "select trial_id, param_name, param_value, distribution_json from trial_params"
    ):
        if trial in rows:
            choices = json.loads(distribution).get("attributes", {}).get("choices")
            rows[trial][name] = choices[int(value)] if choices else value
    for trial, key, value in connection.execute(
        "select trial_id, key, value_json from trial_user_attributes"
    ):
        if trial in rows:
            rows[trial][key] = json.loads(value)
    return pd.DataFrame(rows.values())
