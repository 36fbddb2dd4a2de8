"""Roundings that are trained: their formulas, the widths they end on,
low-rank terms inside and beside the rounding.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import workbench
from workbench.axis import Options
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization import FakeQuant, Quantize, TrainQuantized
from workbench.quantization.activations.activations import SignInputs
from workbench.quantization.number.formats import named
from workbench.quantization.number.packing import quantizer_of
from workbench.quantization.rounding.adapters import ADAPTER, Adapter, best_term
from workbench.quantization.rounding.nearest import nearest
from workbench.quantization.rounding.problem import Problem
from workbench.quantization.trained.chosen_widths import BitPlanes, FormatPolicy, PseudoNoise
from workbench.quantization.trained.settings import TRAINED_ROUNDING
from workbench.quantization.trained.trained_rounding import CentredSign, Course

SHORT = {"layers": "*", "steps": 40, "batch_size": 64, "learning_rate": 1e-3}


def told(**options: object) -> Any:
    """Settings whose method has these options."""
    return SimpleNamespace(method=SimpleNamespace(options=SimpleNamespace(**options)))


def course(**options: object) -> Course:
    settings = told(**({"budget": 3.0, "strength": 1.0, "settle": 0.0} | options))
    return Course(settings, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", [str(name) for name in TRAINED_ROUNDING if str(name) != "adapters"])
def test_every_rounding_trains_a_subject_of_16_bits(checkpoints: dict[str, Path], method: str) -> None:
    """Fault 19, a further example: roundings learn in float32, and gave their float32 to a bf16 layer."""
    on = workbench.subject(checkpoints["vit"], data="random", max_examples=64)
    narrow = on.with_model(on.copy().model.to(torch.bfloat16))
    settings = TrainQuantized(
        method=method, layers="*", steps=4, batch_size=8, switch_at=0.0 if method == "l4q" else 0.25
    )
    result = settings.run(narrow, Progress(), cache=False)
    assert result.subject is not None and np.isfinite(result.table["train_loss"]).all()
    assert {layer.weight.dtype for layer in result.subject.layers()} == {torch.bfloat16}
    assert result.tables is not None and len(result.tables["widths"]) == len(on.layers("*"))


def test_pseudo_noise_ends_with_rounding() -> None:
    """The last steps compute with what training ends on, and the width no longer moves."""
    weight = torch.randn(6, 40)
    noise = PseudoNoise.begin(weight, 40, told(budget=3.0))
    late = course(settle=0.25)
    late.done = 0.75
    noise.prepare(late)
    assert not noise.settled and noise.width.requires_grad
    late.done = 0.8
    noise.prepare(late)
    values, _ = noise.final(weight)
    torch.testing.assert_close(noise.change(weight), values, rtol=2e-3, atol=1e-4)
    (noise.change(weight).sum()).backward()
    assert noise.place.grad is None and noise.log_bound.grad is not None


def test_bit_planes_are_trained_under_fixed_masks_at_last() -> None:
    """CSQ's second phase: gates are zeros and ones and get no gradient, planes get theirs."""
    weight = torch.randn(6, 40)
    planes = BitPlanes.begin(weight, 40, told(budget=3.0))
    with torch.no_grad():
        planes.keep.copy_(torch.tensor([-1.0, -1, -1, 0.1, 1, 1, 1]))
    late = course(settle=0.25)
    late.done = 0.8
    planes.prepare(late)
    assert planes.gates().tolist() == [0, 0, 0, 1, 1, 1, 1] and float(planes.width) == 5
    planes.change(weight).sum().backward()
    assert planes.sharpness < 16 < planes.last, "sharpness grows a second time"
    assert planes.keep.grad is None and planes.positive.grad is not None
    assert planes.positive.grad[:3].abs().max() == 0 and planes.positive.grad[3:].abs().max() > 0


