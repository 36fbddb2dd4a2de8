"""Tasks of the harness on a subject: against the harness's own model, by hand, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import socket

import datasets
import numpy as np
import pytest
import torch
import yaml

import workbench
from tests.measures.suites.speaking import speaking
from workbench import BadInput
from workbench.cli import main
from workbench.measures import TaskSuite, docstring_tasks
from workbench.measures.intervals import mcnemar
from workbench.measures.suites import task_files
from workbench.measures.suites.built_tasks import build
from workbench.measures.suites.docstring_items import TASK
from workbench.measures.suites.harness_limits import quiet
from workbench.measures.suites.harness_model import model_class
from workbench.measures.suites.recovery import MEAN, kinds, recovery
from workbench.progress import Progress

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'model-workbench[eval]'")


@pytest.fixture(scope="module")
def docstrings(tmp_path_factory):
    """The 200 items, and a second task with the first 30 as a plain continuation."""
    folder = docstring_tasks(tmp_path_factory.mktemp("tasks") / "docstrings")
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    texts = [{"text": item["choices"][item["answer"]], "question": item["question"]} for item in lines[:30]]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    read = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "texts.jsonl"}}}
    asked = read | {"test_split": "test", "doc_to_target": "{{text}}"}
    more = {
        "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": ""},
        "last-word": {"output_type": "loglikelihood", "doc_to_text": "{{question}}"},
    }
    metrics = {"rolling": ("word_perplexity", "bits_per_byte"), "last-word": ("perplexity", "acc")}
    for name, settings in more.items():
        listed = [{"metric": metric} for metric in metrics[name]]
        said = asked | settings | {"task": name, "metric_list": listed}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(said))
    return folder


def task(folder, **changes):
    """The docstring task with changes, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    item = {"question": "1 + 1 =", "choices": [" 2", " 3"], "answer": 0}
    for name in ("items.jsonl", "shots.jsonl"):
        (folder / name).write_text("\n".join([json.dumps(item)] * 4))
    (folder / "own.yaml").write_text(yaml.safe_dump(TASK | {"task": "own"} | changes))
    return str(folder / "own.yaml")


