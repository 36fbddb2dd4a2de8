"""Language models' losses without (tokens, vocabulary) matrices: the plain computation's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import workbench
from tests.conftest import tiny
from workbench.curvature.operators.attention import twice_differentiable
from workbench.kernels.training import linear_cross_entropy as kernel
from workbench.pruning.recovery.recovery import distilled_loss
from workbench.quantization.trained.objective import teacher_loss
from workbench.statistics.inputs import InputCapture
from workbench.subjects import TASK, Subject, Task
from workbench.subjects.vocabulary import Unspoken

SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def gemma2() -> nn.Module:
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.05)
    )


def cohere() -> nn.Module:
    return transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL, logit_scale=3.0))


def granite() -> nn.Module:
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SMALL, logits_scaling=0.25))


def bart() -> nn.Module:
    sizes = {
        f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 48))
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=99, d_model=32, **sizes, **heads)
    )
    model.final_logits_bias.normal_()
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gpt2": (lambda: tiny("gpt2"), "causal-lm"),
    "llama": (lambda: tiny("llama"), "causal-lm"),
    "mixtral": (lambda: tiny("mixtral"), "causal-lm"),
    "t5": (lambda: tiny("t5"), "seq2seq-lm"),
    "bert": (bert, "masked-lm"),
    "gemma2": (gemma2, "causal-lm"),
    "cohere": (cohere, "causal-lm"),
    "granite": (granite, "causal-lm"),
    "bart": (bart, "seq2seq-lm"),
}
BUILTIN = ("bytelm", "bytemoe")


def subject_of(name: str) -> Subject:
    if name in BUILTIN:
        whole = workbench.subject(name)
        cut = {k: v[:4, :64] for k, v in whole.split("test").items()}
        return whole.copy().with_split("test", cut)
    torch.manual_seed(0)
    make, task = MODELS[name]
    model = make().eval()
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 99, (10, 12), generator=draw)
    mask = torch.ones_like(ids)
    mask[1::2, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if task == "masked-lm":
        labels = ids.masked_fill(torch.rand(ids.shape, generator=draw) > 0.3, -100)
    if task == "seq2seq-lm":
        labels = torch.randint(1, 99, (10, 11), generator=draw)
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    splits = dict.fromkeys(("train", "calibration", "validation", "test"), columns)
    return Subject(name, plain_experts(model), TASK[task].value(), splits, data_note="random")


def plain_experts(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.2)
    return model


@pytest.fixture(params=[*BUILTIN, *MODELS])
def subject(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.setattr(kernel, "LOGITS", 1)
    return subject_of(request.param)


def whole_loss(task: Task, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    rows, targets = task.flat(task.output(model, batch), batch)
    return F.cross_entropy(rows, targets)


class Largest(TorchDispatchMode):
    """Sees every tensor made; `rows` is the most rows of one whose last dimension is the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return made