def test_pseudo_noise_has_the_variance_of_rounding() -> None:
    """Uniform in a step: mean zero, variance step^2 / 12, within 5 standard errors;
    nothing beyond the bound but noise.
    """
    weight = torch.rand(200, 500) * 2 - 1
    noise = PseudoNoise.begin(weight, 500, told(budget=3.0))
    noise.prepare(course())
    step = noise.step().detach()
    found = (noise.change(weight).detach() - weight) / step
    count = found.numel()
    assert abs(float(found.mean())) < 5 * (1 / 12 / count) ** 0.5
    assert float(found.var()) == pytest.approx(
        1 / 12, abs=5 * (1 / 180 / count) ** 0.5
    )  # var of (n^2) is 1/180
    assert torch.allclose(step, weight.abs().amax(1, keepdim=True) / (2 ** (noise.width.detach() - 1) - 1))
    with torch.no_grad():
        noise.log_bound.sub_(1.0)
    assert (noise.change(weight).abs() <= noise.log_bound.exp() + noise.step() / 2 + 1e-6).all()


def test_pseudo_noise_rounds_outside_training_and_its_width_has_a_gradient() -> None:
    weight = torch.randn(4, 16)
    noise = PseudoNoise.begin(weight, 16, told(budget=3.0))
    noise.eval()
    values, grid = noise.final(weight)
    assert (
        torch.equal(noise.change(weight), values)
        and grid.format.name == "int4-odd"
        and torch.allclose(grid.round(values), values)
    )
    noise.train()
    noise.prepare(course())
    first = noise.change(weight)
    assert torch.equal(first, noise.change(weight))  # one draw a step
    first.square().sum().backward()
    assert noise.place.grad is not None and float(noise.place.grad) < 0  # more bits, less noise


def test_bit_planes_start_at_the_weights_and_end_on_integers() -> None:
    weight = torch.randn(6, 32)
    planes = BitPlanes.begin(weight, 16, SimpleNamespace())  # type: ignore[arg-type]
    step = weight.unflatten(1, (2, 16)).abs().amax(-1) / 127
    rounded = (weight / step.repeat_interleave(16, 1)).round() * step.repeat_interleave(16, 1)
    assert torch.allclose(planes.change(weight), rounded, atol=1e-5)
    with torch.no_grad():
        planes.keep.copy_(torch.tensor([-1.0, -1, -1, 1, 1, 1, 1]))  # the three lowest planes close
    at_end = course()
    at_end.done = 1.0
    planes.prepare(at_end)
    assert float(planes.width.detach()) == pytest.approx(5.0)
    values, grid = planes.final(weight)
    assert grid.format.name == "int5-odd" and torch.allclose(
        planes.change(weight), values, rtol=1e-3, atol=1e-4
    )  # scales are stored in 16 bits
    assert torch.allclose(grid.round(values), values, atol=1e-6)
    gates = torch.sigmoid(planes.sharpness * torch.cat([planes.keep, planes.positive.flatten()]))
    assert (gates * (1 - gates)).max() < 1e-6


def test_the_pull_on_bit_planes_changes_sign_at_the_budget() -> None:
    planes = BitPlanes.begin(torch.randn(2, 8), 8, SimpleNamespace())  # type: ignore[arg-type]
    for budget, sign in ((3.0, 1), (8.5, -1)):
        extra = BitPlanes.extra([planes], [16], torch.zeros(()), course(budget=budget))
        assert extra is not None
        (slope,) = torch.autograd.grad(extra, planes.keep)
        assert (slope * sign > 0).all()


def test_centred_signs_are_balanced() -> None:
    weight = torch.randn(5, 33) + 0.7
    change = CentredSign(group=33)
    values, grid = change.final(weight)
    alpha = weight.abs().mean(1, keepdim=True)
    assert torch.allclose(values, alpha * torch.sign(weight - weight.mean(1, keepdim=True)), rtol=1e-3)
    assert torch.equal(change.change(weight), values) and torch.allclose(grid.round(values), values)
    inputs = torch.linspace(-2, 2, 9, requires_grad=True)
    SignInputs().round(inputs).sum().backward()
    assert torch.equal(SignInputs().round(inputs).detach().unique(), torch.tensor([-1.0, 1.0]))
    assert (
        inputs.grad is not None
        and torch.equal(inputs.grad[[0, 8]], torch.zeros(2))
        and (inputs.grad[3:6] == 1).all()
    )