def test_the_items_are_made_of_what_is_held_out(docstrings, tmp_path):
    items = [json.loads(line) for line in (docstrings / "items.jsonl").read_text().splitlines()]
    assert len(items) == 200 and {item["package"] for item in items} == {"scipy", "sklearn"}
    assert all(len(set(item["choices"])) == 4 for item in items)
    assert len({item["choices"][item["answer"]] for item in items}) == 200
    assert np.bincount([item["answer"] for item in items]).min() > 25  # the place of the answer tells nothing
    once, again = (docstring_tasks(tmp_path / name, 8) for name in ("once", "again"))
    for name in ("items.jsonl", "shots.jsonl", "docstrings.yaml"):
        assert (again / name).read_bytes() == (once / name).read_bytes()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_answers_as_the_harness_own_model_does(architecture, docstrings):
    """The same log-likelihood of every request, the same accuracies and standard errors."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    on = speaking(architecture)
    files = task_files.task_files(f"{docstrings}")
    theirs = HFLM(
        pretrained=on.model,
        tokenizer=on.tokenizer,
        batch_size=8,
        device="cpu",
        backend="causal",
        max_length=512,
    )
    asked = TaskSuite(tasks=str(docstrings), limit=12, shots=1)
    mine = asked.between(on, on)
    for file in files:
        built = build(file, 1)
        built.set_fewshot_seed(0)
        with quiet():
            found = evaluate(
                lm=theirs,
                task_dict={"tasks": {file.name: built}},
                limit=12,
                bootstrap_iters=10 * (file.name == "docstrings"),
            )
        results = found["results"][file.name]
        samples = sorted(found["samples"][file.name], key=lambda sample: sample["doc_id"])
        items = mine.tables["items"][lambda t, name=file.name: t["task"] == name]
        for sample, log_p in zip(samples, items["dense_loglikelihoods"], strict=True):
            wanted = [r if isinstance(r, float) else r[0] for r in sample["filtered_resps"]]
            assert np.abs(np.array(wanted) - log_p).max() < 1e-4
        rows = mine.table[lambda t, name=file.name: (t["task"] == name) & (t["subject"] == on.name)]
        for row in rows.to_dict("records"):
            assert row["score"] == pytest.approx(results[f"{row['metric']},none"], rel=1e-5)
            if file.name == "docstrings":
                assert row["score_se"] == pytest.approx(results[f"{row['metric']}_stderr,none"], rel=1e-9)
    assert set(mine.table["task"]) == {"docstrings", "rolling", "last-word", MEAN}


def test_texts_longer_than_the_model_reads_are_said_in_windows():
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    on = speaking(positions=48)
    texts = ["".join(chr(97 + (k * k) % 26) for k in range(length)) for length in (1, 47, 48, 49, 200)]
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    theirs = HFLM(pretrained=on.model, tokenizer=on.tokenizer, batch_size=4, device="cpu", max_length=48)
    mine = model_class()(on, on.tokenizer, 100).loglikelihood_rolling(asked)
    assert mine == pytest.approx(theirs.loglikelihood_rolling(asked, disable_tqdm=True), abs=1e-4)
    empty = [Instance("loglikelihood", {}, ("", text), 0) for text in texts[1:3]]
    mine = [answer[0] for answer in model_class()(on, on.tokenizer).loglikelihood(empty)]
    assert mine == pytest.approx([a[0] for a in theirs.loglikelihood(empty, disable_tqdm=True)], abs=1e-4)


@pytest.fixture(scope="module")
def compared(docstrings):
    dense, changed = speaking(), speaking(noise=0.1)
    return TaskSuite(tasks=f"{docstrings}/docstrings.yaml, {docstrings}/last-word.yaml").between(
        dense, changed
    )


def test_recovery_and_flips_are_those_of_the_items(compared):
    table, items = compared.table, compared.tables["items"]
    mine = items[items["task"] == "docstrings"]
    assert len(mine) == 200
    for metric in ("acc", "acc_norm"):
        rows = table[(table["metric"] == metric) & (table["task"] == "docstrings")].set_index("subject")
        dense, changed = rows.loc["llama 0.0"], rows.loc["llama 0.1"]
        before, after = mine[f"dense_{metric}"], mine[f"changed_{metric}"]
        lost, won = int(((before == 1) & (after == 0)).sum()), int(((before == 0) & (after == 1)).sum())
        assert lost > 0 and won > 0
        assert (changed["right_to_wrong"], changed["wrong_to_right"]) == (lost, won)
        assert changed["mcnemar_p"] == mcnemar(lost, won)
        assert changed["recovery"] == pytest.approx(100 * after.mean() / before.mean())
        assert changed["recovery_low"] < changed["recovery"] < changed["recovery_high"]
        assert dense["score"] == before.mean() and changed["score"] == after.mean()
        assert dense["score_se"] == pytest.approx(math.sqrt(before.var(ddof=1) / 200))
        assert (mine[f"{metric}_became"] == "right to wrong").sum() == lost
        assert dense["chance"] == 0.25 and math.isnan(dense["recovery"])
    picked = [int(np.argmax(found)) for found in mine["changed_loglikelihoods"]]
    assert picked == mine["changed_choice"].tolist()
    assert ((mine["changed_choice"] == mine["target"].astype(int)) == mine["changed_acc"]).all()
    facts = compared.facts
    both = table[(table["task"] == MEAN) & (table["metric"] == "acc")].set_index("subject")
    assert facts["acc_recovery"] == both["recovery"]["llama 0.1"] and facts["items"] == 230
    assert "McNemar" not in compared.summary() and "acc recovery" in compared.summary()


def test_the_interval_holds_the_truth_where_few_items_flip():
    """3 % of 40 items flip: the percentile bootstrap's 95 % interval holds the truth half of the time."""
    generator = np.random.default_rng(0)
    shares = np.array([0.5, 0.02, 0.01, 0.47])
    held = 0
    for _ in range(100):
        value, low, high = recovery([generator.multinomial(40, shares)])
        held += low <= 100 * 0.51 / 0.52 <= high
        assert low <= value <= high
    assert held >= 92
    one = np.array([1.0, 1, 1, 0, 0]), np.array([1.0, 0, 0, 1, 0])
    assert kinds(*one).tolist() == [1, 2, 1, 1]
    value, low, high = recovery([np.array([0, 0, 3, 5])])
    assert math.isnan(value) and 0 < low < high
    mean = recovery([np.array([500, 0, 0, 500]), np.array([200, 200, 0, 600])])
    assert (
        mean[0] == pytest.approx(100 * (0.5 + 0.2) / (0.5 + 0.4))
        and mean[1] > recovery([np.array([200, 200, 0, 600])])[2]
    )


