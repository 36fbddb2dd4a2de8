"""The instrument on small random models of six architectures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import workbench
from tests.conftest import ARCHITECTURES
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization import FakeQuant, Quantize, fit, named
from workbench.results import Result
from workbench.subjects import Subject
from workbench.subjects.changes import Mask

SMALL = {"calibration_examples": 16, "predict_examples": 4, "test_examples": 8, "group_size": 16}


def open_random(folder: Path) -> Subject:
    return workbench.subject(folder, data="random")


@pytest.fixture()
def bert(checkpoints: dict[str, Path]) -> Subject:
    return open_random(checkpoints["bert"])


def run(on: Subject, **fields: object) -> Result:
    return Quantize(**(SMALL | fields)).run(on, progress=Progress(), cache=False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_every_architecture(checkpoints: dict[str, Path], architecture: str, rounding: str) -> None:
    on = open_random(checkpoints[architecture])
    before = on.fingerprint
    result = run(on, rounding=rounding, format="int4")
    assert on.fingerprint == before and result.subject is not None
    for layer in result.subject.layers():
        change = next(c for c in layer.changes if isinstance(c, FakeQuant))
        assert torch.allclose(change.change(layer.weight), layer.weight, atol=1e-6)
        assert torch.unique(change.grid.codes(layer.weight)).numel() <= 16
    assert result.facts["predicted_change"] == pytest.approx(result.table["predicted_change"].sum())
    assert result.facts["average_bits"] == pytest.approx(4 + 16 / 16)


@pytest.mark.parametrize(
    "format",
    ["int", "e4m3fn", "e2m1", "nf4", "mxfp4", "nvfp4", "ternary", "binary", "bf16", "fixed8.6", "quantile3"],
)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "gptq"])
def test_every_format_with_every_rounding(bert: Subject, format: str, rounding: str) -> None:
    result = run(bert, format=format, rounding=rounding, predict_examples=0, layers="*.0.attention.self.*")
    assert result.table["output_error"].between(0, 2).all()


def test_zeros_stay_zeros_in_either_order(bert: Subject) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in bert.layers():
        layer.attach(Mask(torch.rand(layer.shape, generator=generator) < 0.5))
    result = run(bert, rounding="gptq", format="uint3")
    assert result.subject is not None
    for dense, layer in zip(bert.layers(), result.subject.layers(), strict=True):
        assert (layer.weight[dense.weight == 0] == 0).all()
        assert (layer.original[dense.weight == 0] == 0).all()
        layer.attach(Mask(torch.rand(layer.shape, generator=generator) < 0.5))
        assert (layer.weight == 0).float().mean() > 0.4


def test_gptq_is_closer_than_nearest(bert: Subject) -> None:
    nearest, gptq = (run(bert, rounding=r, format="int3").table["output_error"] for r in ("nearest", "gptq"))
    assert gptq.mean() < 0.8 * nearest.mean()


def test_more_bits_less_error(bert: Subject) -> None:
    errors = [run(bert, format=f"int{b}", predict_examples=0).facts["output_error"] for b in range(2, 9)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4


def test_saved_and_opened_again(bert: Subject, tmp_path: Path) -> None:
    result = run(bert, rounding="gptq", format="uint3")
    result.save(tmp_path / "out")
    again = workbench.subject(tmp_path / "out")
    assert result.subject is not None
    for mine, theirs in zip(result.subject.layers(), again.layers(), strict=True):
        assert torch.equal(mine.weight, theirs.weight)
        assert [type(c) for c in theirs.changes] == [FakeQuant]


def test_bits_by_layer(bert: Subject) -> None:
    result = run(bert, format="int4", layer_bits={"*.query": 8, "*.dense": 2}, predict_examples=0)
    bits = dict(zip(result.table["layer"], result.table["bits"], strict=True))
    assert {v - 1 for k, v in bits.items() if k.endswith("query")} == {8}
    assert {v - 1 for k, v in bits.items() if k.endswith("dense")} == {2}
    assert {v - 1 for k, v in bits.items() if k.endswith("key")} == {4}


def test_straight_through_gradient() -> None:
    weight = torch.tensor([[0.5, -3.0, 0.1, 2.0]], requires_grad=True)
    grid = fit(torch.tensor([[1.0, -1.0, 0.0, 0.0]]), named("int4"), "channel")
    (FakeQuant.of(grid).change(weight) * torch.arange(1.0, 5.0)).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [[1.0, 0.0, 3.0, 0.0]]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"format.bits": 0}, "bits"),
        ({"format": "int0"}, "format"),
        ({"layers": "nothing*"}, "layers"),
        ({"rounding": "bankers"}, "rounding"),
        ({"format": "mxfp4", "granularity": "channel"}, "granularity"),
        ({"layer_bits": {"*": 12}}, "layer_bits"),
        ({"layer_bits": {"zzz": 3}}, "layers"),
        ({"format": "uint4", "range": "mean"}, "range"),
    ],
)
def test_refusals_name_the_field(bert: Subject, fields: dict[str, object], text: str) -> None:
    with pytest.raises(BadInput, match=text):
        run(bert, **fields)


def test_unusual_weights(bert: Subject) -> None:
    layer = bert.layers()[0]
    with torch.no_grad():
        layer.original[0] = 0.0
    assert (run(bert, format="int2").subject.layers()[0].weight[0] == 0).all()  # type: ignore[union-attr]
    with torch.no_grad():
        layer.original[0, 0] = float("nan")
    with pytest.raises(BadInput, match="nan or inf"):
        run(bert, predict_examples=0, test_examples=0)
