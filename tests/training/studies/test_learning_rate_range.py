"""What a range test says of a curve: nothing below the noise, and nothing that depends on sign or unit."""

import math

import numpy as np
import pandas as pd
import pytest
from torch import nn

from workbench.errors import BadInput
from workbench.subjects import Subject
from workbench.training.studies.critical_batch import CriticalBatch
from workbench.training.studies.learning_rate_range import LearningRateRange, noise_of, rose, smoothed

RATES = np.geomspace(1e-5, 1.0, 200)
TEST = LearningRateRange()


def curve(seed, noise=0.1, fall=1.0, scale=1.0, shift=0.0):
    """A loss that falls around 0.01 to 0.02 and diverges above 0.3; cut where the test would stop."""
    exact = fall * np.exp(-np.cumsum(RATES) / 0.16) + np.where(RATES > 0.3, (RATES / 0.3) ** 4 - 1, 0)
    losses = scale * (exact + noise * np.random.default_rng(seed).standard_normal(200)) + shift
    end = next((k for k in range(21, 200) if rose(losses[:k], 0.9) is not None), 200)
    return pd.DataFrame({"lr": RATES[:end], "loss": losses[:end], "smooth": smoothed(losses[:end], 0.9)})


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3])
def test_the_fall_is_found_in_noise(noise):
    for seed in range(10):
        found = TEST.found(curve(seed, noise), False)
        assert 0.004 < found["lr_steepest"] < 0.04, seed
        assert 0.3 < found["lr_diverges"] < 0.8 and found["lr_steepest"] < found["lr_lowest"]
        assert found["noise"] == pytest.approx(noise, rel=0.4)


@pytest.mark.parametrize(("noise", "fall"), [(1.0, 0.0), (0.01, 0.0), (1.0, 0.1)])
def test_no_suggestion_below_the_noise(noise, fall):
    """Kind: a suggestion below the noise is not a suggestion (6 of 8 runs suggested the lowest rate)."""
    for seed in range(12):
        found = TEST.found(curve(seed, noise, fall), False)
        assert math.isnan(found["lr_steepest"]) and math.isnan(found["lr_lowest"]), seed
        assert "no clear fall" in found["note"]


@pytest.mark.parametrize(("scale", "shift"), [(1.0, -50.0), (1e-6, 0.0), (1e6, -1e7), (1.0, 0.5 - 1.0)])
def test_nothing_assumes_a_sign_a_unit_or_a_high_start(scale, shift):
    """Kind: nothing assumes that a loss is positive, has a scale, or starts high."""
    for seed in range(4):
        plain, other = (
            TEST.found(curve(seed), False),
            TEST.found(curve(seed, scale=scale, shift=shift), False),
        )
        for name in ("lr_steepest", "lr_lowest", "lr_diverges"):
            assert other[name] == pytest.approx(plain[name])
        assert other["fall"] == pytest.approx(scale * plain["fall"], rel=1e-6)


def test_a_start_near_zero_does_not_end_the_test_early():
    losses = np.concatenate([0.001 + 0.0005 * np.random.default_rng(0).standard_normal(60) ** 2])
    assert rose(losses, 0.9) is None
    assert rose(-np.linspace(0, 5, 60), 0.9) is None
    assert noise_of(np.linspace(3, 1, 50)) < 1e-12


def test_a_log_likelihood_runs_all_its_steps(tiny_negative):
    result = LearningRateRange(steps=60, learning_rate_high=0.05, start="weights").run(
        tiny_negative, cache=False
    )
    assert result.facts["steps"] == 60 and result.table.loss.iloc[-1] < 0
    assert result.figure().layout.title.text


def test_a_target_may_be_below_zero(tiny_negative):
    """A further example of the kind: the loss that `critical-batch` trains to had to be positive."""
    on = tiny_negative.with_split("validation", tiny_negative.split("test"))
    CriticalBatch(target=-9.5, noise_groups=4).check(on)
    with pytest.raises(BadInput, match="target: -8.5 nats are reached before training"):
        CriticalBatch(target=-8.5, noise_groups=4).check(on)
    with pytest.raises(BadInput, match="target: nan"):
        CriticalBatch(target=math.nan)


@pytest.fixture
def tiny_negative():
    """A classifier whose loss is its cross-entropy less ten."""
    import torch

    import workbench

    torch.manual_seed(0)
    features = torch.randn(256, 8)
    labels = (features @ torch.randn(8, 3)).argmax(1)

    def loss(output, batch):
        return nn.functional.cross_entropy(output, batch["labels"]) - 10.0

    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    cut = {"train": slice(0, 192), "test": slice(192, 256)}
    data = {name: {"inputs": features[part], "labels": labels[part]} for name, part in cut.items()}
    made = workbench.subject(module, data=data, loss=loss)
    assert isinstance(made, Subject)
    return made
