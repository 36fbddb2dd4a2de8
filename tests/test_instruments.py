from __future__ import annotations

import gc
import json
import threading
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import workbench
from workbench import instruments
from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.instruments import SubjectInstrument
from workbench.names import catalog, find
from workbench.progress import Progress
from workbench.quantization import Quantize
from workbench.results import Result
from workbench.storage import replacing
from workbench.storage.writing import MANIFEST


class Norms(SubjectInstrument):
    """Layer norms, slowly enough to be stopped: an instrument as a user would write one."""

    power: float = parameter(2.0, "exponent of the norm", ge=1, le=10)
    layers: str = parameter("blocks", "which layers")

    def check(self, on):
        on.layers(self.layers)

    def _run(self, on, progress):
        rows = []
        for layer in progress.track(on.layers(self.layers), "layers"):
            rows.append({"layer": layer.name, "norm": float(layer.weight.detach().norm(self.power))})
        return self.result(
            pd.DataFrame(rows),
            {"largest": max(r["norm"] for r in rows)},
            arrays={"norms": np.array([r["norm"] for r in rows])},
        )


class Halve(SubjectInstrument):
    """Halves every weight: the smallest instrument that changes a model."""

    changes_model = True

    def _run(self, on, progress):
        for layer in on.layers():
            layer.write(layer.weight / 2)
        return self.result(pd.DataFrame({"layer": [layer.name for layer in on.layers()]}), {}, subject=on)


@pytest.fixture()
def net(cache):
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return workbench.subject(module, data={"inputs": torch.randn(40, 4), "labels": torch.randint(3, (40,))})


def test_fields_are_the_only_declaration():
    assert list(Norms.parameters()) == ["power", "layers", "device", "seed"]
    assert Norms.parameters()["power"].description == "exponent of the norm"
    assert Norms.name() == "norms" and find("norms") is Norms and "halve" in catalog()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"power": 0.5}, "power: 0.5 is not accepted, it should be greater than or equal to 1"),
        ({"pwoer": 2}, "pwoer: unknown field; did you mean power"),
        ({"device": "gpu"}, "device: 'gpu'"),
        ({"seed": -1}, "seed: -1"),
    ],
)
def test_bad_fields_are_named_in_one_line(fields, message):
    with pytest.raises(BadInput) as error:
        Norms(**fields)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_layer_glob_is_checked_before_the_run(net):
    with pytest.raises(BadInput, match="matches no layer"):
        Norms(layers="nothing*").run(net)
    with (
        pytest.raises(BadInput, match="no CUDA device")
        if not torch.cuda.is_available()
        else pytest.raises(ZeroDivisionError)
    ):
        Norms(device="cuda").run(net) if not torch.cuda.is_available() else 1 / 0


def test_results_are_stored_found_again_and_loaded(net, cache, tmp_path):
    first = Norms().run(net)
    slot = next((cache / "results").iterdir())
    marked = json.loads((slot / "result.json").read_text())
    marked["facts"]["largest"] = -1.0
    (slot / "result.json").write_text(json.dumps(marked))
    (slot / MANIFEST).unlink()  # with it, the change would be found out
    assert Norms().run(net).facts["largest"] == -1.0  # answered from the store
    assert Norms(power=3).run(net).facts["largest"] > 0
    saved = Result.load(first.save(tmp_path / "out"))
    assert (
        saved.instrument == first.instrument
        and saved.table.equals(first.table)
        and saved.facts == first.facts
    )
    assert (
        np.array_equal(saved.arrays["norms"], first.arrays["norms"])
        and saved.provenance["fingerprint"] == net.fingerprint
    )
    with pytest.raises(BadInput, match="no saved result"):
        Result.load(tmp_path)


def test_a_stop_keeps_what_is_there_and_is_not_stored(net, cache):
    class StopAfterOne(Progress):
        def show(self, label, done, total):
            if done == 1:
                self.stop.set()

    result = Norms().run(net, progress=StopAfterOne())
    assert result.partial and len(result.table) == 1 and "partial" in result.summary()
    assert not Norms().stored(net)


def test_changing_a_model_leaves_the_original_alone_and_chains_from_the_store(net):
    before = net.model[0].weight.clone()
    once = Halve().run(net)
    assert torch.equal(net.model[0].weight, before) and torch.equal(once.subject.model[0].weight, before / 2)
    again = Halve().run(net)
    stored = Halve().run(again.subject)  # computes the first step, to be halved again
    assert torch.equal(stored.subject.model[0].weight, before / 4)
    again = Halve().run(net)
    assert Halve().run(again.subject).subject.fingerprint == stored.subject.fingerprint
    assert (
        again.subject._model is None and again.subject.fingerprint == once.subject.fingerprint
    )  # nothing computed yet
    assert torch.equal(Halve().run(again.subject).subject.model[0].weight, before / 4)
    assert [s["instrument"] for s in again.subject.history] == ["halve"]


def test_a_run_gives_back_the_model_that_an_earlier_one_has_left(net, monkeypatch):
    """The kind: a changed model's parts know each other, so it stays until the collector happens to come; a
    report of seven runs held seven models.
    """
    monkeypatch.setattr(instruments, "LARGE", 0)
    gc.disable()
    try:
        result = Quantize(layers="*", format="int4", calibration_examples=8).run(net, cache=False)
        left = weakref.ref(result.subject.model)
        del result
        assert left() is not None
        Norms(layers="*").run(net, cache=False)
        assert left() is None
    finally:
        gc.enable()


def test_one_seed_gives_one_result_and_threads_may_run(net):
    facts = []
    worker = threading.Thread(target=lambda: facts.append(Norms().run(net, cache=False).facts))
    worker.start()
    worker.join()
    assert facts[0] == Norms().run(net, cache=False).facts


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "file.json"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing(target, private=True) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.json"]
