from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import transformers

import workbench
from tests.conftest import tiny
from workbench import BadInput
from workbench.progress import Progress
from workbench.pruning import DampDoctor, Prune
from workbench.pruning.allocation.latency import BUCKETS, LatencyTable, choose, expected_seconds, levels
from workbench.pruning.engine.structures import Scored
from workbench.pruning.studies.damp_doctor import factorises, smallest_damp
from workbench.subjects.structure.units import discover


def case():
    groups = discover(tiny("bert"))
    table = LatencyTable(1.0, {}, {}, {"heads": 2, "neurons": 2})
    for group in groups:
        table.removed[group.kind] = levels(group)
        table.seconds[group.kind] = [1 - 0.4 * (c / group.units) ** 1.5 for c in table.removed[group.kind]]
    torch.manual_seed(4)
    scored = []
    for group in groups:
        cost = torch.cat([torch.zeros(1), torch.rand(group.units).cumsum(0)])
        scored.append(Scored(group, torch.arange(group.units).reshape(1, -1), cost))
    return scored, table


@pytest.mark.parametrize("speedup", [1.1, 1.3, 1.5, 2.0])
def test_the_search_is_as_good_as_trying_everything(speedup):
    scored, table = case()
    counts = choose(scored, table, speedup)
    assert expected_seconds(scored, counts, table) <= table.dense / speedup + 1e-6
    spent = sum(float(s.cost[c] / s.cost[-1]) for s, c in zip(scored, counts, strict=True))
    tighter = (
        table.dense * (1 - 1 / speedup) * (1 + 4 / BUCKETS)
    )  # savings are rounded down to a bucket, once a group
    best = np.inf
    for levels_ in product(*(table.removed[s.group.kind] for s in scored)):
        if table.dense - expected_seconds(scored, levels_, table) >= tighter:
            best = min(best, sum(float(s.cost[c] / s.cost[-1]) for s, c in zip(scored, levels_, strict=True)))
    assert spent <= best + 1e-9


def test_a_speedup_out_of_reach_says_what_is_the_most():
    scored, table = case()
    with pytest.raises(BadInput, match="the most is"):
        choose(scored, table, 50.0)


def test_prune_to_a_speedup_removes_units_and_reports_it(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=4096,
        image_size=32,
        patch_size=8,
        num_labels=3,
    )
    transformers.ViTForImageClassification(config).save_pretrained(
        tmp_path / "wide"
    )  # its neurons take nearly all the time, however busy the machine
    subject = workbench.subject(tmp_path / "wide", data="random")
    fields = {
        "method": "magnitude",
        "pattern": "neurons",
        "allocation": {"name": "latency", "speedup": 1.5},
        "predict_examples": 0,
    }
    result = Prune(**fields).run(subject, Progress(), cache=False)
    assert result.facts["expected_speedup"] > 1 and result.facts["speedup"] > 0
    assert result.subject.parameter_count() < subject.parameter_count()
    with pytest.raises(BadInput, match=r"allocation.speedup: .* it is an option of latency"):
        Prune(method="magnitude", pattern="neurons", **{"allocation.speedup": 2.0})
    for fields in ({"pattern": "neurons"}, {"pattern": "block", "allocation.speedup": 2.0}):
        with pytest.raises(BadInput, match="belong together"):
            Prune(method="magnitude", allocation="latency", **fields).run(subject, Progress(), cache=False)


def test_damp_doctor_finds_rank_dead_inputs_and_the_damp_that_is_needed():
    vit = workbench.subject("digits-vit")
    result = DampDoctor(damps=2, calibration_examples=32).run(vit, Progress(), cache=False)
    table = result.table.set_index("layer")
    assert (table["rank"] <= table.inputs).all() and len(result.tables["damps"]) >= 1
    assert len(result.figure().data) and len(result.figure(show="damps").data)
    x = torch.randn(5, 20)
    x[:, 3] = 0
    gram = x.T @ x / 5
    needed = smallest_damp(gram)
    assert 1e-9 < needed < 1e-2 and factorises(gram, needed * 1.01) and not factorises(gram, needed / 100)
    assert smallest_damp(torch.eye(4)) == 1e-10
