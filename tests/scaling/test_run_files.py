"""How runs ended, in every reader; and files that nobody meant to be read."""

import gzip
import io
import json
import random
import sqlite3
import warnings

import numpy as np
import optuna
import pandas as pd
import pytest

from workbench.errors import BadInput
from workbench.scaling import load_runs
from workbench.scaling.formulas.laws import Law
from workbench.scaling.runs import Runs

SHAPE = "n_params,n_tokens,val_loss\n1e7,1e9,4.0\n1e8,1e9,3.4\n1e9,1e10,2.9\n"


def ends(runs):
    return dict(zip(runs.left_out.run, runs.left_out.status, strict=True))


@pytest.mark.parametrize("axis", ["Step", "_step", "global_step", "train/global_step", "trainer/global_step"])
def test_charts_end_where_the_run_ended(tmp_path, axis):
    """Kind: diverged, crashed and unfinished runs are rows with a status, in every reader. A run that logged
    NaN last has no last finite loss; a run without any value has not begun.
    """
    (tmp_path / "chart.csv").write_text(
        f"{axis},good - val_loss,bad - val_loss,inf - val_loss,none - val_loss\n"
        "1,5.0,5.1,5.2,\n2,4.0,4.1,4.2,\n3,3.5,NaN,Infinity,\n4,,,,\n"
    )
    with pytest.warns(UserWarning, match="2 diverged .*1 unfinished"):
        runs = load_runs(tmp_path / "chart.csv")
    assert runs.table.run.tolist() == ["good"] and runs.table.loss.tolist() == [3.5]
    assert runs.table.step.tolist() == [3]
    assert ends(runs) == {"bad": "diverged", "inf": "diverged", "none": "unfinished"}


@pytest.mark.parametrize("axis", ["Relative Time (Process)", "epoch", "train/epoch"])
def test_charts_over_time_and_epochs(tmp_path, axis):
    (tmp_path / "chart.csv").write_text(f"{axis},a - loss,b - loss\n1,5.0,4.0\n2,4.5,3.5\n")
    assert load_runs(tmp_path / "chart.csv").table.loss.tolist() == [4.5, 3.5]


def test_states_of_a_table(tmp_path):
    """Also words that other trackers write, and a status that is something else altogether. One word that
    was not known made all runs finished ones.
    """
    states = ["finished", "crashed", "killed", "running", "failed", "", "preempted"]
    frame = pd.DataFrame({"params": np.logspace(7, 9, 7), "tokens": 1e9, "loss": np.linspace(4, 3, 7)})
    frame.assign(State=states, run=list("abcdefg")).to_csv(tmp_path / "a.csv", index=False)
    with pytest.warns(UserWarning, match="5 of 7 runs did not finish"):
        runs = load_runs(tmp_path / "a.csv")
    assert runs.table.run.tolist() == ["a", "f"]
    assert ends(runs) == {"b": "crashed", "c": "killed", "d": "unfinished", "e": "failed", "g": "unfinished"}
    for name, word, status in (
        ("Status", "OUT_OF_MEMORY", "failed"),
        ("run.state", "timed out", "killed"),
        ("trial_status", "ran away", "ran away"),
    ):
        with pytest.warns(UserWarning, match=f"1 of 7 runs did not finish: 1 {status}"):
            runs = Runs.from_table(frame.assign(run=list("abcdefg"), **{name: ["COMPLETED"] * 6 + [word]}))
        assert len(runs) == 6 and ends(runs) == {"g": status}
    with pytest.warns(UserWarning, match="ran away is no known word for how a run ends"):
        Runs.from_table(frame.assign(state=["finished"] * 6 + ["ran away"]))
    other = Runs.from_table(frame.assign(status=["solid", "liquid", "gas"] + ["solid"] * 4))
    assert len(other) == 7 and "status" in other.table
    with pytest.raises(BadInput, match="no row has a finite value and a good end .*7 crashed"):
        Runs.from_table(frame.assign(status="crashed"))