def test_figures_have_units_and_intervals(compared):
    figure = compared.figure()
    assert figure.layout.yaxis.title.text == "recovery (%)" and "95 %" in figure.layout.title.text
    assert list(figure.data[0].x) == ["docstrings", MEAN]  # no greedy last word is right
    assert np.all(figure.data[0].error_y.array > 0)
    scores = compared.figure(show="scores", metric="acc_norm")
    assert [trace.name for trace in scores.data] == ["llama 0.0", "llama 0.1", "guessing"]
    flips = compared.figure(show="flips")
    assert min(flips.data[0].y) > 0 > max(flips.data[1].y)


def test_from_the_command_line_saved_and_cached(docstrings, tmp_path, capsys, monkeypatch):
    """Without the network: no socket is opened."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("went to the network"))
    speaking().save(tmp_path / "dense")
    speaking(noise=0.2).save(tmp_path / "small")
    speaking().save(tmp_path / "itself")
    given = ["--subject", str(tmp_path / "dense"), "--candidates", f"{tmp_path}/small,{tmp_path}/itself"]
    tasks = ["--tasks", str(docstrings / "docstrings.yaml"), "--limit", "20", "--shots", "2"]
    assert main(["run", "task-suite", *given, *tasks, "--out", str(tmp_path / "out")]) == 0
    assert "acc best recovery" in capsys.readouterr().out
    result = workbench.Result.load(next((tmp_path / "out").rglob("result.json")).parent)
    rows = result.table.set_index(["subject", "metric"])
    assert rows["recovery"]["itself", "acc"] == 100 and rows["mcnemar_p"]["itself", "acc"] == 1
    assert list(result.table["subject"].unique()) == ["llama 0.0", "small", "itself"]
    assert [trace.name for trace in result.figure().data][:2] == ["small", "itself"]


def test_a_changed_task_file_or_data_is_another_run(tmp_path):
    on, own = speaking(), task(tmp_path / "own")
    asked = TaskSuite(tasks=own)
    keys = {asked.key(on)}
    (tmp_path / "own" / "items.jsonl").write_text(
        '{"question": "a", "choices": ["b", "c"], "answer": 1}\n' * 5
    )
    keys.add(asked.key(on))
    task(tmp_path / "own", description="Answer.")
    keys |= {asked.key(on), asked.with_fields(shots=1).key(on)}
    assert len(keys) == 4


def refused(match, tasks, on=None, **fields):
    with pytest.raises(BadInput, match=match) as said:
        TaskSuite(tasks=str(tasks), **fields).run(on or speaking(), cache=False)
    assert "\n" not in str(said.value)
    return str(said.value)


def test_without_data_the_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("went to the network"))
    named = {"dataset_path": "some-org/some-data", "dataset_kwargs": {}}
    own = task(tmp_path / "own", **named)
    said = refused("some-org/some-data of 'own' is not on this disk, and nothing is fetched", own)
    assert f"put its files into {tmp_path / 'cache' / 'task-data' / 'some-org' / 'some-data'}" in said
    (tmp_path / "data").mkdir()
    said = refused("put its files into", own, task_data=str(tmp_path / "data"))
    assert str(tmp_path / "data" / "some-org" / "some-data") in said
    refused("'nowhere' is no folder", own, task_data="nowhere")
    held = tmp_path / "data" / "some-org" / "some-data"
    held.mkdir(parents=True)
    item = json.dumps({"question": "1 + 1 =", "choices": [" 2", " 3"], "answer": 0})
    for name in ("test", "validation"):
        (held / f"{name}.jsonl").write_text(f"{item}\n" * 3)
    asked = TaskSuite(tasks=own, task_data=str(tmp_path / "data"))
    alone = asked.run(speaking(), cache=False)
    assert alone.facts["items"] == 3 == len(alone.tables["items"]) and "acc_se" in alone.facts
    assert alone.view_model().model_fields["show"].default == "scores" and len(alone.figure().data) == 2
    with pytest.raises(BadInput, match="'own' .* does not open: .*; its data is read from .*some-data"):
        TaskSuite(tasks=task(tmp_path / "part", **named, dataset_name="part"), task_data=asked.task_data).run(
            speaking(), cache=False
        )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    written = next((tmp_path / "cache" / "task-data-read").rglob("dataset_info.json")).parent
    kept = tmp_path / "prepared" / "some-org___some-data" / "default" / "0.0.0"
    shutil.copytree(written, kept / "abc")
    for file in (kept / "abc").glob("*.arrow"):
        file.rename(kept / "abc" / f"some-data-{file.name.rpartition('-')[2]}")
    assert TaskSuite(tasks=own).run(speaking(), cache=False).facts["items"] == 3
    (held / "README.md").write_text("---\nconfigs:\n- data_files: https://example.org/x.jsonl\n---\n")
    refused(
        "README.md of .* names https://example.org/x.jsonl, and nothing is fetched",
        own,
        task_data=asked.task_data,
    )
    gone = task(tmp_path / "gone", dataset_kwargs={"data_files": "away.jsonl"})
    refused("'own' reads .*away.jsonl, which is not there; put the file into", gone)


def test_code_of_a_task_file_is_refused(tmp_path):
    """Kind: opening somebody's task file runs nothing of theirs, by whatever way the format has for it."""
    own = task(tmp_path / "own")
    (tmp_path / "own" / "mine.py").write_text("raise SystemExit('it ran')")
    text = (tmp_path / "own" / "own.yaml").read_text()
    base = tmp_path / "own" / "base"
    for line in ("process_docs: !function mine.run", "doc_to_text: !function mine.run"):
        (tmp_path / "own" / "own.yaml").write_text(f"{text}\n{line}\n")
        refused("names the function mine.run, whose code would run with your rights", own)
        base.write_text(f"{line}\n")
        (tmp_path / "own" / "own.yaml").write_text(f"include: base\n{text}")
        refused("names the function mine.run", own)
    (tmp_path / "own" / "own.yaml").write_text(f"{text}\nclass: !!python/name:os.system\n")
    refused("cannot be read", own)
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    refused("does not open: SecurityError", task(tmp_path / "escape", doc_to_text=escape))
    for said in ({"metric": "acc", "hf_evaluate": True}, {"metric": "./mine"}, "mine", {"metric": ["acc"]}):
        refused(
            "none of the harness's own and would be loaded as code", task(tmp_path / "hf", metric_list=[said])
        )
    refused("takes its prompt from elsewhere", task(tmp_path / "prompt", use_prompt="mine.yaml:x"))
    elsewhere = TASK["dataset_kwargs"] | {"cache_dir": str(tmp_path / "written")}
    TaskSuite(tasks=task(tmp_path / "away", dataset_kwargs=elsewhere)).run(speaking(), cache=False)
    assert not (tmp_path / "written").exists()
    refused("not on this disk", task(tmp_path / "pickles", dataset_path="pandas"))


