from __future__ import annotations

import copy

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import workbench
from tests.conftest import ARCHITECTURES, tiny
from workbench import BadInput
from workbench.evidence.oracles.exact import refit
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.pruning.solvers import ziplm
from workbench.subjects.structure import removal
from workbench.subjects.structure.units import discover

LEFT = {
    "bert": 1,
    "gpt2": 1,
    "llama": 0,
    "t5": 0,
    "vit": 0,
    "mixtral": 0,
}  # heads in equal numbers: does a record have to say it?


def random_kept(groups, seed, equal):
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for number, group in enumerate(groups):
        step = 8 if group.experts > 1 else 1
        left = max(group.units // 2 - (0 if equal else step * (number % 2)), step)
        kept[group.name] = torch.stack(
            [torch.randperm(group.units, generator=generator).argsort() < left for _ in range(group.experts)]
        )
    return kept


@settings(max_examples=24, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(ARCHITECTURES),
    st.sampled_from([("heads",), ("neurons",), ("heads", "neurons")]),
    st.booleans(),
    st.integers(0, 9),
)
def test_removing_equals_masking_and_reloading_is_exact(
    checkpoints, tmp_path_factory, architecture, kinds, equal, seed
):
    subject = workbench.subject(checkpoints[architecture], data="random")
    groups = discover(subject.model, kinds)
    kept = random_kept(groups, seed, equal)
    masked = copy.deepcopy(subject.model)
    for group in discover(masked, kinds):
        group.mask(kept[group.name])
    batch = next(subject.batches("test", 4))
    gone = sum(g.weights_per_unit() * int((~kept[g.name]).sum()) for g in groups)
    biases = sum(
        m.index.shape[1] * int((~kept[g.name]).sum())
        for g in groups
        for m in g.members
        if m.axis == -2 and m.layer.bias is not None
    )
    tables = sum(
        32 * int((~kept[g.name]).sum())
        for g in groups
        if g.kind == "heads"
        for m in g.modules
        if hasattr(m, "relative_attention_bias")
    )
    before = subject.parameter_count()
    with torch.no_grad():
        want = subject.task.output(masked, batch)
        removal.remove(subject.model, kept)
        got = subject.task.output(subject.model, batch)
    close = {"rtol": 1e-6, "atol": 1e-6 * float(want.abs().max())}
    assert torch.allclose(got, want, **close)
    assert before - subject.parameter_count() == gone + biases + tables
    if kinds == ("heads",) and equal:
        assert bool(removal.record_of(subject.model)) == bool(LEFT[architecture])
    folder = tmp_path_factory.mktemp("removed") / "saved"
    subject.save(folder)
    again = workbench.subject(folder)
    plain = type(subject.model).from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.allclose(again.task.output(again.model, batch), got, **close)
        assert torch.allclose(again.task.output(plain, batch), got, **close)
    assert again.parameter_count() == subject.parameter_count()


def test_query_heads_follow_their_key_value_head():
    group = next(g for g in discover(tiny("llama"), ("heads",)))
    query, key = group.members[0], group.members[1]
    assert group.units == 2 and query.index.shape == (2, 16) and key.index.shape == (2, 8)
    assert query.index[1].tolist() == list(range(16, 32))


def test_t5_heads_are_tied_by_their_position_bias():
    groups = discover(tiny("t5"), ("heads",))
    assert [g.name for g in groups] == [
        "encoder.*.SelfAttention",
        "decoder.*.SelfAttention",
        "decoder.*.EncDecAttention",
    ]
    assert all(len(g.modules) == 2 for g in groups)


def test_impossible_removals_are_refused(checkpoints):
    model = tiny("bert")
    name = discover(model, ("heads",))[0].name
    with pytest.raises(BadInput, match="at least one"):
        removal.remove(model, {name: torch.zeros(1, 4, dtype=torch.bool)})
    with pytest.raises(BadInput, match="no group"):
        removal.remove(model, {"nothing": torch.ones(1, 4, dtype=torch.bool)})
    with pytest.raises(BadInput, match="not recognised"):
        discover(torch.nn.Sequential(torch.nn.Linear(3, 3)), ("heads",))
    subject = workbench.subject(checkpoints["t5"], data="random")
    with pytest.raises(BadInput, match="ties several"):
        Prune(method="ziplm", pattern="heads").run(subject, Progress(), cache=False)


def test_removing_in_two_steps_is_remembered_in_the_stock_shapes(checkpoints, tmp_path):
    subject = workbench.subject(checkpoints["bert"], data="random")
    once = (
        Prune(method="magnitude", pattern="heads", sparsity=0.25, predict_examples=0)
        .run(subject, Progress(), cache=False)
        .subject
    )
    twice = (
        Prune(method="magnitude", pattern="heads", sparsity=1 / 3, predict_examples=0)
        .run(once, Progress(), cache=False)
        .subject
    )
    assert [g.units for g in discover(twice.model, ("heads",))] == [2, 2]
    record = removal.record_of(twice.model)
    assert all(sum(kept[0]) == 2 and len(kept[0]) == 4 for kept in record.values())
    twice.save(tmp_path / "saved")
    assert workbench.subject(tmp_path / "saved").evaluate()["loss"] == pytest.approx(
        twice.evaluate()["loss"], abs=1e-6
    )


def test_heads_that_do_not_divide_the_hidden_size_are_saved_in_the_stock_shapes(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    subject = workbench.subject(tmp_path / "dense", data="random")
    kept = {g.name: torch.tensor([[True, False, True, True]]) for g in discover(subject.model, ("heads",))}
    removal.remove(subject.model, kept)
    assert removal.record_of(subject.model) and subject.model.config.num_attention_heads == 4
    batch = next(subject.batches("test", 4))
    subject.save(tmp_path / "saved")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved").eval()
    again = workbench.subject(tmp_path / "saved")
    with torch.no_grad():
        want = subject.task.output(subject.model, batch)
        assert torch.allclose(subject.task.output(plain, batch), want, atol=1e-6)
        assert torch.allclose(again.task.output(again.model, batch), want, atol=1e-6)
    assert again.parameter_count() == subject.parameter_count()


def test_ziplm_errors_are_those_of_the_exact_refit():
    torch.manual_seed(0)
    weight, x = (
        torch.randn(5, 12, dtype=torch.float64),
        torch.randn(60, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64),
    )
    gram, index = x.T @ x / 60, torch.arange(12).reshape(4, 3)
    order, errors = ziplm.removal_order(weight, gram, index, 1e-12)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    for count in range(1, 5):
        kept = torch.ones(12, dtype=torch.bool)
        kept[index[order[:count]].flatten()] = False
        exact = sum(2 * refit(row, gram, kept)[1] for row in weight)
        assert float(errors[count - 1]) == pytest.approx(exact, rel=1e-6)
        new = ziplm.refit(weight, gram, kept, 1e-12)
        assert float(((new - weight) @ gram * (new - weight)).sum()) == pytest.approx(exact, rel=1e-6)
    single = [
        sum(2 * refit(row, gram, torch.arange(12) // 3 != unit)[1] for row in weight) for unit in range(4)
    ]
    assert int(order[0]) == min(range(4), key=single.__getitem__)