def test_infinity_in_mlflow(tmp_path):
    """MLflow's SQL stores infinity as the largest double: it was fitted as a loss."""
    file = tmp_path / "mlflow.db"
    with sqlite3.connect(file) as db:
        db.executescript("""
            create table experiments (experiment_id integer, name text);
            create table runs (
                run_uuid text, name text, status text, lifecycle_stage text, experiment_id integer);
            create table params (key text, value text, run_uuid text);
            create table metrics (key text, value real, timestamp integer, step integer, is_nan integer,
                run_uuid text);
            insert into experiments values (1, 'sweep');
        """)
        states = ["FINISHED", "FINISHED", "FINISHED", "KILLED", "RUNNING", "FINISHED"]
        losses = [3.5, 1.7976931348623157e308, 0.0, 3.2, 3.1, 3.0]
        for i, (state, loss) in enumerate(zip(states, losses, strict=True)):
            db.execute("insert into runs values (?, ?, ?, 'active', 1)", (f"u{i}", f"r{i}", state))
            for key, value in (("n_params", 10.0 ** (7 + i)), ("tokens", 1e9)):
                db.execute("insert into params values (?, ?, ?)", (key, str(value), f"u{i}"))
            db.execute("insert into metrics values ('val_loss', ?, 0, 9, ?, ?)", (loss, int(i == 2), f"u{i}"))
    with pytest.warns(UserWarning, match="4 of 6 runs did not finish"):
        runs = load_runs(file)
    assert runs.table.loss.tolist() == [3.5, 3.0]
    assert ends(runs) == {"r1": "diverged", "r2": "diverged", "r3": "killed", "r4": "unfinished"}


def test_trials_of_optuna(tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(storage=storage, study_name="lr")

    def objective(trial):
        trial.suggest_float("learning_rate", 1e-4, 1e-2)
        if trial.number == 1:
            trial.report(3.7, 1)
            raise optuna.TrialPruned
        if trial.number == 2:
            raise RuntimeError("out of memory")
        return float("inf") if trial.number == 3 else 3.0

    study.optimize(objective, n_trials=5, catch=(RuntimeError,))
    study.ask()
    with pytest.warns(UserWarning, match="4 of 6 runs did not finish"):
        runs = load_runs(tmp_path / "study.db")
    assert runs.table.loss.tolist() == [3.0, 3.0]
    assert ends(runs) == {
        "trial 1": "pruned",
        "trial 2": "failed",
        "trial 3": "diverged",
        "trial 5": "unfinished",
    }
    assert runs.left_out.loss.iloc[0] == 3.7


def test_tensorboard_run_that_diverged(tmp_path):
    for run, end in (("a", "3.9"), ("b", "nan")):
        (tmp_path / f"run-{run}-tag-eval_loss.csv").write_text(
            f"Wall time,Step,Value\n1,10,5.0\n2,20,{end}\n"
        )
    with pytest.warns(UserWarning, match="1 diverged"):
        runs = load_runs(tmp_path)
    assert runs.table.run.tolist() == ["a"] and ends(runs) == {"b": "diverged"}


# ---- files that nobody meant to be read
def seeds(folder):
    """One good file of each kind."""
    frame = pd.read_csv(io.StringIO(SHAPE))
    made = {"a.csv": SHAPE.encode(), "a.tsv": SHAPE.replace(",", "\t").encode()}
    made["chart.csv"] = b"Step,a - loss,b - loss\n1,5.0,4.0\n2,4.5,NaN\n"
    made["a.json"] = frame.to_json(orient="records").encode()
    made["b.json"] = json.dumps(frame.to_dict("list")).encode()
    made["c.json"] = b"[[1.0, 10, 4.0], [2.0, 20, 3.5]]"
    made["a.jsonl"] = frame.to_json(orient="records", lines=True).encode()
    made["a.csv.gz"] = gzip.compress(SHAPE.encode())
    frame.to_parquet(folder / "seed.parquet")
    made["a.parquet"] = (folder / "seed.parquet").read_bytes()
    with sqlite3.connect(folder / "seed.db") as db:
        db.executescript("""
            create table studies (study_id integer, study_name text);
            create table trials (trial_id integer, number integer, study_id integer, state text);
            create table trial_params (trial_id integer, param_name text, param_value real,
                distribution_json text);
            create table trial_values (trial_id integer, objective integer, value real);
            create table trial_user_attributes (trial_id integer, key text, value_json text);
            insert into studies values (1, 's'); insert into trials values (1, 0, 1, 'COMPLETE');
            insert into trial_params values (1, 'params', 1e7, '{"attributes": {}}');
            insert into trial_values values (1, 0, 3.0);
            insert into trial_user_attributes values (1, 'tokens', '1e9');
        """)
    db.close()
    made["a.db"] = (folder / "seed.db").read_bytes()
    return made


WORDS = (b"NaN", b"1e999", b"-1", b"\xff\xfe", b"\x00", b"[]", b"{}", b"null", b'"', b",", b"\n", b"1" * 400)
WORDS += (b"true", b"[[", b"inf", b"loss", b"status", b"{'a': 1}", b"0x10", b"1_000", b"\r", b" - ", b"99")


def mutated(content, draw):
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(content) + 1)
        kind = draw.randrange(5)
        if kind == 0 and content:
            content[min(at, len(content) - 1)] = draw.randrange(256)
        elif kind == 1:
            content[at:at] = draw.choice(WORDS)
        elif kind == 2:
            del content[at : at + draw.choice((1, 3, 20, 200))]
        elif kind == 3:
            content = content[:at]
        else:
            part = content[at : at + draw.choice((5, 50))]
            content[at:at] = part * draw.choice((1, 3))
    return bytes(content)