def test_what_cannot_be_asked_is_one_line(tmp_path, monkeypatch):
    generate = task(tmp_path / "generate", output_type="generate_until")
    refused("texts are not generated here; tasks that work are multiple_choice, loglikelihood", generate)
    refused(
        "reads https://.*nothing is fetched",
        task(tmp_path / "w", dataset_kwargs={"data_files": "https://a/b"}),
    )
    for longer in ("x" * 300, "é" * 140):  # than any file's name can be
        named = {"data_files": {"test": ["here.jsonl", longer]}}
        refused("which is not there", task(tmp_path / "file", dataset_kwargs=named))
        refused("not on this disk", task(tmp_path / "set", dataset_path=longer))
        refused("cannot be read", task(tmp_path / "include", include=longer))
        refused("is not a file", longer + ".yaml")
        refused("is no task of the harness", longer)
        refused("is no folder", "docstrings", task_data=longer)
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for text in (
        bomb,
        "a: &a [*a]",
        "&a a: {*a : 1}",
        "- 1",
        "a: [",
        "\x00",
        "include: own.yaml\ntask: own\n",
    ):
        (tmp_path / "own.yaml").write_text(text)
        refused(
            "unfolds to more than|cannot be read|no task file|includes itself|says no", tmp_path / "own.yaml"
        )
    refused("tasks: is empty", "")
    refused("'away.yaml' is not a file", "away.yaml")
    (tmp_path / "none").mkdir()
    refused("holds no task file", tmp_path / "none")
    refused("'own' is in .* and in", f"{task(tmp_path / 'a')},{task(tmp_path / 'b')}")
    refused("does not open: UndefinedError: 'nothing'", task(tmp_path / "u", doc_to_text="{{nothing}}"))
    monkeypatch.setattr(task_files, "harness_index", lambda: {"hellaswag": None})
    refused("'helaswag' is no task of the harness.*did you mean hellaswag", "helaswag")
    own = task(tmp_path / "own")
    without = speaking()
    without.tokenizer = None
    refused("has no tokenizer", own, without)
    refused("has no chat template", own, chat=True)
    refused("sequence-classification continues no text", own, workbench.subject("minilm-docstrings"))
    monkeypatch.setattr(task_files.importlib.util, "find_spec", lambda name: None)
    refused(
        r"need the package lm-eval, which is not installed; run: pip install 'model-workbench\[eval\]'", own
    )