def test_a_policy_learns_which_format_is_rewarded() -> None:
    """A bandit: the loss is 0 for the second format and 1 for the others, so REINFORCE must end there."""
    policy = FormatPolicy(torch.zeros(3), formats=["int2", "int4", "int8"], group=8)
    optimizer, now = torch.optim.Adam(policy.parameters(), 0.1), course(strength=0.0, budget=4.0)
    for step in range(150):
        now.done = (step + 1) / 150
        policy.prepare(now)
        extra = FormatPolicy.extra([policy], [8], torch.tensor(0.0 if policy.drawn == 1 else 1.0), now)
        assert extra is not None
        optimizer.zero_grad()
        extra.backward()
        optimizer.step()
    chances = torch.softmax(policy.logits.detach(), 0)
    assert int(chances.argmax()) == 1 and float(chances[1]) > 0.9
    policy.eval()
    assert policy.index == 1


def test_loftq_never_grows_and_its_term_is_the_best_of_its_rank() -> None:
    problem = Problem(torch.randn(24, 48), torch.eye(48), named("int2"), "channel")
    gap = torch.randn(12, 20)
    up, down = best_term(gap, 5)
    values = torch.linalg.svdvals(gap)
    assert float((gap - up @ down).norm()) == pytest.approx(float(values[5:].square().sum().sqrt()), rel=1e-5)
    residuals = []
    for alternations in range(6):
        more = {"alternations": alternations} if alternations else {}
        adapter = ADAPTER.chosen("loftq" if alternations else "qlora", rank=8, **more)
        rounded, grid, (up, down) = adapter(problem, lambda p: nearest(p, Options()))
        assert torch.allclose(grid.round(rounded), rounded, atol=1e-6)
        residuals.append(float((problem.weight - rounded - up @ down).norm()))
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(residuals))
    assert residuals[1] < 0.9 * residuals[0]  # QLoRA's start has no term yet


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_adapters_are_counted_saved_and_leave_zeros_alone(
    checkpoints: dict[str, Path], rounding: str, tmp_path: Path
) -> None:
    on = workbench.subject(checkpoints["bert"], data="random")
    from workbench.subjects.changes import Mask

    layer = on.layers()[0]
    layer.attach(Mask(torch.rand(layer.shape) < 0.5))
    fields = {
        "format": "int2",
        "calibration_examples": 8,
        "predict_examples": 0,
        "test_examples": 4,
        "group_size": 16,
        "rounding": rounding,
    }
    plain = Quantize(**fields).run(on, Progress(), cache=False)
    result = Quantize(**fields, adapter={"name": "loftq", "rank": 4}).run(on, Progress(), cache=False)
    assert result.subject is not None and (result.table["weight_error"] < plain.table["weight_error"]).all()
    assert (result.subject.layers()[0].weight[layer.weight == 0] == 0).all()
    extra = result.table["bytes"] - plain.table["bytes"]
    assert [float(e) for e in extra] == [2.0 * 4 * sum(found.shape) for found in result.subject.layers()]
    result.save(tmp_path / "out")
    again = workbench.subject(tmp_path / "out")
    assert again.evaluate("test")["loss"] == pytest.approx(result.subject.evaluate("test")["loss"], abs=1e-6)
    over = Quantize(**(fields | {"format": "int8"})).run(result.subject, Progress(), cache=False).subject
    assert over is not None and not any(
        isinstance(c, Adapter) for found in over.layers() for c in found.changes
    )
    for first, second in zip(result.subject.layers(), over.layers(), strict=True):
        assert torch.allclose(first.weight, second.weight, atol=float(first.weight.detach().abs().max()) / 60)