def hostile_files(folder, count, seed):
    """(outcomes, what was neither read nor refused in one line)."""
    draw, counts, broken = random.Random(seed), {"read": 0, "refused": 0}, []
    made = seeds(folder)
    names = list(made)
    for i in range(count):
        name = names[i % len(names)]
        file = folder / name
        file.write_bytes(mutated(made[name], draw))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_runs(file)
            counts["read"] += 1
        except BadInput as error:
            counts["refused"] += 1
            if "\n" in str(error):
                broken.append((name, "more than one line"))
        except BaseException as error:
            broken.append((name, repr(error)[:300]))
    return counts, broken


def test_mutated_run_tables_are_read_or_refused_in_one_line(tmp_path):
    """Kind: a loader that trusts its file (688 tracebacks of 3,000)."""
    counts, broken = hostile_files(tmp_path, 800, 0)
    assert broken == [] and min(counts.values()) > 80


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"5", "neither a list"),
        ("a.json", b"[1, 2]", "neither a list"),
        ("a.json", b"[" * 100_000, "cannot be read"),
        ("a.json", b'[{"loss": ' + b"9" * 500 + b', "params": 1}]', "."),
        ("a.json", b'[{"loss": [1, 2], "params": {}}]', "expected|is"),
        ("a.json", b"[]", "no rows"),
        ("a.jsonl", b"[1]\n", "no JSON object"),
        ("a.csv", b"", "cannot be read"),
        ("a.csv", b"loss,val_loss,loss\n", "."),
        ("a.csv.gz", b"\x1f\x8bxx", "cannot be read"),
        ("a.db", b"SQLite format 3\x00" + b"\x00" * 200, "cannot be read"),
    ],
)
def test_what_is_no_run_table_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_runs(tmp_path / name)


def test_a_packed_file_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.scaling.run_tables.readers.MOST_BYTES", 10_000)
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(b"loss\n" + b"1\n" * 100_000))
    with pytest.raises(BadInput, match="more than"):
        load_runs(tmp_path / "bomb.csv.gz")


# ---- formulas
def squared(lines):
    steps = "\n".join(f"t{i + 1} = t{i}*t{i}" for i in range(lines))
    return f"t0 = A + params\n{steps}\nE + t{lines}"


