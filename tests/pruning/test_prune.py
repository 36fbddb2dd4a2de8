from __future__ import annotations

from functools import partialmethod
from typing import ClassVar

import pytest
import torch
from torch import nn

import workbench
from workbench import BadInput
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.pruning.axes import SPARSITY_SCHEDULE
from workbench.pruning.calibration import Calibration
from workbench.pruning.schedule import cubic
from workbench.results import Result
from workbench.subjects import Mask

SMALL = {"calibration_examples": 8, "predict_examples": 0}


def prune(subject, gradients=8, **fields):
    return Prune(**(SMALL | fields)).with_gradients(gradients).run(subject, Progress(), cache=False)


def sparsities(name, final, events):
    return SPARSITY_SCHEDULE.chosen({"name": name, "events": events})(final, 1)


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "sparsegpt", "obert", "obd"])
@pytest.mark.parametrize("text", ["unstructured", "2:4", "block 4x8"])
def test_pruning_twice_at_the_same_sparsity_changes_nothing(method, text, checkpoints):
    subject = workbench.subject(checkpoints["bert"], data="random")
    once = prune(subject, method=method, pattern=text).subject
    twice = prune(once, method=method, pattern=text).subject
    for a, b in zip(once.layers(), twice.layers(), strict=True):
        if method in (
            "obert",
            "obd",
        ):  # a global threshold is set again on changed scores: nothing comes back, the total stays
            assert not bool(((a.weight == 0) & (b.weight != 0)).any())
        else:
            assert torch.equal(a.weight == 0, b.weight == 0)
    if method not in ("obert", "obd"):
        assert once.evaluate()["loss"] == pytest.approx(twice.evaluate()["loss"], abs=1e-5)


def test_compensation_beats_the_same_mask_without_it():
    vit = workbench.subject("digits-vit")
    for method, other in (("obert", "none"), ("sparsegpt", "none")):
        with_update = prune(vit, method=method, sparsity=0.8, gradients=256, calibration_examples=256)
        without = prune(
            vit, method=method, sparsity=0.8, compensation=other, gradients=256, calibration_examples=256
        )
        assert with_update.facts["loss"] < without.facts["loss"]
    least = prune(vit, method="wanda", sparsity=0.7, compensation="least-squares", calibration_examples=256)
    none = prune(vit, method="wanda", sparsity=0.7, calibration_examples=256)
    assert (least.table.relative_output_error <= none.table.relative_output_error + 1e-6).all()


def test_prediction_stands_beside_the_measurement_and_is_close_for_small_changes():
    vit = workbench.subject("digits-vit")
    result = prune(vit, method="obert", sparsity=0.3, gradients=128, predict_examples=64)
    assert result.facts["predicted_change"] == pytest.approx(result.facts["measured_change"], abs=2e-4)
    assert result.table.predicted_change.sum() == pytest.approx(result.facts["predicted_change"], abs=1e-6)
    assert len(result.figure(show="predicted_change").data) == 1


def test_a_plain_module_is_pruned_and_the_result_reloads(tmp_path):
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    subject = workbench.subject(net, data={"inputs": torch.randn(80, 6), "labels": torch.randint(3, (80,))})
    result = prune(subject, method="wanda", sparsity=0.5, layers="*")
    saved = Result.load(result.save(tmp_path / "r", with_subject=False))
    assert saved.facts["sparsity"] == 0.5 and saved.table.equals(result.table)


def test_schedules_follow_the_formula_and_end_where_they_should():
    assert sparsities("cubic", 0.9, 3) == pytest.approx([0.9 * (1 - (1 - t / 3) ** 3) for t in (1, 2, 3)])
    assert cubic(0.2, 0.8, 0, 5) == pytest.approx(0.2) and sparsities("linear", 0.8, 4)[-1] == 0.8
    assert SPARSITY_SCHEDULE.chosen("one-shot")(0.6, 1) == [0.6]


@pytest.mark.parametrize("recovery", ["finetune", "distil", "low-rank"])
def test_recovery_lowers_the_loss_and_keeps_every_zero(recovery):
    vit = workbench.subject("digits-vit")
    fields = {"method": "magnitude", "sparsity": 0.8, "test_split": "validation"}
    before = prune(vit, **fields)
    training = {"name": recovery, "steps": 30, "learning_rate": 2e-3}
    after = prune(vit, **fields, recovery=training)
    assert after.facts["loss"] < 0.8 * before.facts["loss"]
    assert after.facts["sparsity"] >= before.facts["sparsity"]
    for a, b in zip(before.subject.layers(), after.subject.layers(), strict=True):
        assert bool((b.weight[a.weight == 0] == 0).all())
        assert [type(c) for c in b.changes] == [Mask]
    assert len(after.tables["recovery"]) == 30
    assert (after.facts["trained_share"] < 0.5) == (recovery == "low-rank")


