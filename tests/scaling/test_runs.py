"""Run tables: names, units, checks; and the files that other tools write."""

import json
import sqlite3
import warnings

import numpy as np
import optuna
import pandas as pd
import pytest

from workbench.errors import BadInput
from workbench.scaling import load_runs
from workbench.scaling.runs import Runs, mapping, transformer_flops

DATA = {"params": [1e7, 1e8, 1e9], "tokens": [1e9, 1e9, 1e10], "loss": [4.0, 3.4, 2.9]}


@pytest.fixture(autouse=True)
def strict_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_names_are_recognised_and_flops_filled():
    runs = Runs.from_table(
        {
            "Model Size": DATA["params"],
            "n_tokens": DATA["tokens"],
            "eval/loss": DATA["loss"],
            "note": ["a", "b", "c"],
        }
    )
    assert runs.table.flops.tolist() == [6e16, 6e17, 6e19]
    assert (
        "params read from column 'Model Size'" in runs.notes
        and "flops filled with 6 x params x tokens" in runs.notes
    )
    assert runs.table.note.tolist() == ["a", "b", "c"]
    back = Runs.from_table({"params": [1e7], "flops": [6e16], "loss": [3.0]})
    assert back.table.tokens.tolist() == [1e9]


def test_mapping_in_one_line_with_units():
    table = {"size in M": [10, 100], "B tokens": [1, 2], "N": [3, 4], "D": [5, 6], "ppl": [np.e**4, np.e**3]}
    assert Runs.from_table(
        table | {"size in M": [1e7, 1e8]}, "params=size in M, tokens=D*1e9, loss=log(ppl)"
    ).table.params.tolist() == [1e7, 1e8]
    runs = Runs.from_table(table, "params=N*1e6, tokens=D*1e9, loss=log(ppl)")
    assert runs.table.params.tolist() == [3e6, 4e6] and runs.table.tokens.tolist() == [5e9, 6e9]
    assert runs.table.loss.tolist() == pytest.approx([4, 3])
    assert mapping("params=Model Size, loss = eval/loss") == {"params": "Model Size", "loss": "eval/loss"}
    for wrong, message in (
        ("params", "write"),
        ("parms=N", "did you mean params"),
        ("params=Q", "not among the columns|names Q"),
        ("params=__import__('os')", "columns"),
    ):
        with pytest.raises(BadInput, match=message):
            Runs.from_table(table, wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": [4.0, -3.4, 2.9]}, r"loss: row 1 is -3.4, expected a number above 0 \(nats per token\)"),
        ({"params": [1e7, 0, 1e9]}, "params: row 1 is 0"),
        ({"tokens": [1e9, "many", 1e10]}, "tokens: row 1 is 'many'"),
        ({"params": [1e7, np.nan, 1e9]}, "params: row 1 is nan"),
        ({"params": [1e7, np.inf, 1e9]}, "params: row 1 is inf"),
        (
            {"sparsity": [0.0, 0.5, 1.5]},
            "sparsity: row 2 is 1.5, expected a number of at least 0 and at most 1",
        ),
        ({"loss": [np.nan] * 3}, "no row has a finite value"),
    ],
)
def test_wrong_numbers_name_row_and_column(change, message):
    with pytest.raises(BadInput, match=message):
        Runs.from_table(DATA | change)
    with pytest.raises(BadInput, match="no rows"):
        Runs.from_table({"loss": []})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": [10.0, 100.0, 900.0]}, "params is at most 900: in millions"),
        ({"loss": [55.0, 30.0, 19.0]}, "perplexity"),
        ({"flops": [1e12, 1e13, 1e14]}, "another unit"),
        ({"params": [1e8, 1e8, 1e8], "tokens": [1e9, 2e9, 3e9]}, "every run has 1e.08 params"),
        ({"loss": [4.0, np.nan, 2.9]}, "1 rows without a finite loss dropped .*: rows 1"),
        ({k: [v[0], v[0], v[2]] for k, v in DATA.items()}, "1 exact duplicate rows dropped: rows 1"),
    ],
)
def test_doubtful_tables_are_said(change, message):
    with pytest.warns(UserWarning, match=message):
        Runs.from_table(DATA | change)


def test_fingerprint_follows_the_numbers():
    first = Runs.from_table(DATA)
    assert (
        first.fingerprint
        == Runs.from_table(DATA).fingerprint
        != Runs.from_table(DATA | {"loss": [4.0, 3.4, 2.8]}).fingerprint
    )


def test_exact_transformer_flops():
    """Against a hand count of one layer, and close to 6 N for a wide model with a short context."""
    width, seq, vocab = 64, 32, 100
    projections, mlp, scores = 4 * 2 * 64 * 64, 3 * 2 * 64 * 170, 2 * 2 * 32 * 64 / 2
    head = 2 * 64 * 100
    assert transformer_flops(7, 2, width, seq, vocab, 170) == pytest.approx(
        3 * 7 * (2 * (projections + mlp + scores) + head)
    )
    n = 12 * (4 + 8) * 8192**2
    assert transformer_flops(1, 12, 8192, 16, 0) / (6 * n) == pytest.approx(1, rel=1e-3)


def test_files(tmp_path):
    frame = pd.DataFrame(DATA)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.csv.gz", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "a.json", orient="records")
    for name in ("a.csv", "a.csv.gz", "a.tsv", "a.parquet", "a.jsonl", "a.json"):
        runs = load_runs(tmp_path / name)
        assert runs.table[list(DATA)].to_numpy() == pytest.approx(frame.to_numpy())
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:200])
    (tmp_path / "bad.jsonl").write_text('{"loss": 1}\n{"loss":')
    (tmp_path / "notes.txt").write_text("x")
    for name, message in (
        ("missing.csv", "does not exist"),
        ("broken.parquet", "cannot be read"),
        ("bad.jsonl", "line 2"),
        ("notes.txt", "unknown ending"),
    ):
        with pytest.raises(BadInput, match=message):
            load_runs(tmp_path / name)


