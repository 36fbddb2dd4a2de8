"""Schedules at their corners, against torch's where it has them, and their state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from workbench.errors import BadInput
from workbench.training.schedule import schedules as s
from workbench.training.schedule.power import PowerLR
from workbench.training.schedule.time_budget import TimeBudgetLR

PROFILES = [n for n, e in s.LEARNING_RATE_SCHEDULE.entries.items() if "scheduler" not in e.traits]


def at(name: str, p: float, **options: object) -> float:
    """A schedule's multiple of the peak at the finished fraction p."""
    return s.profile(name, **options)(p)


def optimizer(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def test_rex() -> None:
    assert at("rex", 0.5) == pytest.approx(2 / 3, abs=1e-15) and at("rex", 0) == 1 and at("rex", 1) == 0
    for p in np.linspace(0, 1, 11):
        assert at("rex", p) == pytest.approx(2 * (1 - p) / (2 - p)) and at("linear", p) <= at("rex", p)


def test_uba() -> None:
    for p in np.linspace(0, 1, 101):
        assert at("uba", p, phi=2.0) == pytest.approx(at("cosine", p), abs=1e-14)
        assert at("uba", p, phi=0.5) >= at("uba", p, phi=2.0) - 1e-15 >= at("uba", p, phi=5.0) - 2e-15
    for phi in (0.25, 1.0, 5.0, 20.0):
        values = [at("uba", p, phi=phi, final=0.1) for p in np.linspace(0, 1, 101)]
        assert (
            values[0] == pytest.approx(1)
            and values[-1] == pytest.approx(0.1)
            and all(np.diff(values) <= 1e-15)
        )
        for p in np.linspace(0, 0.99, 12):
            assert 1 / at("uba", p, phi=phi) - 1 == pytest.approx(phi / 2 * (1 / at("cosine", p) - 1))


def test_infinite_corners() -> None:
    for shape in ("cosine", "inverse-sqrt"):
        rate = s.profile("infinite", cooldown=0.3, constant=0.4, anneal=0.2, final=0.02, shape=shape)
        assert rate(0) == 1 and rate(0.3) == 0.4 and rate(0.3 - 1e-12) == pytest.approx(0.4)
        assert rate(0.79) == 0.4
        assert rate(0.9) == pytest.approx(math.sqrt(0.4 * 0.02)) and rate(1) == pytest.approx(0.02)
    assert at("infinite", 1.0, anneal=0.0, constant=0.3) == 0.3


def test_power() -> None:
    """Batch and token number agnostic: constant until the power law falls below the peak; the law itself;
    the decay's ends.
    """
    rate = PowerLR(optimizer(0.02), 1000, batch=128, tokens=128 * 4096, warmup=10, decay=0.1, final=0.01).rate
    crossing = (0.02 / (128 * 4)) ** (1 / -0.51) / (128 * 4096)  # the step whose tokens give exactly the peak
    assert rate(0.02, 20) == 0.02 if crossing > 21 else True
    late = 800
    assert rate(0.02, late) == pytest.approx(min(0.02, 128 * 4 * ((late + 1) * 128 * 4096) ** -0.51))
    assert rate(0.02, 0) == pytest.approx(0.02 / 11) and rate(0.02, 1000) == pytest.approx(
        rate(0.02, 900) * 0.01
    )
    # a peak that the law never reaches: the warm-up is a straight line to the law all the same
    rise = np.array([s.sampled("power", 200, 0.1, learning_rate=1e9, batch=32, tokens=8192.0)[:21]])
    assert np.diff(rise) == pytest.approx(rise[0, 0])
    # two budgets share the rate up to the earlier one's decay
    longer = PowerLR(optimizer(0.02), 5000, batch=128, tokens=128 * 4096, warmup=10).rate
    assert all(rate(0.02, t) == longer(0.02, t) for t in range(900))
    # doubling the batch at the same tokens doubles the law
    double = PowerLR(optimizer(1e9), 500, batch=256, tokens=256 * 4096).rate
    assert double(1e9, 99) == pytest.approx(
        2 * PowerLR(optimizer(1e9), 1000, batch=128, tokens=128 * 4096).rate(1e9, 199)
    )


def test_wsd() -> None:
    assert (
        at("wsd", 0.8) == 1
        and at("wsd", 0.9) == pytest.approx(0.5)
        and at("wsd", 1.0) == pytest.approx(0, abs=1e-15)
    )
    assert at("wsd", 0.85, shape="sqrt") == pytest.approx(0.5) and at(
        "wsd", 0.9, shape="cosine"
    ) == pytest.approx(0.5)
    assert at("wsd", 0.9, shape="exponential") == pytest.approx(0.1)


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_starts_at_one_and_never_rises(name: str) -> None:
    values = [at(name, p) for p in np.linspace(0, 1, 201)]
    assert values[0] == pytest.approx(1.0) and min(values) >= 0 and max(np.diff(values)) <= 1e-12


def test_equal_to_torch_where_torch_has_them() -> None:
    pairs = {
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer(), 50),
        "linear": torch.optim.lr_scheduler.LinearLR(optimizer(), 1.0, 0.0, 50),
        "polynomial": torch.optim.lr_scheduler.PolynomialLR(optimizer(), 50, 2.0),
        "exponential": torch.optim.lr_scheduler.ExponentialLR(optimizer(), 0.01 ** (1 / 50)),
        "step": torch.optim.lr_scheduler.MultiStepLR(optimizer(), [25, 38], 0.1),
    }
    for name, theirs in pairs.items():
        mine = s.sampled(name, 50)
        expected = []
        for _ in range(50):
            expected.append(theirs.get_last_lr()[0])
            theirs.optimizer.step()
            theirs.step()
        np.testing.assert_allclose(mine, expected, atol=1e-9, err_msg=name)
    one = s.sampled("one-cycle", 40, learning_rate=2.0)
    assert one.max() == pytest.approx(2.0, rel=0.01) and one[0] == pytest.approx(2.0 / 25)