def test_loss_gradient_and_curvature_are_those_of_the_whole_logits(subject: Subject) -> None:
    batch = next(subject.batches("test", 10))
    task, model = subject.task, subject.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert isinstance(task.deferred(model, batch), Unspoken)
    with twice_differentiable():
        losses = [whole_loss(task, model, batch), subject.loss(batch)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
        draw = torch.Generator().manual_seed(3)
        along = [torch.randn(p.shape, generator=draw) for p in parameters]
        found = []
        for loss in losses:
            slopes = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            inner = sum((g * v).sum() for g, v in zip(slopes, along, strict=True) if g is not None)
            bends = torch.autograd.grad(inner, parameters, allow_unused=True)
            found.append(
                [torch.cat([t.flatten() for t in each if t is not None]) for each in (slopes, bends)]
            )
    for want, got in zip(*found, strict=True):
        assert got.shape == want.shape
        assert float((got - want).detach().norm() / want.detach().norm()) < 1e-6


def test_evaluation_is_that_of_the_whole_logits(subject: Subject) -> None:
    found = subject.evaluate("test", batch_size=3)
    loss = hits = items = 0.0
    with torch.no_grad():
        for batch in subject.batches("test", 3, by_length=True):
            count = subject.task.items(batch)
            rows, targets = subject.task.flat(subject.task.output(subject.model, batch), batch)
            loss += float(F.cross_entropy(rows, targets)) * count
            hits += float((rows.argmax(-1) == targets).sum())
            items += count
    assert found["loss"] == pytest.approx(loss / items, rel=1e-6)
    assert found["accuracy"] == hits / items
    assert found["perplexity"] == pytest.approx(torch.tensor(loss / items).exp().item(), rel=1e-5)


@pytest.fixture(params=["bytelm", "gpt2", "t5", "gemma2"])
def many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Subject]:
    monkeypatch.setattr(kernel, "LOGITS", 1)
    subject = subject_of(request.param)
    columns = {k: v.repeat(-(-40 // len(v)), 1) for k, v in subject.split("test").items()}
    yield subject.with_split("test", columns)


def test_no_tensor_has_a_row_of_logits_for_every_token(many: Subject) -> None:
    vocabulary = many.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    batch = next(many.batches("test", 40))
    parameters = [p for p in many.model.parameters() if p.requires_grad]
    tokens = many.task.items(batch)
    assert tokens > 300
    with Largest(vocabulary) as seen, torch.no_grad():
        many.task.output(many.model, batch)
    assert seen.rows >= tokens  # it would have been noticed
    with Largest(vocabulary) as seen:
        many.evaluate("test", batch_size=40)
        loss = many.loss(batch)
        with twice_differentiable():
            slopes = torch.autograd.grad(many.loss(batch), parameters, create_graph=True)
            sum(g.square().sum() for g in slopes).backward()  # type: ignore[union-attr]
        loss.backward()
    assert 0 < seen.rows <= tokens // 2


def test_neither_does_a_teacher(many: Subject) -> None:
    vocabulary = many.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    batch = next(many.batches("test", 40))
    teacher = many.copy()
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            parameter.mul_(1.1)
    task, models = many.task, (many.model, teacher.model)
    parameters = [p for p in many.model.parameters() if p.requires_grad]
    whole = [task.output(model, batch) for model in models]
    want = teacher_loss(many, whole[0], whole[1].detach(), batch, 2.0)
    rows, goals = (task.flat(each, batch)[0].log_softmax(-1) for each in whole)
    divergence = (goals.exp() * (goals - rows)).sum(-1).mean()
    with Largest(vocabulary) as seen:
        got = teacher_loss(many, *(task.deferred(model, batch) for model in models), batch, 2.0)  # type: ignore[misc]
        slopes = torch.autograd.grad(got, parameters)
        recovered = distilled_loss(many, teacher, batch, 1.0, hidden_states=False)
        recovered.backward()
    assert 0 < seen.rows <= task.items(batch) // 2
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        recovered, whole_loss(task, many.model, batch) + divergence, rtol=1e-5, atol=1e-6
    )
    for a, b in zip(slopes, torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_batch_that_fits_into_a_cache_is_one_chunk_with_the_same_bits() -> None:
    subject = subject_of("bytelm")
    batch = next(subject.batches("test", 4))
    parameters = [p for p in subject.model.parameters() if p.requires_grad]
    slopes = [
        torch.autograd.grad(loss, parameters)
        for loss in (whole_loss(subject.task, subject.model, batch), subject.loss(batch))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))


def test_fp16_gradients_wait_for_the_scaled_loss() -> None:
    subject = subject_of("bytelm")
    batch = next(subject.batches("test", 4))
    weight = subject.model.get_output_embeddings().weight  # type: ignore[operator]
    found = []
    for of in (lambda: whole_loss(subject.task, subject.model, batch), lambda: subject.loss(batch)):
        with torch.autocast("cpu", torch.float16):
            loss = of()
        found.append(torch.autograd.grad(loss * 65536.0, weight)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3 * float(found[0].abs().max()))


def test_a_head_that_is_watched_is_computed_whole() -> None:
    subject = subject_of("llama")
    batch = next(subject.batches("test", 4))
    head = [layer for layer in subject.layers("*") if layer.module is subject.model.get_output_embeddings()]  # type: ignore[operator]
    assert head
    seen: list[Tensor] = []
    with InputCapture(head, lambda layer, expert, rows: seen.append(rows)):
        want = subject.loss(batch)
    assert len(seen) == 1 and len(seen[0]) == batch["input_ids"].numel()
    outputs: list[Tensor] = []
    handle = head[0].module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    assert torch.equal(subject.loss(batch), want)
    handle.remove()
    assert outputs[0].shape[-1] == 99
    assert torch.allclose(subject.loss(batch), want, rtol=1e-6)
    assert len(outputs) == 1 and "forward" not in vars(head[0].module)


class Twice(transformers.LlamaForCausalLM):
    """A head that is called once more than others are."""

    def forward(self, **call: Any) -> Any:  # type: ignore[override]
        found = super().forward(**call)
        self.lm_head(self.model(**call).last_hidden_state)
        return found


def test_a_head_that_cannot_be_left_out_is_computed_whole() -> None:
    subject = subject_of("llama")
    model = Twice(subject.model.config).eval()
    model.load_state_dict(subject.model.state_dict())
    batch = next(subject.batches("test", 4))
    assert isinstance(subject.task.deferred(model, batch), Tensor)
    torch.testing.assert_close(subject.task.loss(model, batch), subject.loss(batch), rtol=1e-6, atol=1e-6)