def test_weights_and_biases_exports(tmp_path):
    runs = pd.DataFrame(
        {
            "Name": ["a", "b", "c"],
            "State": ["finished", "crashed", "finished"],
            "n_params": [1e7, 1e8, 1e9],
            "train_tokens": [1e9, 1e9, 1e10],
            "eval/loss": [4.0, np.nan, 2.9],
        }
    )
    runs.to_csv(tmp_path / "wandb_export.csv", index=False)
    with pytest.warns(UserWarning, match=r"1 of 3 runs did not finish: 1 crashed \(rows 1\)"):
        read = load_runs(tmp_path / "wandb_export.csv")
    assert read.table.loss.tolist() == [4.0, 2.9] and read.left_out.status.tolist() == ["crashed"]
    history = pd.DataFrame(
        {
            "Step": [1, 2, 3],
            "small - eval/loss": [5, 4.5, 4.0],
            "small - eval/loss__MIN": [5, 4.5, 4.0],
            "small - eval/loss__MAX": [5, 4.5, 4.0],
            "big - eval/loss": [4, 3.5, np.nan],
            "big - eval/loss__MIN": [4, 3.5, np.nan],
            "big - eval/loss__MAX": [4, 3.5, np.nan],
        }
    )
    history.to_csv(tmp_path / "chart.csv", index=False)
    table = load_runs(tmp_path / "chart.csv").table
    assert (
        table.loss.tolist() == [4.0, 3.5]
        and table.step.tolist() == [3, 2]
        and table.run.tolist() == ["small", "big"]
    )


def test_tensorboard_exports(tmp_path):
    for run, end in (("n10", 3.9), ("n20", 3.5)):
        pd.DataFrame({"Wall time": [1.0, 2.0], "Step": [10, 20], "Value": [5.0, end]}).to_csv(
            tmp_path / f"run-{run}-tag-eval_loss.csv", index=False
        )
    table = load_runs(tmp_path).table
    assert table.loss.tolist() == [3.9, 3.5] and table.step.tolist() == [20, 20]
    with pytest.raises(BadInput, match="no TensorBoard"):
        (tmp_path / "empty").mkdir()
        load_runs(tmp_path / "empty")


def test_mlflow_database(tmp_path):
    file = tmp_path / "mlflow.db"
    with sqlite3.connect(file) as db:
        db.executescript("""
            create table experiments (experiment_id integer, name text);
            create table runs (
                run_uuid text, name text, status text, lifecycle_stage text, experiment_id integer);
            create table params (key text, value text, run_uuid text);
            create table latest_metrics (
                key text, value real, timestamp integer, step integer, is_nan integer, run_uuid text);
            insert into experiments values (1, 'sweep');
            insert into runs values
                ('u1', 'a', 'FINISHED', 'active', 1), ('u2', 'b', 'FAILED', 'active', 1),
                ('u3', 'c', 'FINISHED', 'deleted', 1), ('u4', 'd', 'FINISHED', 'active', 1);
            insert into params values
                ('n_params', '1e7', 'u1'), ('tokens', '1000000000', 'u1'),
                ('n_params', '1e8', 'u4'), ('tokens', '2e9', 'u4'), ('n_params', '5', 'u2');
            insert into latest_metrics values
                ('val_loss', 3.5, 0, 100, 0, 'u1'), ('val_loss', 3.1, 0, 200, 0, 'u4'),
                ('val_loss', 3.0, 0, 1, 0, 'u2');
        """)
    with pytest.warns(UserWarning, match=r"1 of 3 runs did not finish: 1 failed \(rows 1\)"):
        runs = load_runs(file)
    assert runs.left_out.run.tolist() == ["b"] and runs.left_out.status.tolist() == ["failed"]
    assert runs.table[["params", "tokens", "loss"]].to_numpy().tolist() == [[1e7, 1e9, 3.5], [1e8, 2e9, 3.1]]
    with pytest.raises(BadInput, match="experiment: 'other'"):
        load_runs(file, experiment="other")


def test_optuna_database(tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(storage=storage, study_name="lr")
    study.enqueue_trial({"learning_rate": 1e-3, "params": 10_000_000, "kind": "b"})
    study.enqueue_trial({"learning_rate": 2e-3, "params": 100_000_000, "kind": "a"})

    def objective(trial):
        trial.set_user_attr("tokens", 5e8)
        trial.suggest_categorical("kind", ["a", "b"])
        return (
            3.0
            + trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
            + 1e-9 * trial.suggest_int("params", 10**6, 10**9)
        )

    study.optimize(objective, n_trials=2)
    table = load_runs(tmp_path / "study.db").table
    assert (
        table.params.tolist() == [1e7, 1e8]
        and table.tokens.tolist() == [5e8, 5e8]
        and table.kind.tolist() == ["b", "a"]
    )
    assert table.loss.tolist() == pytest.approx([3.011, 3.102])
    with pytest.raises(BadInput, match="neither an MLflow nor an Optuna"):
        sqlite3.connect(tmp_path / "other.db").execute("create table t (x)")
        load_runs(tmp_path / "other.db")


def test_json_dictionary_of_columns(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(DATA))
    assert len(load_runs(tmp_path / "r.json")) == 3


def test_own_tables_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(load_runs("scaling-sweep")) == 43 and len(load_runs("training-lr-batch")) == 84
    assert {"params", "experts", "loss"} <= set(load_runs("drawn/routed").table)
    with pytest.raises(BadInput, match="does not exist"):
        load_runs("drawn/nothing")
