"""Error anatomy against direct computation; quantization-aware training."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import workbench
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization import ErrorAnatomy, FakeQuant, TrainQuantized
from workbench.quantization.trained.trained_rounding import LearnedStep, MeanScaled
from workbench.subjects import Subject


def test_anatomy(checkpoints: dict[str, Path]) -> None:
    on = workbench.subject(checkpoints["bert"], data="random")
    result = ErrorAnatomy(format="int4", group_size=16, calibration_examples=8, predict_examples=4).run(
        on, Progress(), cache=False
    )
    table = result.table.set_index("layer")
    first = table.index[0]
    assert table.loc[first, "inherited_sqnr"] == 200.0  # nothing comes before the first layer
    assert table.loc[first, "total_sqnr"] == pytest.approx(table.loc[first, "output_sqnr"])
    later = table.iloc[4:]
    assert (later["total_sqnr"] < later["output_sqnr"] + 0.5).all() and (later["inherited_sqnr"] < 100).all()
    assert (table["not_nearest"] == 0).all()
    assert table["weight_sqnr"].between(10, 35).all()
    assert result.facts["sum_of_predicted"] == pytest.approx(result.table["predicted_change"].sum())
    assert result.arrays is not None
    assert np.allclose(result.arrays["histograms"].sum(1), 1.0) and set(result.arrays["grid"]) == set(
        range(-8, 8)
    )
    view_model = result.view_model()
    assert view_model is not None
    for view in get_args(view_model.model_fields["view"].annotation):
        assert result.figure(view=view).data, view


def test_noise_is_that_of_the_model_run_twice(checkpoints: dict[str, Path]) -> None:
    """Inputs and outputs of one layer, taken by hooks from the dense model and from the model with rounded
    weights and inputs.
    """
    on = workbench.subject(checkpoints["bert"], data="random")
    anatomy = ErrorAnatomy(
        format="int3",
        group_size=16,
        activations="token",
        calibration_examples=8,
        predict_examples=2,
        test_examples=4,
    )
    result = anatomy.run(on, Progress(), cache=False)
    twin = anatomy.quantizer().run(on, Progress(), cache=False).subject
    name = result.table["layer"][7]
    seen: dict[str, list[torch.Tensor]] = {"dense": [], "quantized": []}
    for key, subject in (("dense", on), ("quantized", twin)):
        layer = next(layer for layer in subject.layers() if layer.name == name)
        with (
            layer.module.register_forward_hook(
                lambda module, args, output, key=key: seen[key].append((args[0].detach(), output.detach()))
            ),
            torch.no_grad(),
        ):
            for batch in subject.batches("calibration", 8, 8):
                subject.task.output(subject.model, batch)
    (x, exact), (y, total) = seen["dense"][0], seen["quantized"][0]
    row = result.table.set_index("layer").loc[name]
    keep = next(iter(on.batches("calibration", 8, 8))).get("attention_mask", torch.ones(x.shape[:2])).bool()
    assert bool(keep.all())

    def sqnr(signal: torch.Tensor, other: torch.Tensor) -> float:
        return float(10 * torch.log10(signal.square().sum() / (other - signal).square().sum()))

    bias = next(layer for layer in on.layers() if layer.name == name).bias
    assert row["activation_sqnr"] == pytest.approx(sqnr(x, y), abs=0.01)
    assert row["total_sqnr"] == pytest.approx(sqnr(exact - bias.detach(), total - bias.detach()), abs=0.01)
    assert row["activation_rounding_sqnr"] > row["activation_sqnr"] and "loss" in result.facts
    measured = loss_of_two(twin) - loss_of_two(on)
    assert result.facts["measured_change"] == pytest.approx(measured, abs=1e-5)


def loss_of_two(on: Subject) -> float:
    with torch.no_grad():
        return float(on.loss(next(iter(on.batches("calibration", 2, 2)))))


def test_gptq_moves_weights_away_from_nearest(checkpoints: dict[str, Path]) -> None:
    on = workbench.subject(checkpoints["bert"], data="random")
    found = ErrorAnatomy(
        format="int3", rounding="gptq", granularity="channel", calibration_examples=8, predict_examples=0
    ).run(on, Progress(), cache=False)
    nearest = ErrorAnatomy(
        format="int3", granularity="channel", calibration_examples=8, predict_examples=0
    ).run(on, Progress(), cache=False)
    assert found.table["not_nearest"].between(0.05, 0.8).all()
    assert found.table["output_sqnr"].mean() > nearest.table["output_sqnr"].mean()


def test_learned_step_gradient_is_the_papers() -> None:
    """LSQ, eq. 3: -w/s + round(w/s) inside, the bound outside; times 1 / sqrt(n highest)."""
    weight, step = torch.tensor([[0.24, -0.9, 2.0, 0.13]]), 0.2
    change = LearnedStep(torch.tensor([[step]]), format="int3", group=4)
    change.change(weight).sum().backward()
    units = weight[0] / step
    inside = [float(u.clamp(-4, 3).round() - (u if -4 < u < 3 else 0)) for u in units]  # Q_N = 4, Q_P = 3
    expected = sum(inside) / (4 * 3) ** 0.5
    assert change.step.grad is not None and float(change.step.grad) == pytest.approx(expected, rel=1e-5)


def test_ternary_follows_the_mean_magnitude() -> None:
    weight = torch.randn(3, 8)
    change = MeanScaled(format="ternary", group=8)
    gamma = weight.abs().mean(1, keepdim=True)
    assert torch.allclose(change.change(weight), gamma * (weight / gamma).clamp(-1, 1).round(), atol=2e-3)
    change.blend.fill_(0.25)
    assert torch.allclose(
        change.change(weight), 0.75 * weight + 0.25 * gamma * (weight / gamma).clamp(-1, 1).round(), atol=2e-3
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "lsq", "method.bits": 2},
        {"method": "ternary", "switch_at": 0.5, "method.ramp": 0.25},
        {"method": "binary"},
    ],
)
def test_training_through_the_rounding(fields: dict[str, object], tmp_path: Path) -> None:
    on = workbench.subject("digits-vit")
    result = TrainQuantized(
        **({"steps": 40, "batch_size": 64, "learning_rate": 1e-3, "layers": "*"} | fields)
    ).run(on, Progress(), cache=False)
    assert result.subject is not None
    for layer in result.subject.layers("*"):
        assert [type(c) for c in layer.changes] == [FakeQuant]
        levels = {"lsq": 4, "ternary": 3, "binary": 2}[str(fields["method"])]
        assert max(len(torch.unique(row)) for row in layer.weight) <= levels
    assert result.facts["accuracy"] > 0.5
    result.save(tmp_path / "out")
    assert workbench.subject(tmp_path / "out").evaluate("test", limit=512)["loss"] == pytest.approx(
        result.facts["loss"], abs=1e-5
    )
    assert result.figure().data


def test_training_beats_rounding_afterwards() -> None:
    on = workbench.subject("digits-vit")
    from workbench.quantization import Quantize

    plain = Quantize(
        layers="*", format="int2-odd", granularity="channel", predict_examples=0, test_examples=512
    ).run(on, Progress(), cache=False)
    trained = TrainQuantized(
        layers="*", method={"name": "lsq", "bits": 2}, steps=60, batch_size=64, learning_rate=1e-3
    ).run(on, Progress(), cache=False)
    assert trained.facts["loss"] < 0.7 * plain.facts["loss"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"method": "lsq", "method.ramp": 0.2}, "ramp"),
        ({"method": "ternary", "method.ramp": 0.6, "switch_at": 0.6}, "ramp"),
    ],
)
def test_training_refuses(fields: dict[str, object], text: str) -> None:
    with pytest.raises(BadInput, match=text):
        TrainQuantized(**fields).run(workbench.subject("digits-vit"), Progress(), cache=False)