@pytest.mark.parametrize(
    "items, said",
    [
        ("null\n0.0\n{}\n", "line 1 of .* is no object"),
        ('[1, {"question": "a"}]', "begins a list of something else"),
        ('{"question": "a"}\n{"question"', "line 2 of .* is not JSON"),
        (
            '{"question": "a", "choices": ["b", "c"], "answer": 0}\n{"question": "a", "answer": 0}\n',
            "item that its own settings do not fit",
        ),
    ],
)
def test_items_that_are_no_items(items, said, tmp_path):
    """Kind: a file of somebody's ends the process, in a library that reads it; the first three end Arrow's
    reader or worse, the last one is found when it is asked.
    """
    file = task(tmp_path / "own")
    (tmp_path / "own" / "items.jsonl").write_text(items)
    refused(said, file)


def test_names_of_the_harness_mean_its_tasks_groups_and_tags(monkeypatch):
    """Its own functions are part of the library that is installed, and run."""
    from lm_eval import tasks
    from lm_eval.tasks._index import TaskIndex

    root = task_files.Path(tasks.__file__).parent
    index = TaskIndex.build([root / "hellaswag", root / "arc", root / "glue" / "rte", root / "blimp"])
    monkeypatch.setattr(task_files, "harness_index", lambda: index)
    monkeypatch.setattr(task_files, "check_data", lambda task: None)
    found = task_files.task_files("hellaswag,ai2_arc")
    assert [task.name for task in found] == ["hellaswag", "arc_challenge", "arc_easy"]
    assert found[0].settings["process_docs"].home == root / "hellaswag"
    assert found[0].dataset == "Rowan/hellaswag" and isinstance(
        found[0].settings["process_docs"], task_files.Code
    )
    assert len(task_files.task_files("blimp")) > 60


