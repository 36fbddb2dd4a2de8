"""The leaderboard: every method at every width on the same calibration draws, with intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t

import workbench
from workbench.instruments import BadInput
from workbench.quantization.leaderboard import METHODS, curves, leaderboard, redrawn, summary

SMALL = {"layers": "*layers.0.*", "group_size": 16, "examples": 16, "test_examples": 32, "steps": 5}


def test_every_method_on_two_draws() -> None:
    on = workbench.subject("digits-vit")
    board = leaderboard(on, list(METHODS), [3], (0, 1), **SMALL)
    assert len(board) == len(METHODS) * 2 and np.isfinite(board["loss"]).all()
    table = summary(board)
    assert list(table["bits"]) == sorted(table["bits"]) and set(table["method"]) == set(METHODS)
    assert all(part["mean"].is_monotonic_increasing for _, part in table.groupby("bits"))
    pair = board[(board["method"] == "gptq") & (board["bits"] == 3)]["loss"].to_numpy()
    half = table[(table["method"] == "gptq") & (table["bits"] == 3)]["half_width"].iloc[0]
    assert half == pytest.approx(t.ppf(0.975, 1) * abs(pair[0] - pair[1]) / 2)
    names = {trace.name for trace in curves(board).data}
    assert set(METHODS) <= names and curves(board[board["seed"] == 0], "accuracy").data


def test_draws_differ_by_seed_and_not_by_call() -> None:
    on = workbench.subject("digits-vit")
    first, again, other = (redrawn(on, seed, 8) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint and first.size("calibration") == 8


@pytest.mark.parametrize(("methods", "bits", "text"), [(["gtpq"], [3], "gtpq"), ([], [3], "at least one"), (["gptq"], [], "at least one")])
def test_bad_requests_are_refused(methods: list[str], bits: list[int], text: str) -> None:
    with pytest.raises(BadInput, match=text):
        leaderboard(workbench.subject("digits-vit"), methods, bits)