def test_gradual_schedules_train_between():
    result = prune(
        workbench.subject("digits-vit"),
        method="magnitude",
        sparsity=0.7,
        sparsity_schedule={"name": "cubic", "events": 3},
        recovery={"name": "finetune", "steps": 20, "learning_rate": 1e-3},
    )
    assert result.tables["schedule"].sparsity.tolist() == pytest.approx(sparsities("cubic", 0.7, 3), abs=2e-3)
    assert result.facts["sparsity"] == pytest.approx(0.7, abs=2e-3)


def test_the_recovery_is_drawn_while_it_runs():
    class Watching(Progress):
        seen: ClassVar[list[int]] = []

        def preview(self, result):
            Watching.seen.append(len(result.figure().data[0].y))

    result = Prune(**SMALL, method="magnitude", recovery={"name": "finetune", "steps": 4}).run(
        workbench.subject("digits-vit"), Watching(), cache=False
    )
    assert Watching.seen == [1, 2, 3, 4] and len(result.figure(show="recovery").data[0].y) == 4


@pytest.mark.parametrize(
    ("method", "compensation"), [("sparsegpt", "obs"), ("wanda", "bias"), ("obert", "fisher")]
)
def test_statistics_that_do_not_fit_are_measured_group_by_group_to_the_same_end(
    method, compensation, monkeypatch
):
    fields = {
        "method": method,
        "compensation": compensation,
        "sparsity": 0.6,
        "layers": "*layers.0.*,*layers.1.*",
    }
    whole = prune(workbench.subject("digits-vit"), **fields)
    held = []
    for limit in (4 * 96 * 96, 1):  # one layer of the widest, and less than any
        monkeypatch.setattr(Calibration, "__init__", partialmethod(Calibration.__init__, memory=limit))
        again = prune(workbench.subject("digits-vit"), **fields)
        held += [key for key in again.subject._memory if key[2] == "pruning calibration"]
        for stores in (v for k, v in again.subject._memory.items() if k[2] == "pruning calibration"):
            assert (
                sum(k[0] == "moments" for k in stores) <= 1 and sum(k[0] == "gradients" for k in stores) <= 1
            )
        for a, b in zip(whole.subject.layers(), again.subject.layers(), strict=True):
            assert torch.allclose(a.weight, b.weight, atol=1e-5)
        assert again.table.relative_output_error.tolist() == pytest.approx(
            whole.table.relative_output_error.tolist(), rel=1e-3
        )
        monkeypatch.undo()
    assert held


def test_stop_keeps_what_there_is():
    class StopsAtOnce(Progress):
        def show(self, label, done, total):
            if label.startswith("saliency") and done == 1:
                self.stop.set()

    result = Prune(**SMALL, method="magnitude").run(
        workbench.subject("digits-vit"), StopsAtOnce(), cache=False
    )
    assert result.partial and result.facts["sparsity"] == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sparsity": 1.2}, "less than 1"),
        ({"pattern": "2:4", "sparsity": 0.7}, "contradicts"),
        ({"pattern": "stripes"}, "pattern"),
        ({"layers": "nothing*"}, "layers"),
        ({"sparsity_schedule.events": 3}, "sparsity_schedule.events"),
        ({"recovery": "finetune"}, "recovery.steps"),
        ({"method": "wanda", "allocation": "global"}, "allocation"),
        ({"pattern": "heads", "compensation": "fisher"}, "fisher"),
        ({"pattern": "heads", "allocation": "erdos-renyi"}, "erdos-renyi"),
        ({"calibration_split": "nowhere"}, "split"),
        ({"method": "llm-prune"}, "llm-pruner"),
    ],
)
def test_requests_that_make_no_sense_say_why_before_computing(fields, words):
    with pytest.raises(BadInput, match=words):
        Prune(**fields).run(workbench.subject("digits-vit"), Progress(), cache=False)


def test_missing_biases_and_nan_weights_are_named(checkpoints):
    llama = workbench.subject(checkpoints["llama"], data="random")
    with pytest.raises(BadInput, match="bias"):
        prune(llama, method="wanda", compensation="bias")
    with torch.no_grad():
        llama.layers()[3].original[0, 0] = float("nan")
    with pytest.raises(BadInput, match="NaN"):
        prune(llama, method="magnitude")
