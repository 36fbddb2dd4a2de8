from __future__ import annotations

import numpy as np
import pytest

import workbench
from workbench import BadInput
from workbench.progress import Progress
from workbench.pruning import FisherSweep, Prune
from workbench.results import Result


def test_every_cell_is_that_pruning_and_the_map_shows_it(tmp_path):
    on = workbench.subject("digits-vit")
    sweep = FisherSweep(damps="0.01,1", gradients="16,32", blocks="8", sparsity=0.8)
    result = sweep.run(on, Progress(), cache=False)
    assert len(result.table) == 4 and set(zip(result.table.damp, result.table.gradients, strict=True)) == {
        (d, g) for d in (0.01, 1.0) for g in (16, 32)
    }
    row = result.table.query("damp == 1 and gradients == 32").iloc[0]
    fisher = {"name": "fisher", "damp": 1.0, "gradients": 32, "block": 8}
    alone = Prune(
        method="obert",
        sparsity=0.8,
        saliency=fisher,
        compensation=fisher,
        predict_examples=0,
        test_split="validation",
    )
    assert row.loss == pytest.approx(alone.run(on, Progress(), cache=False).facts["loss"], rel=1e-6)
    assert result.facts["best_loss"] == result.table.loss.min() < result.facts["worst_loss"]
    shown = Result.load(result.save(tmp_path / "sweep"))
    (trace,) = shown.figure(show="damp x gradients").data
    assert np.asarray(trace.z).shape == (2, 2) and float(np.asarray(trace.z)[1, 1]) == pytest.approx(row.loss)
    assert (
        list(trace.x) == ["0.01", "1"]
        and len(shown.figure(show="gradients x block", value="accuracy").data) == 1
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"damps": "0.1,much"}, "damps: 'much'"),
        ({"gradients": "8.5"}, "gradients: 8.5"),
        ({"blocks": "0"}, "blocks: 0"),
        ({"gradients": "100000"}, "more than the"),
        ({"pattern": "stripes"}, "pattern"),
    ],
)
def test_bad_grids_are_named_before_computing(fields, words):
    with pytest.raises(BadInput, match=words):
        FisherSweep(**fields).run(workbench.subject("digits-vit"), Progress(), cache=False)
