"""Loaders of tables: finished runs in every format, databases of trackers, rows of data, measured times."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.fuzz import mutation
from tests.fuzz.campaign import Case, Drawing
from workbench.scaling.runs import Runs
from workbench.subjects import rows


def table() -> pd.DataFrame:
    noise = np.random.default_rng(0)
    found = pd.DataFrame(
        [
            {
                "run": f"r{i}",
                "params": n,
                "tokens": n * r,
                "loss": 1.7 + 400 * n**-0.34 + noise.normal(0, 0.01),
            }
            for i, (n, r) in enumerate((n, r) for n in (1e7, 1e8, 1e9) for r in (5, 20, 80))
        ]
    )
    return found.assign(status="finished", seed=range(len(found)))


def curves() -> pd.DataFrame:
    """A chart's history as Weights & Biases exports it."""
    found: dict[str, Any] = {"Step": range(6)}
    for run in ("a - b", "second"):
        found[f"{run} - val_loss"] = np.linspace(4, 3, 6)
        found[f"{run} - val_loss__MIN"] = np.linspace(4, 3, 6)
    return pd.DataFrame(found)


def mlflow(file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.executescript(
        "create table experiments (experiment_id integer, name text);"
        "create table runs (run_uuid text, name text, status text, lifecycle_stage text,"
        "experiment_id integer);"
        "create table params (run_uuid text, key text, value text);"
        "create table latest_metrics (run_uuid text, key text, value real, step integer, is_nan integer);"
        "insert into experiments values (1, 'main');"
    )
    for number, (_, row) in enumerate(table().iterrows()):
        uuid = f"u{number}"
        connection.execute("insert into runs values (?, ?, 'FINISHED', 'active', 1)", (uuid, row.run))
        for key in ("params", "tokens"):
            connection.execute("insert into params values (?, ?, ?)", (uuid, key, str(row[key])))
        connection.execute("insert into latest_metrics values (?, 'loss', ?, 9, 0)", (uuid, row.loss))
    connection.commit()
    connection.close()


def optuna(file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.executescript(
        "create table studies (study_id integer, study_name text);"
        "create table trials (trial_id integer, number integer, study_id integer, state text);"
        "create table trial_params (trial_id integer, param_name text, param_value real,"
        "distribution_json text);"
        "create table trial_values (trial_id integer, objective integer, value real, value_type text);"
        "create table trial_intermediate_values (trial_id integer, step integer, intermediate_value real);"
        "create table trial_user_attributes (trial_id integer, key text, value_json text);"
        "insert into studies values (1, 'main');"
    )
    choices = '{"name": "CategoricalDistribution", "attributes": {"choices": [10000000.0, 100000000.0]}}'
    for number in range(6):
        connection.execute("insert into trials values (?, ?, 1, 'COMPLETE')", (number, number))
        connection.execute(
            "insert into trial_params values (?, 'params', ?, ?)", (number, number % 2, choices)
        )
        connection.execute("insert into trial_params values (?, 'lr', 0.1, '{}')", (number,))
        connection.execute("insert into trial_values values (?, 0, ?, 'FINITE')", (number, 3 + number / 10))
        connection.execute("insert into trial_intermediate_values values (?, 1, 4.0)", (number,))
        connection.execute(
            "insert into trial_user_attributes values (?, 'tokens', ?)", (number, str(1e9 + number))
        )
    connection.commit()
    connection.close()


def rows_changed(draw: random.Random, file: Path) -> str:
    """A few cells of a database, or its tables, set to what they do not hold."""
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("pragma synchronous = off")
    connection.execute("pragma journal_mode = memory")
    names = [n for (n,) in connection.execute("select name from sqlite_master where type = 'table'")]
    names = [n for n in names if not n.startswith("sqlite_")]
    told = []
    for _ in range(draw.choice([1, 1, 2, 4])):
        name = draw.choice(names)  # it may be gone by now
        columns = [row[1] for row in connection.execute(f'pragma table_info("{name}")')]
        if not columns:
            continue
        column, what = draw.choice(columns), draw.random()
        try:
            if what < 0.06:
                connection.execute(f'drop table "{name}"')
            elif what < 0.12:
                connection.execute(f'alter table "{name}" drop column "{column}"')
            elif what < 0.2:
                connection.execute(f'delete from "{name}" where abs(random()) % 2')
            else:
                held = connection.execute(f'select rowid, "{column}" from "{name}"').fetchall()
                if not held:
                    continue
                place, before = draw.choice(held)
                after = changed_cell(draw, before)
                all_ = draw.random() < 0.2
                where = "" if all_ else " where rowid = ?"
                connection.execute(
                    f'update "{name}" set "{column}" = ?{where}', (after,) if all_ else (after, place)
                )
        except sqlite3.Error:
            continue
        told.append(f"{name}.{column}")
    connection.close()
    return f"rows: {', '.join(told)}"


def changed_cell(draw: random.Random, before: Any) -> Any:
    if isinstance(before, str) and before[:1] in "{[" and draw.random() < 0.8:
        try:
            return mutation.as_json(draw, json.loads(before)).encode("utf-8", "replace").decode()
        except (ValueError, RecursionError):
            pass
    kinds = (None, -1, 0, 2**63 - 1, 1e308, -1e308, 1.797e308, 0.5, b"\xff\xfe", "", "x", "NaN", "1e400", "é")
    if draw.random() < 0.5:
        return mutation.text(draw, str(before)).encode("utf-8", "replace").decode().replace("\0", "")
    return draw.choice(kinds)


MAPPINGS = (None, None, "params=params, tokens=tokens", "loss=log(loss)", "params=seed*1e6", "tokens=run")


def run_tables(root: Path) -> Drawing:
    """CSV, TSV, JSON, Parquet, packed, charts and folders of TensorBoard, by columns given or not."""
    whole = root / "whole"
    whole.mkdir()
    table().to_csv(whole / "runs.csv", index=False)
    table().to_csv(whole / "runs.tsv", index=False, sep="\t")
    table().to_json(whole / "runs.jsonl", orient="records", lines=True)
    table().to_json(whole / "list.json", orient="records")
    (whole / "columns.json").write_text(json.dumps(table().to_dict(orient="list")))
    (whole / "series.json").write_text("[[1.5, 0, 4.0], [2.5, 10, 3.5], [3.5, 20, 3.25]]")
    table().to_parquet(whole / "runs.parquet")
    curves().to_csv(whole / "chart.csv", index=False)
    with gzip.open(whole / "runs.csv.gz", "wb") as packed:
        packed.write((whole / "runs.csv").read_bytes())
    (whole / "board").mkdir()
    for run in ("a", "b"):
        pd.DataFrame({"Wall time": [1.0, 2.0], "Step": [1, 2], "Value": [4.0, 3.5]}).to_csv(
            whole / "board" / f"run-{run}-tag-eval_loss.csv", index=False
        )
    names = sorted(p.name for p in whole.iterdir())
    place = root / "place"

    def opened(file: Path, columns: str | None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs = Runs.open(file, columns)
            assert runs.fingerprint and repr(runs) and runs._repr_html_()

    def draw_case(draw: random.Random) -> Case:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        name = draw.choice(names)
        copy = place / name
        if (whole / name).is_dir():
            shutil.copytree(whole / name, copy)
            file = draw.choice(sorted(copy.iterdir()))
        else:
            file = Path(shutil.copy(whole / name, copy))
        content = file.read_bytes()
        if name.endswith((".gz", ".parquet")):
            if name.endswith(".gz") and draw.random() < 0.5:
                content = gzip.compress(mutation.damaged(draw, gzip.decompress(content)))
            else:
                content = mutation.damaged(draw, content)
        elif name.endswith(".json") and draw.random() < 0.6:
            content = mutation.encoded(mutation.as_json(draw, json.loads(content)))
        elif draw.random() < 0.7:
            content = mutation.encoded(mutation.text(draw, content.decode()))
        else:
            content = mutation.damaged(draw, content)
        file.write_bytes(content)
        columns = draw.choice(MAPPINGS)
        return f"{name} ({columns}): {content[:300]!r}", lambda: opened(copy, columns)

    return draw_case


def run_databases(root: Path) -> Drawing:
    """MLflow and Optuna databases: bytes of the file, and cells, columns and tables."""
    mlflow(root / "mlflow.db")
    optuna(root / "optuna.db")
    file = root / "damaged.sqlite"

    def opened(**options: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs = Runs.open(file, None, **options)
            assert runs.fingerprint and repr(runs)

    def draw_case(draw: random.Random) -> Case:
        name = draw.choice(["mlflow", "optuna"])
        shutil.copy(root / f"{name}.db", file)
        if draw.random() < 0.6:
            told = rows_changed(draw, file)
        else:
            told = "bytes"
            file.write_bytes(mutation.damaged(draw, file.read_bytes(), draw.choice([0, 200])))
        options = {"experiment" if name == "mlflow" else "study": "main"} if draw.random() < 0.5 else {}
        return f"{name}: {told}", lambda: opened(**options)

    return draw_case


def data_rows(root: Path) -> Drawing:
    """Rows of a user's data, up to the check of their columns and classes."""
    whole = root / "whole"
    whole.mkdir()
    texts = pd.DataFrame(
        {"text": [f"line {i}, more" for i in range(12)], "label": [i % 3 for i in range(12)]}
    )
    texts.to_csv(whole / "data.csv", index=False)
    texts.to_csv(whole / "data.tsv", index=False, sep="\t")
    texts.to_json(whole / "data.jsonl", orient="records", lines=True)
    texts.to_json(whole / "data.json", orient="records")
    texts.to_parquet(whole / "data.parquet")
    names = sorted(p.name for p in whole.iterdir())

    def opened(file: Path, task: str) -> None:
        from workbench.subjects import text

        found, _ = rows.read_rows(file, 100, 0)
        rows.check_columns(found, task, "text", "label", None)
        if task in text.CLASSIFIED:
            found, _ = text.visible(found, "label")
            text.classes_of(found, task, "label", None, True)

    def draw_case(draw: random.Random) -> Case:
        name = draw.choice(names)
        content = (whole / name).read_bytes()
        if name.endswith(".parquet") or draw.random() < 0.3:
            content = mutation.damaged(draw, content)
        elif name.endswith(".json") and draw.random() < 0.6:
            content = mutation.encoded(mutation.as_json(draw, json.loads(content)))
        else:
            content = mutation.encoded(mutation.text(draw, content.decode()))
        file = root / name
        file.write_bytes(content)
        task = draw.choice(
            ["sequence-classification", "multi-label-classification", "causal-lm", "regression"]
        )
        return f"{name}, {task}: {content[:300]!r}", lambda: opened(file, task)

    return draw_case


def measured_times(root: Path) -> Drawing:
    """The table of layer times that an allocation can be given."""
    from types import SimpleNamespace

    from workbench.quantization.allocation.allocate import layer_times

    layers: Any = [SimpleNamespace(name=f"layers.{i}.{part}") for i in range(2) for part in ("q", "up")]
    found = pd.DataFrame(
        [{"layer": g, "width": w, "milliseconds": 0.5 * w} for g in ("*", "layers.1.*") for w in (2, 4)]
    )
    content = found.to_csv(index=False)
    file = root / "times.csv"

    def opened() -> None:
        layer_times(str(file), layers, (2, 4))

    def draw_case(draw: random.Random) -> Case:
        if draw.random() < 0.3:
            file.write_bytes(mutation.damaged(draw, content.encode()))
        else:
            file.write_bytes(mutation.encoded(mutation.text(draw, content)))
        return repr(file.read_bytes()[:300]), opened

    return draw_case


LOADERS: dict[str, Callable[[Path], Drawing]] = {
    "run-tables": run_tables,
    "run-databases": run_databases,
    "data-rows": data_rows,
    "layer-times": measured_times,
}
