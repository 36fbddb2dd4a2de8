"""The quadratic prediction against exact expansions, finite differences and the measured change."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import ARCHITECTURES
from tests.curvature.small import mlp, stock
from workbench.curvature import measured_change, predicted_change
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.subjects import LowRank, Mask, Subject


def random_deltas(subject: Subject, scale: float, glob: str = "*") -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        layer.name: scale
        * torch.randn(layer.shape, generator=draw, dtype=torch.float64).to(layer.original.dtype)
        for layer in subject.layers(glob)
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prediction_is_the_taylor_expansion_on_every_architecture(architecture: str) -> None:
    """Symmetric differences of the measured change isolate each order:
    (f(d) - f(-d)) / 2 and (f(d) + f(-d)) / 2.
    """
    subject = stock(architecture, torch.float64)
    before = subject.fingerprint
    deltas = random_deltas(subject, 1e-6)  # small: ReLU and expert routing have kinks
    predicted = predicted_change(subject, deltas, batch_size=4)
    plus = measured_change(subject, deltas, batch_size=4)
    minus = measured_change(subject, {k: -v for k, v in deltas.items()}, batch_size=4)
    assert predicted.first == pytest.approx((plus - minus) / 2, rel=1e-4)
    assert predicted.second == pytest.approx((plus + minus) / 2, rel=1e-3)
    assert set(predicted.by_layer) == set(deltas)
    assert subject.fingerprint == before
    assert all(p.requires_grad for p in subject.model.parameters())


def test_prediction_is_exact_for_a_quadratic_loss_and_does_not_depend_on_the_batch_size() -> None:
    subject = mlp(loss="squared_error", widths=(5, 3))
    deltas = random_deltas(subject, 1.0)
    predictions = [predicted_change(subject, deltas, batch_size=b) for b in (1, 7, 64)]
    for predicted in predictions:
        assert predicted.total == pytest.approx(measured_change(subject, deltas, batch_size=5), rel=1e-12)
        assert predicted.second == pytest.approx(predictions[0].second, rel=1e-12)


def test_derivatives_are_with_respect_to_the_effective_weight() -> None:
    """A pruned weight that returns must be predicted: its gradient is not masked away."""
    subject = mlp(loss="squared_error", widths=(5, 3))
    layer = subject.layers("*")[0]
    layer.attach(Mask(torch.zeros(layer.shape)))
    layer.attach(LowRank(torch.randn(3, 1, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)))
    cls = type(layer.module)
    deltas = random_deltas(subject, 0.5)
    predicted = predicted_change(subject, deltas)
    assert predicted.total == pytest.approx(measured_change(subject, deltas), rel=1e-12)
    assert abs(predicted.first) > 1e-3
    assert type(layer.module) is cls
    assert torch.count_nonzero(layer.weight) == 0


def test_layer_shares_add_up_to_the_joint_form() -> None:
    subject = mlp()
    deltas = random_deltas(subject, 0.1)
    joint = predicted_change(subject, deltas)
    alone = {name: predicted_change(subject, {name: d}) for name, d in deltas.items()}
    for name in deltas:
        assert joint.by_layer[name][0] == pytest.approx(alone[name].first, rel=1e-10)
    assert joint.second != pytest.approx(sum(p.second for p in alone.values()), rel=1e-3)


def test_stop_keeps_what_was_seen() -> None:

    class StopAfterOne(Progress):
        def show(self, label: str, done: int, total: int | None) -> None:
            if done == 1:
                self.stop.set()

    progress = StopAfterOne()
    subject = mlp()
    predicted = predicted_change(subject, random_deltas(subject, 0.1), batch_size=4, progress=progress)
    assert predicted.partial and predicted.examples == 4


@pytest.mark.parametrize(
    ("deltas", "word"),
    [
        ({}, "empty"),
        ({"nothing": torch.zeros(1, 1)}, "'nothing' is no layer"),
        ({"0": torch.zeros(1, 1)}, "shape"),
    ],
)
def test_bad_deltas_are_named(deltas: dict[str, torch.Tensor], word: str) -> None:
    with pytest.raises(BadInput, match=word):
        predicted_change(mlp(), deltas)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    subject = mlp()
    subject.splits["calibration"]["inputs"] = subject.splits["calibration"]["inputs"] * float("nan")
    with pytest.raises(BadInput, match="finite"):
        predicted_change(subject, random_deltas(subject, 0.1))