def test_only_the_adapters_are_trained() -> None:
    on = workbench.subject("digits-vit")
    base = (
        Quantize(
            layers="*",
            format="int2-odd",
            granularity="channel",
            adapter={"name": "loftq", "rank": 4},
            predict_examples=0,
        )
        .run(on, Progress(), cache=False)
        .subject
    )
    assert base is not None
    result = TrainQuantized(**SHORT, method="adapters").run(base, Progress(), cache=False)
    assert result.subject is not None and result.facts["loss"] < 0.8 * result.facts["dense_loss"]
    for before, after in zip(base.layers("*"), result.subject.layers("*"), strict=True):
        assert torch.equal(before.original, after.original) and not torch.equal(before.weight, after.weight)
    assert all(p.requires_grad for p in result.subject.model.parameters())
    with pytest.raises(BadInput, match="adapter"):
        TrainQuantized(**SHORT, method="adapters").run(on, Progress(), cache=False)


def test_l4q_ends_fully_quantized() -> None:
    on = workbench.subject("digits-vit")
    result = TrainQuantized(**SHORT, method={"name": "l4q", "bits": 2}).run(on, Progress(), cache=False)
    plain = Quantize(layers="*", format="int2", granularity="channel", predict_examples=0).run(
        on, Progress(), cache=False
    )
    assert result.subject is not None and result.facts["loss"] < 0.8 * plain.facts["loss"]
    for layer in result.subject.layers("*"):
        assert [type(c) for c in layer.changes] == [FakeQuant]
        assert max(len(torch.unique(row)) for row in layer.weight) <= 4
    others = {n: p for n, p in on.model.named_parameters() if "norm" in n and p.ndim == 1}
    for name, tensor in others.items():
        assert torch.equal(
            result.subject.model.get_parameter(name), tensor
        )  # nothing but terms and steps moved


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "nipq"},
        {"method": "csq", "method.strength": 0.3},
        {"method": "fliqs", "method.formats": ["int2", "int4", "e2m1"]},
    ],
)
def test_learned_widths_end_on_formats(fields: dict[str, object], tmp_path: Path) -> None:
    on = workbench.subject("digits-vit")
    result = TrainQuantized(**(SHORT | {"steps": 60} | fields)).run(on, Progress(), cache=False)
    assert result.subject is not None and result.tables is not None
    widths = result.tables["widths"].set_index("layer")
    for layer in result.subject.layers("*"):
        assert quantizer_of(layer).grid.format.element.bits == widths.loc[layer.name, "bits"]
    assert result.facts["accuracy"] > 0.5 and abs(result.facts["average_width"] - 3.0) < 1.5
    result.save(tmp_path / "out")
    assert workbench.subject(tmp_path / "out").evaluate("test", limit=512)["loss"] == pytest.approx(
        result.facts["loss"], abs=1e-5
    )


def test_binary_weights_and_inputs_train() -> None:
    on = workbench.subject("digits-vit")
    result = TrainQuantized(**(SHORT | {"layers": "blocks"}), method="bibert").run(
        on, Progress(), cache=False
    )
    assert result.subject is not None
    assert result.table["train_loss"].iloc[-5:].mean() < result.table["train_loss"].iloc[:5].mean()
    for layer in result.subject.layers():
        assert all(len(torch.unique(row)) == 2 for row in layer.weight) and any(
            isinstance(c, SignInputs) for c in layer.changes
        )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"method": "l4q", "switch_at": 0.5}, "switch_at"),
        ({"method": "fliqs", "method.formats": ["int4", "mxfp4"]}, "formats"),
        ({"method": "csq", "method.ramp": 0.5}, "ramp"),
    ],
)
def test_refusals(fields: dict[str, object], text: str) -> None:
    with pytest.raises(BadInput, match=text):
        TrainQuantized(**fields).run(workbench.subject("digits-vit"), Progress(), cache=False)