def test_chat_and_examples_are_the_same_for_both(tmp_path, monkeypatch):
    prompts = []
    kind = model_class()
    monkeypatch.setattr(
        kind, "answers", lambda self, pairs: prompts.append(pairs) or [(0.0, False)] * len(pairs)
    )
    one, two = speaking(), speaking(noise=0.1)
    one.tokenizer.chat_template = "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}<assistant>"
    with pytest.warns(workbench.errors.Notice, match="no better than guessing"):
        TaskSuite(shots=3, chat=True, limit=5).between(one, two)
    assert prompts[0] == prompts[1] and len(prompts[0]) == 20
    text = one.tokenizer.decode(prompts[0][0][0])
    assert text.startswith("<user>def ") and text.endswith("<assistant>") and text.count("def ") >= 4


def test_a_model_with_other_words_reads_by_its_own_tokenizer():
    """Kind: two models are asked the same texts, whatever their tokens are."""
    one, two = speaking(), speaking(noise=0.1)
    two.tokenizer.add_tokens(["a word that no text has"])
    seen, plain = [], two.tokenizer.encode
    two.tokenizer.encode = lambda text, **more: seen.append(text) or plain(text, **more)
    with pytest.warns(workbench.errors.Notice, match="'llama 0.1' has other words than the reference"):
        TaskSuite(limit=2).between(one, two)
    assert seen


def test_an_early_stop_keeps_whole_tasks(docstrings, tmp_path):
    class After(Progress):
        def __init__(self, moves):
            super().__init__()
            self.moves = moves

        def show(self, label, done, total):
            self.moves -= 1
            if self.moves == 0:
                self.stop.set()

    asked = TaskSuite(
        tasks=f"{docstrings}/docstrings.yaml,{docstrings}/rolling.yaml", limit=8, batch_tokens=512
    )
    on = speaking()
    partial = asked.between(on, speaking(noise=0.1), After(1))
    assert len(partial.table) == 0 and len(partial.figure().data) == 0 and "reference" in partial.summary()
    whole = asked.between(on, on)
    on._memory.clear()
    for moves in range(2, 40, 12):
        part = asked.between(on, on, After(moves))
        on._memory.clear()
        merged = part.table.merge(whole.table, how="left", indicator=True)
        assert (merged["_merge"] == "both").all()
    result = asked.run(on, After(2), cache=False)
    assert result.partial


def test_an_interrupted_run_goes_on(docstrings, tmp_path, monkeypatch):
    """What was answered is not asked again."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WORKBENCH_CHECKPOINT_SECONDS", "0")
    from workbench.measures.suites import continuations

    asked = TaskSuite(tasks=f"{docstrings}/docstrings.yaml", limit=10, batch_tokens=512)
    counted, plain = [], continuations.answers
    monkeypatch.setattr(continuations, "answers", lambda *given: counted.append(1) or plain(*given))

    class Stopping(Progress):
        def show(self, label, done, total):
            if done == 3:
                self.stop.set()

    asked.run(speaking(), Stopping())
    first = len(counted)
    resumed = asked.run(speaking())
    total = len(counted)
    fresh = asked.run(speaking(), cache=False, fresh=True)
    assert 0 < first < len(counted) - total and total == len(counted) - total
    assert resumed.table.equals(fresh.table) and torch.is_tensor(torch.zeros(1))