def test_warmup_and_sampling() -> None:
    values = s.sampled("cosine", 100, warmup=0.1)
    np.testing.assert_allclose(values[:11], np.arange(1, 12) / 11)
    assert values[10] == 1.0
    coarse = s.sampled("rex", 100, sampling=25)
    assert len(set(coarse)) == 4 and coarse[25] == pytest.approx(at("rex", 0.25)) and coarse[99] == coarse[75]


def test_time_budget() -> None:
    now = [0.0]
    schedule = TimeBudgetLR(
        opt := optimizer(), s.profile("linear"), total=10.0, warmup=2.0, clock=lambda: now[0]
    )
    seen = {}
    for now[0] in (1.0, 2.0, 6.0, 10.0):
        opt.step()
        schedule.step()
        seen[now[0]] = opt.param_groups[0]["lr"]
    assert seen == {1.0: 0.5, 2.0: 1.0, 6.0: 0.5, 10.0: 0.0} and schedule.spent
    now[0] = 6.0
    state = schedule.state_dict()
    now[0] = 100.0
    again = TimeBudgetLR(optimizer(), s.profile("linear"), total=10.0, warmup=2.0, clock=lambda: now[0])
    again.load_state_dict(state)
    assert again.elapsed == pytest.approx(6.0)


def test_scaling_rules() -> None:
    assert s.scaled_lr(0.1, 64, 16, "linear") == pytest.approx(0.4) and s.scaled_lr(
        0.1, 64, 16, "sqrt"
    ) == pytest.approx(0.2)
    with pytest.raises(BadInput, match="rule"):
        s.scaled_lr(0.1, 64, 16, "cubic")


def test_areas() -> None:
    """Means of the profiles by their integrals: linear 1/2, cosine 1/2, REX 2 - 2 ln 2."""
    areas = s.areas(["linear", "cosine", "rex"], 4000)
    assert areas["linear"] == pytest.approx(0.5, abs=1e-3) and areas["cosine"] == pytest.approx(0.5, abs=1e-3)
    assert areas["rex"] == pytest.approx(2 - 2 * math.log(2), abs=1e-3)


def test_errors() -> None:
    with pytest.raises(BadInput, match="schedule.batch: "):
        s.make_schedule("power")
    with pytest.raises(BadInput, match="warmup"):
        s.make_schedule("cosine", warmup=1.0)
    with pytest.raises(BadInput, match="plateau"):
        s.sampled("plateau", 5)
