from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import workbench
from tests.conftest import ARCHITECTURES, tiny
from workbench import BadInput
from workbench.latency import count_flops
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.subjects import blocks
from workbench.subjects.layers import plain_experts
from workbench.subjects.structure import depth, experts, removal
from workbench.subjects.structure.channels import align_heads, channel_axes, principal, projections
from workbench.subjects.structure.dimensions import extent, left_after, shrink, smallest_units
from workbench.subjects.structure.norms import channel_norms, restrict
from workbench.subjects.structure.units import discover

CUTS = [
    (a, kind)
    for a in ARCHITECTURES
    for kind in ("channels", "layers", "experts")
    if kind != "experts" or a == "mixtral"
]


def trained(model: nn.Module) -> nn.Module:
    """Random weights, biases and norms of a size at which every part of the model matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.double()


def random_cut(model: nn.Module, kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    total, step = extent(model, kind)
    if kind == "layers":
        kept = torch.rand(total, generator=generator) < 0.5
        at = 0
        for names in depth.stacks(model).values():
            kept[at + int(torch.randint(len(names), (1,), generator=generator))] = True
            at += len(names)
        return kept
    left = step * int(torch.randint(1, total // step + 1, (1,), generator=generator))
    rows = len(experts.expert_modules(model)) if kind == "experts" else 1
    kept = torch.stack([torch.randperm(total, generator=generator).argsort() < left for _ in range(rows)])
    return kept if kind == "experts" else kept[0]


@settings(max_examples=24, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(CUTS), st.integers(0, 99))
def test_a_saved_smaller_model_opens_to_the_same_outputs(checkpoints, tmp_path_factory, cut, seed):
    architecture, kind = cut
    subject = workbench.subject(checkpoints[architecture], data="random")
    kept = random_cut(subject.model, kind, seed)
    small = subject.with_model(shrink(subject.model, kind, kept))
    batch = next(subject.batches("test", 4))
    folder = tmp_path_factory.mktemp("shrunk") / "saved"
    small.save(folder)
    again = workbench.subject(folder)
    plain = type(small.model).from_pretrained(folder).eval()
    with torch.no_grad():
        got = small.task.output(small.model, batch)
        assert torch.allclose(again.task.output(again.model, batch), got, rtol=1e-6, atol=1e-6)
        assert torch.allclose(again.task.output(plain, batch), got, rtol=1e-6, atol=1e-6)
    built = type(small.model)(small.model.config)
    assert {n: p.shape for n, p in built.named_parameters()} == {
        n: p.shape for n, p in small.model.named_parameters()
    }
    assert small.parameter_count() == sum(p.numel() for p in built.parameters()) <= subject.parameter_count()
    tied = small.model.get_output_embeddings() if architecture in ("gpt2", "t5") else None
    assert tied is None or tied.weight is small.model.get_input_embeddings().weight


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_removed_channels_equal_masked_channels_with_restricted_norms(architecture, checkpoints):
    subject = workbench.subject(checkpoints[architecture], data="random")
    model = trained(subject.model)
    batch = {
        k: v.double() if v.is_floating_point() else v for k, v in next(subject.batches("test", 3)).items()
    }
    kept = torch.randperm(32).argsort() < 20
    residual, inner = channel_axes(model)
    assert bool(inner) == (architecture in ("bert", "gpt2"))
    masked = copy.deepcopy(model)
    state = masked.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, axes in residual.items():
            for axis in axes:
                state[name].index_fill_(axis, (~kept).nonzero().flatten(), 0)
        if inner:  # the heads lose their last principal axes, as the configuration asks
            align_heads(masked)
            for group in discover(masked, ("heads",)):
                for member, index in projections(group)[:3]:
                    weight = member.layer.weight.detach().clone()
                    weight[index[:, 5:].flatten()] = 0
                    member.layer.write(weight)
                    member.layer.bias[index[:, 5:].flatten()] = 0
        with restrict(masked, lambda: kept.double()):
            want = subject.task.output(masked, batch)
        got = subject.task.output(shrink(model, "channels", kept), batch)
    close = (
        1e-9 if architecture in ("bert", "gpt2", "vit") else 1e-6
    )  # transformers' RMSNorm computes in float32
    assert torch.allclose(got, want, rtol=close, atol=close * float(want.abs().max()))


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_turning_heads_to_their_principal_axes_changes_nothing(architecture, checkpoints):
    subject = workbench.subject(checkpoints[architecture], data="random")
    model = trained(subject.model)
    batch = next(subject.batches("test", 3))
    with torch.no_grad():
        want = subject.task.output(model, batch)
        align_heads(model)
        assert torch.allclose(subject.task.output(model, batch), want, rtol=1e-9, atol=1e-9)
    query, key, _, _ = projections(discover(model, ("heads",))[0])
    rows = [
        member.layer.weight[index[0]].norm(dim=1) * member.layer.bias[index[0]].abs().add(1)
        for member, index in (query, key)
    ]
    assert all(len(r) == 8 for r in rows)


def test_principal_axes_are_the_best_of_their_number():
    a, b = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
    new_a, new_b = principal(a, b)
    product = a.T @ b
    assert torch.allclose(new_a.T @ new_b, product)
    values = torch.linalg.svdvals(product)
    for d in range(1, 6):  # Eckart and Young: the error of the best rank-d matrix
        assert float((new_a[:d].T @ new_b[:d] - product).norm()) == pytest.approx(
            float(values[d:].norm()), rel=1e-9
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_without_a_block_is_the_model_whose_list_lacks_it(architecture, checkpoints):
    subject = workbench.subject(checkpoints[architecture], data="random")
    model = trained(subject.model)
    batch = {
        k: v.double() if v.is_floating_point() else v for k, v in next(subject.batches("test", 3)).items()
    }
    for gone in range(len(blocks(model))):
        kept = torch.ones(len(blocks(model)), dtype=torch.bool)
        kept[gone] = False
        small, want = shrink(model, "layers", kept), copy.deepcopy(model)
        path, number = blocks(model)[gone][0].rsplit(".", 1)
        owner = want.get_submodule(path)
        if (
            architecture == "t5" and number == "0"
        ):  # the table of relative positions moves to the block that is now the first
            owner[1].layer[0].SelfAttention.relative_attention_bias = (
                owner[0].layer[0].SelfAttention.relative_attention_bias
            )
            owner[1].layer[0].SelfAttention.has_relative_attention_bias = True
        del owner[int(number)]
        with torch.no_grad():
            assert torch.equal(subject.task.output(small, batch), subject.task.output(want, batch))


def test_a_router_with_fewer_experts_chooses_the_best_of_those_left(checkpoints):
    model = plain_experts(trained(tiny("mixtral")))
    kept = torch.tensor([[True, False, True, True], [False, True, True, True]])
    small = shrink(model, "experts", kept)
    x = torch.randn(1, 7, 32, dtype=torch.float64)
    for number in range(2):
        block, reduced = model.model.layers[number].mlp, small.model.layers[number].mlp
        logits = (x[0] @ block.gate.weight.T).masked_fill(~kept[number], -torch.inf)
        weights, index = logits.softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        want = torch.zeros(7, 32, dtype=torch.float64)
        for token in range(7):
            for weight, expert in zip(weights[token], index[token], strict=True):
                gate, up = (x[0, token] @ block.experts.gate_up_proj[expert].T).chunk(2)
                want[token] += (
                    weight * (torch.nn.functional.silu(gate) * up) @ block.experts.down_proj[expert].T
                )
        assert torch.allclose(reduced(x)[0], want, atol=1e-6)  # the router works in float32
    assert small.config.num_local_experts == 3 and small.config.num_experts_per_tok == 2
    assert shrink(model, "experts", torch.tensor([[True] + [False] * 3] * 2)).config.num_experts_per_tok == 1


def test_sizes_and_flops_are_those_of_the_smaller_configuration(checkpoints):
    subject = workbench.subject(checkpoints["llama"], data="random")
    batch = next(subject.batches("test", 2))
    length = batch["input_ids"].shape[1]

    def counted(hidden: int, layers: int) -> tuple[int, int]:
        """Parameters and FLOPs of 2 examples by hand: head size 8, 4 and 2 heads, 64 neurons, 99 tokens,
        no biases.
        """
        matrices = hidden * (32 + 16 + 16 + 32) + 3 * hidden * 64
        parameters = 2 * 99 * hidden + layers * (matrices + 2 * hidden) + hidden
        rows = 2 * length
        attention = (
            2 * 2 * 4 * 8 * length * length * 2
        )  # scores and their products with values, all positions
        return parameters, layers * (2 * rows * matrices + attention) + 2 * rows * hidden * 99

    for kind, kept, size in (
        ("channels", torch.arange(32) < 24, (24, 2)),
        ("layers", torch.tensor([False, True]), (32, 1)),
    ):
        result = subject.with_model(shrink(subject.model, kind, kept))
        parameters, flops = counted(*size)
        assert result.parameter_count() == parameters
        rotary = 2 * 2 * length * 4  # the angles of rotary positions are a product as well
        assert count_flops(result, batch) - flops in (0, rotary)


def test_counts_and_choices():
    assert [left_after(32, s, 4) for s in (0, 0.25, 0.3, 0.9, 0.99)] == [32, 24, 24, 4, 4]
    assert smallest_units(torch.tensor([3.0, 1.0, 2.0, 1.0]), 2).tolist() == [True, False, True, False]
    assert len(channel_norms(tiny("bert"), 32)) == 5 and len(channel_norms(tiny("llama"), 32)) == 5


@pytest.mark.parametrize(
    ("architecture", "fields", "words"),
    [
        ("bert", {"pattern": "experts"}, "no stack of experts"),
        ("bert", {"pattern": "channels", "sparsity": 0.01}, "steps of 4 is none"),
        ("bert", {"pattern": "channels", "layers": "*.query"}, "layers"),
        ("bert", {"pattern": "channels", "pattern.remove": False}, "pattern.remove"),
        ("bert", {"pattern": "channels", "method": "sparsegpt"}, "no form"),
        ("bert", {"pattern": "channels", "allocation": "global"}, "allocation"),
        ("bert", {"pattern": "channels", "compensation": "least-squares"}, "compensation"),
        ("bert", {"pattern": "channels", "saliency": "tcess"}, "does not score channels"),
        ("bert", {"pattern": "channels", "method": "pat"}, "recovery finetune"),
        ("bert", {"pattern": "unstructured", "method": "minitron"}, "heads, neurons, channels"),
        ("bert", {"pattern": "unstructured", "saliency": "activation"}, "single weights"),
        ("bert", {"pattern": "heads", "method": "heapr"}, "neurons, experts"),
        ("bert", {"pattern": "unstructured", "allocation": "adaptive"}, "adaptive"),
        ("mixtral", {"pattern": "layers", "method": "premoe"}, "experts"),
    ],
)
def test_requests_that_make_no_sense_say_why(architecture, fields, words, checkpoints):
    subject = workbench.subject(checkpoints[architecture], data="random")
    with pytest.raises(BadInput, match=words):
        Prune(**({"method": "magnitude", "sparsity": 0.5} | fields)).run(subject, Progress(), cache=False)


def test_cuts_that_no_configuration_can_say_are_refused(checkpoints):
    with pytest.raises(BadInput, match="transformers configuration"):
        extent(nn.Sequential(nn.Linear(3, 3)), "channels")
    model = tiny("mixtral")
    with pytest.raises(BadInput, match="one number for all"):
        shrink(model, "experts", torch.tensor([[True, True, False, False], [True, False, False, False]]))
    with pytest.raises(BadInput, match="heads must divide"):
        shrink(model, "channels", torch.arange(32) < 30)
    with pytest.raises(BadInput, match="keeps at least one"):
        shrink(tiny("t5"), "layers", torch.tensor([True, True, False, False]))
    bert = tiny("bert")
    name = discover(bert, ("heads",))[0].name
    removal.remove(bert, {name: torch.tensor([[True, True, True, False]])})
    with pytest.raises(BadInput, match="before heads"):
        shrink(bert, "layers", torch.tensor([True, False]))
