"""Training towards a teacher, and binary weights with a learned scale and offset:
closed forms, gradients, an exact freeze.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import workbench
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization import FakeQuant, TrainQuantized
from workbench.quantization.number.packing import packed_layer, quantizer_of, unpacked_layer
from workbench.quantization.trained.fbi_llm import ShiftedSign
from workbench.quantization.trained.objective import Objective, teacher_loss
from workbench.subjects import Subject

SHORT: dict[str, Any] = {
    "layers": "*",
    "steps": 20,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "test_examples": 64,
}


def shifted(weight: torch.Tensor, shared: str, group: int) -> ShiftedSign:
    settings = TrainQuantized(method={"name": "fbi", "shared": shared})
    return ShiftedSign.begin(weight, group, settings)


@pytest.mark.parametrize(("shared", "group", "axis"), [("column", 12, 0), ("row", 12, 1)])
def test_shifted_signs_are_the_formula(shared: str, group: int, axis: int) -> None:
    """Start mean w and mean |w - mean w| of a column or row; gradients alpha g, sum g sign(w), sum g;
    values exactly on the grid that is kept.
    """
    weight = torch.randn(6, 12).add_(0.3).requires_grad_()
    rounding = shifted(weight.detach(), shared, group)
    beta = weight.detach().mean(axis, keepdim=True)
    alpha = (weight.detach() - beta).abs().mean(axis, keepdim=True)
    sign = torch.where(weight.detach() >= 0, 1.0, -1.0)
    values = rounding.change(weight)
    assert torch.allclose(values, alpha * sign + beta, rtol=2e-3, atol=2e-3)  # both are kept in 16 bits
    towards = torch.randn(6, 12)
    (values * towards).sum().backward()
    assert weight.grad is not None and torch.allclose(weight.grad, alpha * towards, rtol=1e-5)
    assert rounding.alpha.grad is not None and torch.allclose(
        rounding.alpha.grad, (towards * sign).sum(axis, keepdim=True), atol=1e-5
    )
    assert rounding.beta.grad is not None and torch.allclose(
        rounding.beta.grad, towards.sum(axis, keepdim=True), atol=1e-5
    )
    with torch.no_grad():
        rounding.alpha[..., 0] *= -1  # a scale that training took through zero
    final, grid = rounding.final(weight.detach())
    assert (
        torch.equal(final, rounding.change(weight.detach()))
        and torch.equal(grid.decode(grid.codes(final)), final)
        and (grid.scale > 0).all()
    )
    side = grid.scale.numel()
    assert (
        grid.bytes((6, 12)) == (72 + 32 * side) / 8
    )  # one bit a weight, 16 bits for each scale and each offset


def test_whole_offsets_outside_the_codes_are_stored_in_full() -> None:
    """A column whose zero points are whole numbers that one bit does not hold."""
    from workbench.quantization.number.formats import named
    from workbench.quantization.number.grid import Grid
    from workbench.subjects import Layer

    grid = Grid(named("binary"), torch.ones(4, 1), torch.tensor([[-1.0], [2.0], [0.0], [1.0]]), 8)
    module = torch.nn.Linear(8, 4)
    layer = Layer("layer", module)
    layer.attach(FakeQuant.of(grid))
    stored = packed_layer(layer)
    assert stored["zero"].dtype == torch.float16 and torch.equal(
        unpacked_layer(stored, quantizer_of(layer), (4, 8)), layer.weight
    )
    assert sum(t.numel() * t.element_size() for t in stored.values()) == grid.bytes((4, 8))


def test_experts_and_short_groups() -> None:
    stack = torch.randn(3, 4, 10)
    for shared, group in (("column", 10), ("row", 4)):
        values, grid = shifted(stack, shared, group).final(stack)
        assert torch.equal(grid.decode(grid.codes(values)), values)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_teachers_loss(temperature: float) -> None:
    """At the teacher itself: its entropy, with a zero gradient; elsewhere the divergence is added;
    gradient T (p - q) / items.
    """
    on = workbench.subject("digits-vit")
    batch = {"labels": torch.tensor([0, 1, 2])}
    target, output = torch.randn(3, 10), torch.randn(3, 10, requires_grad=True)
    p, q = (torch.softmax(t.detach() / temperature, -1) for t in (target, output))
    entropy = -(p * p.log()).sum(-1).mean() * temperature**2
    same = target.clone().requires_grad_()
    found = teacher_loss(on, same, target, batch, temperature)
    assert float(found.detach()) == pytest.approx(float(entropy), rel=1e-5)
    assert float(torch.autograd.grad(found, same)[0].abs().max()) < 1e-6
    found = teacher_loss(on, output, target, batch, temperature)
    assert float(found.detach()) == pytest.approx(
        float(entropy + F.kl_div(q.log(), p, reduction="batchmean") * temperature**2), rel=1e-5
    )
    assert torch.allclose(torch.autograd.grad(found, output)[0], temperature * (q - p) / 3, atol=1e-6)


def test_a_language_models_teacher_sees_the_same_positions(checkpoints: dict[str, Path]) -> None:
    on = workbench.subject(checkpoints["llama"], data="random")
    batch = next(on.batches("train", 4))
    output = on.task.output(on.model, batch).detach()
    rows, _ = on.task.flat(output, batch)
    assert float(teacher_loss(on, output, output, batch)) == pytest.approx(
        float(-(rows.softmax(-1) * rows.log_softmax(-1)).sum(-1).mean()), rel=1e-5
    )


def test_regression_asks_for_the_teachers_output() -> None:
    from workbench.subjects.tasks import ModuleRegression

    on = Subject(
        "line",
        torch.nn.Linear(2, 1),
        ModuleRegression(),
        {"train": {"inputs": torch.ones(2, 2), "labels": torch.ones(2, 1)}},
    )
    assert (
        float(teacher_loss(on, torch.zeros(2, 1), torch.full((2, 1), 3.0), {"labels": torch.ones(2, 1)}))
        == 4.5
    )


def test_the_objective_mixes_and_its_teacher_stands_still() -> None:
    on = workbench.subject("digits-vit").copy()
    batch = next(on.batches("train", 8))
    task = float(on.loss(batch).detach())
    losses = [
        float(Objective(TrainQuantized(distillation=d, temperature=2.0), on)(on, batch).detach())
        for d in (0.0, 0.25, 1.0)
    ]
    assert losses[0] == pytest.approx(task) and losses[1] == pytest.approx(
        0.75 * task + 0.25 * losses[2], rel=1e-5
    )
    objective = Objective(TrainQuantized(distillation=1.0, temperature=2.0), on)
    with torch.no_grad():
        for tensor in on.model.parameters():
            tensor.add_(0.05 * torch.randn_like(tensor))
    assert float(objective(on, batch).detach()) > losses[2] and objective.parts["task_loss"] != task
    assert objective.teacher is not None and float(objective.teacher.loss(batch)) == pytest.approx(task)


@pytest.mark.parametrize("shared", ["column", "row"])
def test_fbi_trains_freezes_and_is_stored(shared: str, tmp_path: Path) -> None:
    on = workbench.subject("digits-vit")
    fields = SHORT | {"method": "fbi", "method.shared": shared, "distillation": 1.0}
    result = TrainQuantized(**fields).run(on, Progress(), cache=False)
    assert result.subject is not None
    assert result.table["teacher_loss"].iloc[-5:].mean() < result.table["teacher_loss"].iloc[:5].mean()
    for layer in result.subject.layers("*"):
        assert [type(c) for c in layer.changes] == [FakeQuant]
        assert (
            max(len(torch.unique(line)) for line in (layer.weight.mT if shared == "column" else layer.weight))
            <= 2
        )
        stored = packed_layer(layer)
        assert torch.equal(unpacked_layer(stored, quantizer_of(layer), layer.shape), layer.weight)
        assert sum(t.numel() * t.element_size() for t in stored.values()) == -(
            -quantizer_of(layer).grid.bytes(layer.shape) // 1
        )
    assert result.facts["bytes"] == sum(
        -(-quantizer_of(layer).grid.bytes(layer.shape) // 1) for layer in result.subject.layers("*")
    )
    result.save(tmp_path / "out")
    assert workbench.subject(tmp_path / "out").evaluate("test", limit=64)["loss"] == pytest.approx(
        result.facts["loss"], abs=1e-5
    )


def test_any_method_takes_a_teacher() -> None:
    on = workbench.subject("digits-vit")
    plain = TrainQuantized(**SHORT, method={"name": "lsq", "bits": 2}).run(on, Progress(), cache=False)
    result = TrainQuantized(
        **SHORT, method={"name": "lsq", "bits": 2}, distillation=0.5, temperature=2.0
    ).run(on, Progress(), cache=False)
    assert (
        "teacher_loss" not in plain.table
        and not result.table["task_loss"].equals(plain.table["train_loss"])
        and result.facts["accuracy"] > 0.5
    )
    assert result.figure(column="teacher_loss").data


def test_a_custom_loss_has_no_place_for_a_teacher() -> None:
    from workbench.subjects.tasks import CustomLoss

    data = {"inputs": torch.randn(4, 3), "labels": torch.randn(4, 2)}
    on = Subject(
        "own",
        torch.nn.Sequential(torch.nn.Linear(3, 2)),
        CustomLoss(function=lambda out, b: (out - b["labels"]).square().mean()),
        {"train": data, "test": data},
    )
    with pytest.raises(BadInput, match="distillation"):
        TrainQuantized(layers="*", distillation=0.5).run(on, Progress(), cache=False)
