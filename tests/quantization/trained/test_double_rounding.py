"""Several widths of one stored integer: readings by brute force, gradients against LSQ's,
probabilities by trace, training and saving.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import workbench
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization import Quantize, TrainQuantized
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import Grid
from workbench.quantization.number.packing import quantizer_of
from workbench.quantization.trained.double_rounding import DoubleRounding, at_width, chances_of, narrowed
from workbench.quantization.trained.trained_rounding import LearnedStep

SHORT = {"layers": "*", "steps": 24, "batch_size": 48, "learning_rate": 1e-3, "method": "double-rounding"}


@pytest.mark.parametrize("width", range(2, 8))
def test_every_stored_code_is_read_as_its_rounded_quotient(width: int) -> None:
    codes, step = torch.arange(-127, 128).float()[None], 0.03125
    narrow = narrowed(Grid(named("int8-odd"), torch.tensor([[step]]), None, 255), width)
    most = 2 ** (width - 1) - 1
    quotients = [int(c) / 2 ** (8 - width) for c in codes[0]]
    expected = torch.tensor(
        [max(-most, min(most, round(q))) for q in quotients]
    ).float()  # Python's round takes ties to even
    assert torch.equal(narrow.round(codes * step)[0], expected * step * 2 ** (8 - width))


@pytest.mark.parametrize("width", [8, 6, 4, 2])
def test_training_reads_what_is_stored_and_its_step_moves_as_lsq_moves_its_own(width: int) -> None:
    """At weights that are whole steps one rounding and two agree,
    so the gradient of s is that of a step of this width alone.
    """
    step = 2.0**-6
    weight = torch.randint(-127, 128, (3, 40)).float() * step
    switched = DoubleRounding(torch.full((3, 1), step).log(), widths=[8, 6, 4, 2], group=40)
    switched.drawn = width
    own = LearnedStep(torch.full((3, 1), step * 2 ** (8 - width)), format=f"int{width}-odd", group=40)
    given, coefficients = [weight.clone().requires_grad_() for _ in range(2)], torch.randn(3, 40)
    found = [change.change(w) for change, w in zip((switched, own), given, strict=True)]
    assert torch.allclose(found[0], found[1], rtol=1e-3)
    for values in found:
        (values * coefficients).sum().backward()
    assert (
        given[0].grad is not None
        and given[1].grad is not None
        and switched.log_step.grad is not None
        and own.step.grad is not None
    )
    assert torch.equal(given[0].grad, given[1].grad)
    assert torch.allclose(switched.log_step.grad / step, own.step.grad, rtol=2e-3, atol=1e-5)
    rough = torch.randn(3, 40)
    values, grid = switched.final(rough)
    assert torch.allclose(
        switched.change(rough), narrowed(grid, width).round(values) if width < 8 else values, atol=1e-6
    )


def test_two_roundings_cost_at_most_half_a_stored_step_more() -> None:
    weight = torch.randn(50, 64)
    switched = DoubleRounding.begin(
        weight, 64, TrainQuantized(method={"name": "double-rounding", "widths": [8, 4]})
    )  # type: ignore[arg-type]
    values, grid = switched.final(weight)
    narrow = narrowed(grid, 4)
    inside = weight.abs() <= 7 * narrow.scale
    assert ((narrow.round(values) - weight).abs() <= 0.5 * (narrow.scale + grid.scale) * 1.001)[inside].all()


def test_chances_follow_the_trace() -> None:
    assert torch.allclose(chances_of(0.5, 4), torch.full((4,), 0.25, dtype=torch.float64))
    assert torch.allclose(chances_of(1.0, 4), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64))
    widths = torch.tensor([8.0, 6, 4, 2], dtype=torch.float64)
    means = [float(chances_of(place, 4) @ widths) for place in (0, 0.25, 0.5, 0.75, 1)]
    assert means == sorted(means) and all(
        float(chances_of(p, 4).sum()) == pytest.approx(1) for p in (0.0, 0.3)
    )


def test_one_training_serves_every_width(tmp_path: Path) -> None:
    on = workbench.subject("digits-vit")
    result = TrainQuantized(**SHORT).run(on, Progress(), cache=False)
    assert result.subject is not None and result.tables is not None
    readings = result.tables["readings"].set_index("bits")["loss"]
    assert list(readings.index) == [8, 6, 4, 2] and readings[8] == pytest.approx(result.facts["loss"])
    late = (
        Quantize(layers="*", format="int8-odd", granularity="channel", predict_examples=0)
        .run(on, Progress(), cache=False)
        .subject
    )
    assert (
        late is not None
        and readings[2] < 0.7 * at_width(late, 2, layers="*").evaluate("test", limit=512)["loss"]
    )
    assert result.facts["bytes"] == sum(
        layer.weight.numel() + 2 * layer.shape[0] for layer in result.subject.layers("*")
    )
    assert (
        result.tables["readings"]["bytes"].iloc[0] == result.facts["bytes"]
        and result.tables["readings"]["bytes"].is_monotonic_decreasing
    )
    assert len(result.figure(column="readings").data) == 1 and result.figure().data
    narrow = at_width(result.subject, 4, layers="*")
    for layer in narrow.layers("*"):
        assert (
            quantizer_of(layer).grid.format.name == "int4-odd"
            and layer.weight.unique(dim=None).numel() <= 15 * layer.shape[0]
        )
    assert all(quantizer_of(layer).grid.format.name == "int8-odd" for layer in result.subject.layers("*"))
    result.save(tmp_path / "out")
    again = workbench.subject(tmp_path / "out")
    assert at_width(again, 4, layers="*").evaluate("test", limit=512)["loss"] == pytest.approx(
        readings[4], abs=1e-5
    )


def test_layers_with_large_traces_draw_wide_widths() -> None:
    result = TrainQuantized(**SHORT, **{"method.switching": "by trace"}).run(
        workbench.subject("digits-vit"), Progress(), cache=False
    )
    assert result.tables is not None
    table = result.tables["switching"].sort_values("trace")
    third = len(table) // 3
    assert table["mean_width"].iloc[-third:].mean() > table["mean_width"].iloc[:third].mean() + 0.5
    assert table["mean_width"].between(2, 8).all()


def test_widths_by_layer_and_truncation() -> None:
    on = workbench.subject("digits-vit")
    stored = (
        Quantize(layers="*", format="int8-odd", granularity="channel", predict_examples=0)
        .run(on, Progress(), cache=False)
        .subject
    )
    assert stored is not None
    first, *rest = stored.layers("*")
    mixed = at_width(stored, {first.name: 4}, layers="*")
    assert quantizer_of(mixed.layers("*")[0]).grid.format.name == "int4-odd"
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(rest, mixed.layers("*")[1:], strict=True))
    cut = quantizer_of(first).grid.codes(first.weight)
    signed = torch.where(cut > 127, cut - 256, cut)
    found = at_width(stored, 5, truncate=True, layers="*").layers("*")[0]
    assert torch.equal(
        (found.weight / quantizer_of(found).grid.scale).round(),
        torch.div(signed, 8, rounding_mode="floor").clamp(-15, 15).float(),
    )


@pytest.mark.parametrize(
    ("fields", "text"), [({"method.widths": [8, 1]}, "widths"), ({"method.widths": [4, 4]}, "widths")]
)
def test_refusals(fields: dict[str, object], text: str) -> None:
    with pytest.raises(BadInput, match=text):
        TrainQuantized(**(SHORT | fields)).run(workbench.subject("digits-vit"), Progress(), cache=False)


def test_only_symmetric_integers_are_read_at_fewer_bits() -> None:
    other = (
        Quantize(layers="*", format="nf4", predict_examples=0)
        .run(workbench.subject("digits-vit"), Progress(), cache=False)
        .subject
    )
    assert other is not None
    with pytest.raises(BadInput, match="nf4"):
        at_width(other, 2, layers="*")
