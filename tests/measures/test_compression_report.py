"""The front, the run that is explained, and its commands, from a table as a sweep gives it."""

from __future__ import annotations

import shlex

import pandas as pd
import pytest

import workbench
from workbench.measures.compression import report as nearness
from workbench.pruning import Prune
from workbench.quantization import Quantize

RUNS = {
    "Wanda": [Prune(method="wanda", sparsity=s, seed=0) for s in (0.5, 0.8)],
    "GPTQ": [Quantize(format=f"int{b}", rounding="gptq") for b in (3, 4)],
    "nearest": [Quantize(format=f"int{b}", rounding="nearest") for b in (3, 4)],
}


@pytest.fixture
def table() -> pd.DataFrame:
    series = [name for name, group in RUNS.items() for _ in group]
    kl = [0.02, 0.4, 0.09, 0.01, 0.2, 0.05]
    return pd.DataFrame(
        {
            "series": series,
            "sparsity": [0.5, 0.8, None, None, None, None],
            "bits": [None, None, 3, 4, 3, 4],
            "size": [500, 200, 300, 400, 300, 400],
            "kl": kl,
            "kl_low": [0.8 * v for v in kl],
            "kl_high": [1.3 * v for v in kl],
        }
    )


def test_the_front_has_a_log_axis_and_a_command_for_every_point(table):
    on = workbench.subject("digits-vit")
    figure = nearness.divergence_front(table, nearness.commands_of(on, RUNS), 4000)
    assert figure.layout.yaxis.type == "log"
    front = next(trace for trace in figure.data if trace.name == "the front")
    assert list(front.x) == [0.0002, 0.0003, 0.0004] and list(front.y) == [0.4, 0.09, 0.01]
    gptq = next(trace for trace in figure.data if trace.name == "GPTQ")
    assert gptq.error_y.array[0] == pytest.approx(0.3 * 0.09)
    for run, command in zip(RUNS["GPTQ"], gptq.meta["clicked"], strict=True):
        assert command == f"workbench run quantize --format {run.format} --rounding gptq --subject digits-vit"
        words = shlex.split(command)[3:]
        given = {k.removeprefix("--"): v for k, v in zip(words[::2], words[1::2], strict=True)}
        assert given.pop("subject") == "digits-vit" and Quantize(**given) == run


def test_the_smallest_that_is_near_is_explained(table):
    assert nearness.smallest_near(table, RUNS) is RUNS["GPTQ"][0]
    assert nearness.smallest_near(table, {"nearest": RUNS["nearest"]}) is RUNS["nearest"][1]
    assert nearness.smallest_near(table, RUNS, most=1e-3) is RUNS["GPTQ"][1]
    assert nearness.in_short([RUNS["GPTQ"][0]]) == "quantize int3 gptq"


def test_what_cannot_be_shown_is_said(table):
    """Kind: a report over a task that a figure refuses says so, and goes on."""
    said = nearness.divergence_front(table.drop(columns=["kl"]), [""] * 6, 1)
    assert isinstance(said, nearness.Said) and "do not compare" in said._repr_markdown_()
    same = nearness.divergence_front(table.assign(kl=0.0), [""] * 6, 1)
    assert isinstance(same, nearness.Said)
    on = workbench.subject("digits-vit")
    same = nearness.budget_of(on, on.copy(), 4)
    assert isinstance(same, nearness.Said) and "nothing differs" in same.text


def test_the_explained_model_is_that_of_the_run():
    on = workbench.subject("digits-vit")
    run = Quantize(format="int4", rounding="nearest", predict_examples=0, test_examples=16)
    changed = nearness.changed_by(on, [run])
    assert changed.name == "digits-vit, quantize int4 nearest" and on.name == "digits-vit"
    want = run.run(on, cache=False).subject
    for mine, other in zip(changed.layers(), want.layers(), strict=True):
        assert mine.weight.equal(other.weight)
