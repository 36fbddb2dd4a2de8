"""The conclusion of a compression report: the model that its rule says, in numbers that are the table's."""

from __future__ import annotations

import shlex
from typing import Any

import pandas as pd
import pytest

import workbench
from workbench import studies
from workbench.cli import main
from workbench.measures import compare
from workbench.measures.compression import conclusion as concluding
from workbench.measures.compression import report as nearness
from workbench.measures.compression.conclusion import conclusion, recommended
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.quantization import Quantize

RUNS: dict[str, Any] = {
    "Wanda": [Prune(method="wanda", sparsity=s) for s in (0.5, 0.8)],
    "GPTQ": [Quantize(format="int4", rounding="gptq")],
    "oBERT, then GPTQ": [(Prune(sparsity=0.5), Quantize(format="int8", rounding="gptq"))],
}


def dense(**changes: Any) -> studies.Card:
    usual = dict(facts={}, loss=0.3, score="accuracy", value=0.9, bytes=4000, higher_is_better=True)
    return studies.Card(**(usual | changes))


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "series": ["Wanda", "Wanda", "GPTQ", "oBERT, then GPTQ"],
            "sparsity": [0.5, 0.8, None, 0.5],
            "bits": [None, None, 4, 8],
            "size": [2400, 1000, 560, 1300],
            "loss": [0.31, 0.5, 0.32, 0.3],
            "accuracy": [0.895, 0.7, 0.89, 0.9],
            "kl": [0.02, 0.4, 0.01, 0.001],
            "kl_low": [0.01, 0.3, 0.005, 0.0],
            "kl_high": [0.03, 0.5, 0.02, 0.002],
        }
    )


def test_the_smallest_within_a_point_is_recommended_else_the_best(table: pd.DataFrame) -> None:
    assert recommended(table, dense()) == 2
    assert recommended(table, dense(value=0.95)) == 3
    by_loss = dense(score="loss", value=0.3, higher_is_better=False)
    assert recommended(table, by_loss) == 3
    assert recommended(table, dense(score="loss", value=0.35, higher_is_better=False)) == 2


def test_it_is_said_with_ratio_interval_and_command(table: pd.DataFrame) -> None:
    on = workbench.subject("digits-vit")
    short = conclusion(on, table, RUNS, dense(), 100)
    first, second, third = short.sentences
    assert first.startswith(
        "GPTQ, 4 bits is the smallest of 4 within a point of the dense model's accuracy: 560 bytes"
    )
    assert (
        "7.1 times less" in first
        and "accuracy 89.0 % (81.4 to 93.7)" in first
        and "100 test examples" in first
    )
    assert "0.01 nats an item" in second and second.endswith("0.005 to 0.02: close.")
    assert third == "Nothing that was tried is smaller."
    assert list(short.table.index) == ["recommended", "smallest", "nearest to the dense model", "dense"]
    # the distance of a chain is to its first step's model, so it is not the nearest
    assert short.table.loc["nearest to the dense model", "model"] == "GPTQ, 4 bits"
    words = shlex.split(short.commands[0])
    assert words[:3] == ["workbench", "run", "quantize"] and words[-2:] == ["--out", "model"]
    chained = conclusion(on, table, RUNS, dense(value=0.95), 100)
    assert "none of which is within a point" in chained.sentences[0]
    assert [line.split(" --subject ")[1] for line in chained.commands] == [
        "digits-vit --out step-1",
        "step-1 --out model",
    ]
    assert "<table" in short._repr_html_()


@pytest.mark.long
def test_the_model_that_is_written_is_the_one_that_was_measured(
    cache, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("WORKBENCH_REPORT_FOLDER", str(tmp_path))
    on = workbench.subject("digits-vit")
    shared = dict(calibration_examples=8, predict_examples=0)
    runs = {"nearest": [Quantize(format="int8", test_examples=64, **shared)]}  # type: ignore[arg-type]
    every = studies.sweep(on, runs, Progress(), jobs=1)
    short = conclusion(on, every, runs, studies.card(on), 64, concluding.model_folder(""))
    assert short.sentences[-1] == "The recommended model is in the folder model, beside this report."
    assert short.folder == str(tmp_path / "model") and short.chain == (runs["nearest"][0],)
    opened = nearness.changed_by(on, short.chain, short.folder)
    made = nearness.changed_by(on, short.chain)
    assert opened.name == made.name
    for one, two in zip(opened.layers(), made.layers(), strict=True):
        assert one.weight.equal(two.weight)
    saved = workbench.subject(str(tmp_path / "model"))
    assert saved.evaluate("test", limit=64)["loss"] == pytest.approx(every["loss"][0], rel=1e-5)
    # and the command that the report shows makes the same model
    words = shlex.split(short.commands[0])[1:]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    assert main([*words, "--test-examples", "64"]) == 0
    again = workbench.subject(str(tmp_path / "again"))
    assert again.evaluate("test", limit=64)["loss"] == pytest.approx(every["loss"][0], rel=1e-5)


@pytest.mark.long
def test_a_recommended_chain_is_held_beside_the_dense_model(cache, tmp_path) -> None:
    """Its runs measure the distance to the model that each begins at."""
    on = workbench.subject("digits-vit")
    shared = dict(calibration_examples=8, predict_examples=0)
    steps = (Prune(method="magnitude", sparsity=0.3, **shared), Quantize(format="int8", **shared))  # type: ignore[arg-type]
    runs = {"both": [steps]}
    every = studies.sweep(on, runs, Progress(), jobs=1)
    short = conclusion(on, every, runs, studies.card(on), on.size("test"), str(tmp_path / "model"))
    found = compare(on, nearness.changed_by(on, steps), batch_size=64).measures()
    assert float(short.table.loc["recommended", "KL (nats)"]) == pytest.approx(found["kl"], rel=0.01)
    assert studies.overview(every)["KL to dense (nats)"].tolist() == [""]
