"""Attention seen through transformers' interface, rounded in place,
and asked to stay informative and like the teacher's.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench
from tests.conftest import ARCHITECTURES
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization import TrainQuantized
from workbench.quantization.activations.attention import (
    AttentionCall,
    AttentionQuant,
    TokenQuant,
    attention_sites,
    eager_of,
    order_of,
    watching,
)
from workbench.quantization.activations.token_importance import (
    important_tokens,
    remember_importance,
    rounded_tokens,
)
from workbench.quantization.trained.objective import information, map_distance
from workbench.subjects import Layer, Subject

SHORT: dict[str, Any] = {
    "method": "lsq",
    "method.bits": 4,
    "steps": 10,
    "batch_size": 32,
    "learning_rate": 5e-3,
    "test_examples": 32,
}


def calls_of(on: Subject, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[AttentionCall]]:
    with watching(on.model) as seen:
        output = on.task.output(on.model, batch)
    return output, [c for c in seen if isinstance(c, AttentionCall)]


def made(
    query: torch.Tensor, key: torch.Tensor, maps: torch.Tensor, keep: torch.Tensor | None = None
) -> AttentionCall:
    return AttentionCall(torch.nn.Identity(), query, key, key, maps, keep)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_watching_changes_nothing_and_sees_every_attention(
    checkpoints: dict[str, Path], architecture: str
) -> None:
    on = workbench.subject(checkpoints[architecture], data="random")
    batch = next(on.batches("train", 3))
    own, before = on.task.output(on.model, batch), on.model.config._attn_implementation
    output, calls = calls_of(on, batch)
    assert torch.allclose(output, own, atol=1e-5) and on.model.config._attn_implementation == before
    assert len(calls) == (6 if architecture == "t5" else 2)
    for call in calls:
        rows = call.maps.sum(-1)
        assert (
            torch.allclose(rows, torch.ones_like(rows), atol=1e-5)
            and call.maps.shape[:3] == call.query.shape[:3]
        )
    order = order_of(on, on.layers())
    sites = attention_sites(order)
    assert len(sites) == len(calls) and next(s.name for s in order if isinstance(s, Layer)) == next(
        iter(sites)
    )


def test_the_plain_function_is_that_of_the_class_or_its_parents() -> None:
    from transformers.models.bert import modeling_bert

    assert (
        eager_of(type("Own", (modeling_bert.BertSelfAttention,), {})) is modeling_bert.eager_attention_forward
    )
    with pytest.raises(BadInput, match="Identity"):
        eager_of(torch.nn.Identity)


def test_maps_are_the_librarys(checkpoints: dict[str, Path]) -> None:
    on = workbench.subject(checkpoints["bert"], data="random")
    batch = next(on.batches("train", 3))
    batch["attention_mask"][0, -2:] = 0
    _, calls = calls_of(on, batch)
    on.model.set_attn_implementation("eager")
    oracle = on.model(**on.task.inputs(batch), output_attentions=True).attentions
    assert all(torch.allclose(c.maps, o, atol=1e-6) for c, o in zip(calls, oracle, strict=True))
    assert calls[0].keep is not None and torch.equal(calls[0].keep, batch["attention_mask"].bool())


def test_information_is_the_formula_and_its_gradient_that_of_the_sum() -> None:
    """-log of the mean of log(1 + var); the paper's sum differs by a constant;
    more spread is more information; padding is left out.
    """
    query, key = torch.randn(2, 4, 5, 8, requires_grad=True), torch.randn(2, 2, 5, 8)
    maps = torch.empty(2, 4, 5, 5)
    found = information([made(query, key, maps)])
    total = torch.log(1 + query.var(-1)).sum() + torch.log(1 + key.var(-1)).sum()
    assert float(found.detach()) == pytest.approx(-math.log(float(total.detach()) / 60), rel=1e-5)
    ours, papers = torch.autograd.grad(found, query)[0], torch.autograd.grad(-total.log(), query)[0]
    assert torch.allclose(ours, papers, rtol=1e-4, atol=1e-8)
    step = torch.zeros_like(query)
    step[0, 1, 2, 3] = 1e-2
    slope = (
        information([made(query.detach() + step, key, maps)])
        - information([made(query.detach() - step, key, maps)])
    ) / 2e-2
    assert float(slope) == pytest.approx(float(ours[0, 1, 2, 3]), rel=2e-2, abs=1e-5)
    assert information([made(3 * query, 3 * key, maps)]) < found
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[1, 3:] = False
    changed = query.detach().clone()
    changed[1, :, 3:] = 100.0
    assert torch.equal(
        information([made(query.detach(), key, maps, keep)]), information([made(changed, key, maps, keep)])
    )


def test_the_map_distance() -> None:
    maps = torch.softmax(torch.randn(2, 3, 4, 4), -1).requires_grad_()
    nothing = torch.empty(2, 3, 4, 2)
    same = map_distance([made(nothing, nothing, maps)], [made(nothing, nothing, maps.detach())])
    assert abs(float(same.detach())) < 1e-6 and float(torch.autograd.grad(same, maps)[0].abs().max()) < 1e-6
    first, second = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    first[..., 0], second[0, 0] = 1.0, torch.eye(2)
    q = torch.empty(1, 1, 2, 2)
    assert float(map_distance([made(q, q, first)], [made(q, q, second)])) == pytest.approx(0.5)
    keep = torch.tensor([[True, False]])
    assert float(map_distance([made(q, q, first, keep)], [made(q, q, second)])) == pytest.approx(
        0.0, abs=1e-6
    )  # the row that differs is padding


def test_importance_is_attention_to_the_first_token(checkpoints: dict[str, Path]) -> None:
    on = workbench.subject(checkpoints["llama"], data="random")
    _, calls = calls_of(on, next(on.batches("train", 3)))
    call = calls[-1]
    heads, length = call.query.shape[1], call.query.shape[2]
    keys = call.key.repeat_interleave(heads // call.key.shape[1], 1)
    oracle = (call.query @ keys.mT)[..., 0].mean(1)
    wide = important_tokens(3, length, 0.25)
    assert wide is not None and torch.equal(wide.sum(1), torch.full((3,), length - math.floor(0.75 * length)))
    assert all(oracle[i][wide[i]].min() >= oracle[i][~wide[i]].max() for i in range(3))
    assert important_tokens(3, length + 1, 0.25) is None  # other tokens: nothing is known of them
    remember_importance(call.query[:1], call.key[:1], None)
    alone = important_tokens(1, length, 0.25)
    assert alone is not None and torch.equal(alone[0], wide[0])  # whatever else is in the batch
    keep = torch.ones(3, length, dtype=torch.bool)
    keep[:, length // 2 :] = False
    remember_importance(call.query, call.key, keep)
    real = important_tokens(3, length, 0.5)
    assert (
        real is not None
        and not bool(real[:, length // 2 :].any())
        and torch.equal(real.sum(1), torch.full((3,), length // 2 - length // 2 // 2))
    )


def test_tokens_get_their_width() -> None:
    x = torch.randn(2, 3, 4, 16, requires_grad=True)
    wide = torch.tensor([[True, False, True, False], [False, False, False, True]])
    found = rounded_tokens(x, "uint4", "uint8", wide)
    fine, coarse = rounded_tokens(x, "uint4", "uint8", None), rounded_tokens(x, "uint8", "uint4", None)
    assert (
        torch.equal(found[0, :, 0], fine[0, :, 0])
        and torch.equal(found[0, :, 1], coarse[0, :, 1])
        and torch.equal(found[1, :, 3], fine[1, :, 3])
    )
    assert all(len(torch.unique(row)) <= 16 for row in found[0, :, 1].detach())
    step = (
        x.detach().amax(-1, keepdim=True).clamp(min=0) - x.detach().amin(-1, keepdim=True).clamp(max=0)
    ) / 255
    assert ((fine - x).detach().abs() <= 0.6 * step).all()
    found.sum().backward()
    inside = (x > x.amin(-1, keepdim=True) + 17 * step) & (
        x < x.amax(-1, keepdim=True) - 17 * step
    )  # the zero point moves the ends by half a step
    assert x.grad is not None and (x.grad[inside] == 1).all()


def test_rounded_attention_is_trained_copied_and_saved(tmp_path: Path) -> None:
    on = workbench.subject("digits-vit")
    fields = SHORT | {
        "activation_bits": 4,
        "rounded_attention": True,
        "wide_tokens": 0.5,
        "entropy": 0.5,
        "attention_match": 1.0,
        "distillation": 0.5,
    }
    result = TrainQuantized(**fields, from_scratch=True).run(on, Progress(), cache=False)
    assert result.subject is not None
    for name in ("map_distance", "information", "teacher_loss"):
        assert result.table[name].iloc[-3:].mean() < result.table[name].iloc[:3].mean(), name
        assert result.figure(column=name).data
    changes = [c for layer in result.subject.layers() for c in layer.changes]
    early = [c.before_attention for c in changes if isinstance(c, TokenQuant)]
    assert early == [True] * 3 + [False] * (len(early) - 3) and [
        c.first for c in changes if isinstance(c, AttentionQuant)
    ] == [True, False, False]
    batch = next(on.batches("test", 16))
    _, calls = calls_of(result.subject, batch)
    output = result.subject.task.output(result.subject.model, batch)
    assert (
        torch.equal(copy.deepcopy(result.subject.model)(**on.task.inputs(batch)).logits, output)
        and len(torch.unique(calls[0].query[0, 0, 1])) <= 16
    )
    result.save(tmp_path / "out")
    again = workbench.subject(tmp_path / "out")
    assert again.evaluate("test", limit=32)["loss"] == pytest.approx(result.facts["loss"], abs=1e-5)
    assert on.model.config._attn_implementation == "sdpa"  # the subject that was given is as it was


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"wide_tokens": 0.5}, "activation_bits"),
        ({"activation_bits": 1}, "activation_bits"),
        ({"activation_bits": 4, "method": "bibert"}, "activation_bits"),
    ],
)
def test_refusals(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(BadInput, match=text):
        TrainQuantized(**fields).run(workbench.subject("digits-vit"), Progress(), cache=False)


def test_what_has_no_attention_or_no_single_order_is_refused(checkpoints: dict[str, Path]) -> None:
    from workbench.subjects.tasks import ModuleTask

    data = {"inputs": torch.randn(4, 3), "labels": torch.tensor([0, 1, 0, 1])}
    on = Subject(
        "plain", torch.nn.Sequential(torch.nn.Linear(3, 2)), ModuleTask(), {"train": data, "test": data}
    )
    for fields in (
        {"entropy": 1.0},
        {"attention_match": 1.0},
        {"activation_bits": 4, "rounded_attention": True},
    ):
        with pytest.raises(BadInput, match="attention"):
            TrainQuantized(layers="*", **fields).run(on, Progress(), cache=False)
    with pytest.raises(BadInput, match="wide_tokens"):
        TrainQuantized(activation_bits=4, wide_tokens=0.5).check(
            workbench.subject(checkpoints["t5"], data="random")
        )
    with pytest.raises(BadInput, match="fused"):
        TrainQuantized(activation_bits=4).check(workbench.subject(checkpoints["mixtral"], data="random"))