@pytest.mark.parametrize(
    "text",
    [
        squared(27),
        squared(40),
        squared(40).replace("t0*t0", "t0/(t0 + A)"),
        "A**(B**(C**(D**(E**(F**(G**(H**params)))))))",
        "((((((((A+params)**8)**8)**8)**8)**8)**8)**8)**8+E",
        "log(" * 30 + "A + exp(params)" + ")" * 30,
    ],
)
def test_shared_graphs_are_walked_once(text):
    """Kind: every walk of a shared graph remembers where it was."""
    compiled = Law.from_formula(text).compile("log")
    assert len(compiled.graph.nodes) + len(compiled.second) < 3000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A + A", "names no column"),
        ("A*2", "names no column"),
        ("loss * A", "what the law predicts"),
        ("-" * 300 + "A*params", "nested 30. deep"),
        ("(" * 300 + "A*params" + ")" * 300, "too many nested parentheses"),
        ("exp(" * 160 + "A*params" + ")" * 160, "nested"),
        ("+".join(f"p{i}*params" for i in range(700)), "characters|parts|nested"),
        ("*".join(f"(p{i}+params)" for i in range(140)), "operations"),
    ],
)
def test_formulas_have_a_size_and_a_meaning(text, message):
    with pytest.raises(BadInput, match=message):
        Law.from_formula(text).compile("log").second  # noqa: B018


@pytest.mark.parametrize(
    "text",
    ["E + A*params**9**9**9", "E + A/params**1e400", "E + A*params + 0*log(0)", "E + A*params**-(2.**2000)"],
)
def test_constants_are_finite(text):
    """Kind (faults 14, 34 and 41): a number beyond the largest is refused by name, however it is written;
    as an exponent it was an OverflowError.
    """
    with pytest.raises(BadInput, match="constants have to be finite") as caught:
        Law.from_formula(text).compile("log")
    assert "\n" not in str(caught.value)


def hostile_formulas(count, seed):
    draw, counts, broken = random.Random(seed), {"read": 0, "refused": 0}, []
    parts = ["A", "B", "params", "tokens", "+", "-", "*", "/", "**", "(", ")", "exp(", "log(", "where(", ">="]
    parts += [
        ",",
        "1",
        "0",
        "1e999",
        "0.5",
        "\n",
        "x = ",
        "[",
        "'",
        "__import__",
        ".",
        "lambda:",
        "max(",
        "^",
        "🙂",
    ]
    good = [
        "E + A/params**alpha + B/tokens**beta",
        "x = log(params)\nE + A*exp(-x)",
        "where(params >= A, B, 1)",
    ]
    for _ in range(count):
        text = draw.choice(good)
        for _ in range(draw.choice((1, 1, 2, 5, 20))):
            at = draw.randrange(len(text) + 1)
            text = text[:at] + draw.choice(parts) + text[at + draw.choice((0, 0, 1, 4)) :]
        try:
            Law.from_formula(text).compile("log").second  # noqa: B018
            counts["read"] += 1
        except BadInput:
            counts["refused"] += 1
        except BaseException as error:
            broken.append((text, repr(error)[:200]))
    return counts, broken


def test_mutated_formulas_are_read_or_refused():
    counts, broken = hostile_formulas(1500, 0)
    assert broken == [] and min(counts.values()) > 100


# ---- requests beyond the machine
@pytest.mark.parametrize("ask", ["numpy", "torch", "range"])
def test_a_request_beyond_memory_is_one_line(ask):
    """Kind: an option that asks for more than there is."""
    import torch

    from workbench.instruments import within_memory

    with pytest.raises(BadInput, match="fit: needs more memory than there is"), within_memory("fit"):
        if ask == "numpy":
            np.ones(2**59)
        elif ask == "torch":
            torch.empty(2**58, dtype=torch.float64)
        else:
            np.empty(2**62)
    with pytest.raises(ValueError, match="something else"), within_memory("fit"):
        raise ValueError("something else")


def test_repeats_have_an_end():
    from workbench.latency import Latency

    with pytest.raises(BadInput, match="repeats"):
        Latency(repeats=10**9)
