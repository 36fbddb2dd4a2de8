from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import workbench
from workbench import BadInput, Progress, pruning, quantization, studies
from workbench.names import find


@pytest.fixture()
def vit(checkpoints, cache):
    return workbench.subject(checkpoints["vit"], data="random")


def options(**more):
    return {"predict_examples": 4, "calibration_examples": 8} | more


def test_a_sweep_in_processes_equals_one_by_one_and_is_free_again(vit):
    runs = {
        "magnitude": [pruning.Prune(method="magnitude", sparsity=s, **options()) for s in (0.3, 0.6)],
        "wanda": [pruning.Prune(method="wanda", sparsity=s, **options()) for s in (0.3, 0.6)],
    }
    table = studies.sweep(vit, runs, jobs=2)
    assert (
        list(table["series"]) == ["magnitude", "magnitude", "wanda", "wanda"]
        and list(table["sparsity"]) == [0.3, 0.6] * 2
    )
    assert all(chain.stored(vit) for group in runs.values() for chain in group)
    alone = runs["wanda"][1].run(vit, cache=False)
    assert alone.facts["loss"] == pytest.approx(table["loss"].iloc[3], abs=1e-6)


def test_a_plain_module_is_swept_in_this_process(cache):
    rows = {"inputs": torch.randn(16, 6), "labels": torch.arange(16) % 2}
    layers = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    plain = workbench.subject(layers, data=rows)
    runs = {"magnitude": [pruning.Prune(sparsity=s, predict_examples=0) for s in (0.3, 0.6)]}
    assert len(studies.sweep(plain, runs, jobs=2)) == 2


def test_chains_that_begin_alike_compute_the_beginning_once(vit):
    prune = pruning.Prune(method="magnitude", sparsity=0.5, **options())
    chains = [
        (
            prune,
            quantization.Quantize(
                format=f"int{b}", group_size=16, predict_examples=4, calibration_examples=8
            ),
        )
        for b in (3, 8)
    ]
    assert not studies.stored(vit, chains[0])
    table = studies.sweep(vit, {"both": chains}, jobs=1)
    assert list(table["sparsity"]) == [0.5, 0.5] and list(table["bits"]) == [3, 8]
    assert studies.stored(vit, chains[1])
    with pytest.raises(BadInput, match="nothing can follow"):
        studies.sweep(vit, {"wrong": [(find("weight-spectrum")(), prune)]}, jobs=1)


def test_chains_go_where_their_beginning_is_computed(vit):
    first, second, third = [
        (pruning.Prune(method="magnitude", sparsity=s, **options()),) for s in (0.3, 0.5, 0.7)
    ]
    longer = (
        *second,
        quantization.Quantize(format="int4", group_size=16, predict_examples=4, calibration_examples=8),
    )
    found = studies.families(vit, {"short": [first, second, third], "both": [longer], "none": []})
    assert found == [[[first], [second, longer], [third]]]
    assert studies.dealt(found[0], 2) == [[first, second, longer], [third]] and studies.dealt(
        found[0], 1
    ) == [[first, second, longer, third]]
    assert studies.families(vit, {"both": [longer], "short": [second]}) == [[[second, longer]]]
    last: dict = {}
    pruned = studies.run_chain(vit, second, Progress(), last, [longer])
    assert list(last.values()) == [pruned.subject]
    studies.run_chain(vit, longer, Progress(), last, [third])
    assert list(last.values()) == [pruned.subject]
    studies.run_chain(vit, third, Progress(), last, [])
    assert not last  # a model that nothing goes on from is not held


def test_findings_name_the_ordering_that_failed(vit):
    card = studies.card(vit)
    rows = [
        {"series": "oBERT", "sparsity": 0.5, "loss": 2.0},
        {"series": "Wanda", "sparsity": 0.5, "loss": 1.0},
        {"series": "GPTQ", "bits": 3, "loss": 1.0},
        {"series": "round to nearest", "bits": 3, "loss": 2.0},
    ]
    found = studies.findings(pd.DataFrame(rows), card)
    assert found.loc["oBERT <= Wanda", "held"] == "NO" and found.loc["GPTQ < nearest", "held"] == "yes"


def test_rank_correlation_needs_three_values():
    assert studies.rank_correlation([1, 2, 3], [2, 4, 9]) == pytest.approx(1)
    assert pd.isna(studies.rank_correlation([1, 1], [2, 3]))


def test_what_is_stored_of_a_model_is_told_as_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kind: a number that was measured at another time stands among those of this run."""
    monkeypatch.setenv("WORKBENCH_EVIDENCE", str(tmp_path))
    record = {"subject": "own-model", "holds": False, "claim": "c", "note": "KL 0.5", "seconds": 90}
    (tmp_path / "pruning").mkdir()
    (tmp_path / "pruning" / "wanda.json").write_text(json.dumps(record))
    on = workbench.subject("digits-softmax")
    assert not len(studies.stored_orderings(on))
    on.name = "own-model"
    (row,) = studies.stored_orderings(on).to_dict("records")
    assert row == {
        "method": "wanda",
        "claim": "c",
        "stored verdict": "does not hold",
        "measured": "KL 0.5",
        "minutes": 1.5,
    }
