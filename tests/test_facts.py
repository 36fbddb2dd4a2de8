"""Facts in words: order, units, intervals; nothing that was a number is lost."""

from __future__ import annotations

import math

import pytest

from workbench.facts import in_bytes, told, with_unit


def test_what_matters_comes_first_and_an_interval_stands_beside_its_number() -> None:
    facts = {
        "weights": 18432,
        "sparsity": 0.75,
        "packed_bytes": 51148,
        "accuracy": 0.9125,
        "kl": 0.0104,
        "kl_low": 0.0027,
        "kl_high": 0.0194,
        "layers": ["a"],
    }
    assert list(told(facts)) == [
        ("accuracy", "91.25 %"),
        ("KL", "0.0104 nats (0.0027 to 0.0194)"),
        ("sparsity", "75 %"),
        ("packed size", "51.1 kB"),
        ("weights", "18,432"),
    ]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("median_ms", 3.0901, "3.09 ms"),
        ("dense_loss", 0.205, "0.205 nats"),
        ("test_accuracy", 1 / 3, "33.33 %"),
        ("share", 7.0, "7"),
        ("diverged", False, "False"),
        ("noise_scale", math.inf, "inf"),
        ("perplexity", math.nan, "not known"),
        ("bytes", 12, "12 bytes"),
        ("budget_flops", 4.8e21, "4.8e+21 FLOPs"),
    ],
)
def test_units_follow_from_the_name(name: str, value: float, text: str) -> None:
    assert with_unit(name, value) == text


def test_bytes_have_three_digits() -> None:
    assert [in_bytes(v) for v in (999, 1000, 5.38e8, 1.2e10)] == ["999 bytes", "1 kB", "538 MB", "12 GB"]
