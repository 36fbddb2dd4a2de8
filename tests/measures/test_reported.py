"""What changes a model says how far it went."""

from __future__ import annotations

import pytest
import torch

import workbench
from tests.conftest import tiny
from tests.measures.test_measures import examples, on
from workbench.measures import compare, reference_of
from workbench.measures.reference import measured_beside
from workbench.pruning import Prune, TrainSparse
from workbench.quantization import Quantize, TrainQuantized
from workbench.subjects import Subject


def prepared(architecture: str) -> Subject:
    subject = on(architecture, examples(architecture))
    subject.splits |= {name: subject.splits["test"] for name in ("calibration", "train", "validation")}
    return subject


@pytest.mark.parametrize("architecture", ["llama", "bert", "t5"])
@pytest.mark.parametrize("layers", ["blocks", "*"])
def test_quantize_reports_the_divergence(architecture, layers):
    """Heads are rounded too when they are asked for; the reference keeps the dense one."""
    dense = prepared(architecture)
    study = Quantize(format="int3", predict_examples=0, calibration_examples=8, layers=layers)
    found = study.run(dense, cache=False)
    want = compare(prepared(architecture), found.subject, batch_size=3).measures()
    for name in ("kl", "kl_low", "kl_high"):
        assert found.facts[name] == pytest.approx(want[name], abs=1e-6)
    assert found.facts["kl"] > 0
    assert found.facts["loss"] == pytest.approx(found.subject.evaluate("test")["loss"], abs=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"pattern": "unstructured"},
        {"pattern": "neurons"},
        {"pattern": "layers", "sparsity": 0.5},
        {"pattern": "unstructured", "recovery": "finetune", "recovery.steps": 2},
    ],
    ids=lambda fields: "-".join(str(v) for v in fields.values()),
)
def test_prune_reports_the_divergence(fields):
    dense = prepared("llama")
    study = Prune(**({"method": "magnitude", "sparsity": 0.5, "predict_examples": 0} | fields))
    found = study.run(dense, cache=False)
    want = compare(prepared("llama"), found.subject).measures()
    assert found.facts["kl"] == pytest.approx(want["kl"], abs=1e-6) and found.facts["kl"] > 1e-5


@pytest.mark.parametrize("study", [TrainSparse, TrainQuantized])
@pytest.mark.parametrize("layers", ["blocks", "*"])
def test_training_reports_the_divergence(study, layers):
    """All weights move, the head's among them: the reference is the subject as it came."""
    found = study(steps=3, batch_size=2, layers=layers, learning_rate=1e-3).run(
        prepared("llama"), cache=False
    )
    want = compare(prepared("llama"), found.subject).measures()
    for name in ("kl", "kl_low", "kl_high"):
        assert found.facts[name] == pytest.approx(want[name], abs=1e-6)
    assert found.facts["kl"] > 1e-5


def test_a_model_that_begins_anew_has_no_dense_one_beside_it():
    found = TrainSparse(steps=2, batch_size=2, start="random").run(prepared("bert"), cache=False)
    assert "kl" not in found.facts and found.facts["loss"] > 0


def test_without_test_examples_nothing_is_asked():
    found = Quantize(format="int3", predict_examples=0, calibration_examples=8, test_examples=0).run(
        prepared("llama"), cache=False
    )
    assert "kl" not in found.facts


def test_a_stopped_comparison_keeps_what_it_has():
    from workbench.progress import Progress

    class Stopping(Progress):
        def show(self, label, done, total):
            if done == 2:
                self.stop.set()

    columns = examples("llama")
    reference = reference_of(on("llama", columns), batch_size=3)
    found = reference.against(on("llama", columns, 0.05), Stopping())
    assert len(set(found.pairs.window.tolist())) == 6


def test_a_reference_that_cannot_be_read_leaves_the_divergence_out():
    """A head that is trained or removed under a reference is no head to read it with."""
    dense = on("llama", examples("llama"))
    reference = reference_of(dense)
    with torch.no_grad():
        dense.model.lm_head.weight.mul_(1.5)
    found = measured_beside(reference, dense, "test")
    assert "kl" not in found and found["loss"] > 0


def test_a_head_with_a_softcap_is_compared_whole():
    """What an architecture does to its logits is part of both models."""
    import transformers

    columns = examples("llama")

    def gemma(noise: float) -> Subject:
        torch.manual_seed(0)
        config = transformers.Gemma2Config(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            final_logit_softcapping=0.5,
            pad_token_id=0,
        )
        model = transformers.Gemma2ForCausalLM(config).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += noise * torch.randn_like(parameter)
        kind = type(on("llama", columns).task)
        return Subject("gemma", model, kind(), {"test": columns})

    dense, changed = gemma(0), gemma(0.1)
    got = compare(dense, changed, batch_size=5)
    batch = dense.split("test")
    with torch.no_grad():
        p, q = (
            s.task.flat(s.task.output(s.model, batch), batch)[0].double().log_softmax(-1)
            for s in (dense, changed)
        )
    want = (p.exp() * (p - q)).sum(-1)
    assert got.measures()["kl"] == pytest.approx(float(want.mean()), abs=1e-6) and float(want.mean()) > 1e-6
    assert compare(dense, dense).measures()["kl"] == 0
    changing = reference_of(dense, changing=True)
    assert changing.against(changed).measures()["kl"] == pytest.approx(float(want.mean()), abs=1e-6)


def test_saved_and_opened_again_it_is_the_same_model(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    dense = workbench.subject(tmp_path / "dense", data="random")
    fields = dict(predict_examples=0, calibration_examples=4, test_examples=4)
    found = Quantize(format="int4", **fields).run(dense, cache=False)
    found.subject.save(tmp_path / "int4")
    again = workbench.subject(tmp_path / "int4")
    assert compare(dense, again, limit=4).measures()["kl"] == pytest.approx(found.facts["kl"], abs=1e-7)
