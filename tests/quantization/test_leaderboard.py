"""The leaderboard: every method at every width on the same calibration draws, with intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t

import workbench
from workbench.errors import BadInput
from workbench.evidence.quantization.leaderboard import (
    METHODS,
    accepted,
    curves,
    heat_map,
    leaderboard,
    redrawn,
    summary,
)
from workbench.progress import Progress
from workbench.quantization.rounding.rounding import ROUNDING
from workbench.quantization.transform.transform import TRANSFORM

SMALL = {
    "layers": "*layers.0.*",
    "group_size": 16,
    "calibration_examples": 16,
    "test_examples": 32,
    "steps": 2,
}


def test_every_method_on_two_draws() -> None:
    on = workbench.subject("digits-vit")
    board = leaderboard(on, list(METHODS), [3], (0, 1), block_steps=1, **SMALL)
    assert len(board) == len(METHODS) * 2 and np.isfinite(board[["loss", "kl"]]).all(None)
    assert list(summary(board)["mean"]) == list(summary(board, "kl")["mean"])
    assert list(summary(board.drop(columns="kl"))["mean"]) == list(summary(board, "loss")["mean"])
    table = summary(board)
    assert list(table["bits"]) == sorted(table["bits"]) and set(table["method"]) == set(METHODS)
    assert all(part["mean"].is_monotonic_increasing for _, part in table.groupby("bits"))
    pair = board[(board["method"] == "gptq") & (board["bits"] == 3)]["kl"].to_numpy()
    half = table[(table["method"] == "gptq") & (table["bits"] == 3)]["half_width"].iloc[0]
    assert half == pytest.approx(t.ppf(0.975, 1) * abs(pair[0] - pair[1]) / 2)
    best = set(table["method"][:8])
    assert {trace.name for trace in curves(board).data if trace.showlegend} == best | {"nearest"} and curves(
        board[board["seed"] == 0], "accuracy"
    ).data
    again = ["nearest", "gptq", "stochastic"]  # the others as if they had one draw
    board = board[(board["seed"] == 0) | board["method"].isin(again)]
    table, heat = summary(board), heat_map(board).data[0]
    shown = {method: text for method, (text,) in zip(heat.y, heat.text, strict=True)}
    assert list(shown)[::-1] == list(table["method"]) and {
        method for method, text in shown.items() if "±" in text
    } == set(again)
    assert shown["gptq"].startswith(f"{table.set_index('method')['mean']['gptq']:.3f} ± ")
    without = board.drop(columns="kl")
    rise = summary(without).set_index("method")["mean"]["gptq"] - board["dense_loss"].mean()
    losses = heat_map(without).data[0]
    (gptq,) = losses.text[list(losses.y).index("gptq")]
    assert gptq.startswith(f"{rise:+.3f} ± ")


def test_every_choice_of_the_instrument_is_on_it() -> None:
    on = workbench.subject("digits-vit")
    for axis in (ROUNDING, TRANSFORM):
        assert set(axis) - {"none"} <= set(METHODS)
    names, refused = accepted(on, [2, 8], **SMALL)
    assert set(names) == set(METHODS) and not refused
    names, refused = accepted(on, [4], format="e2m1", **SMALL)
    assert "gptq" in names and refused["adaround"].startswith("rounding: adaround chooses floor or ceiling")


def test_draws_differ_by_seed_and_not_by_call() -> None:
    on = workbench.subject("digits-vit")
    first, again, other = (redrawn(on, seed, 8) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint and first.size("calibration") == 8


@pytest.mark.parametrize(
    ("methods", "bits", "text"),
    [(["gtpq"], [3], "gtpq"), ([], [3], "at least one"), (["gptq"], [], "at least one")],
)
def test_bad_requests_are_refused(methods: list[str], bits: list[int], text: str) -> None:
    with pytest.raises(BadInput, match=text):
        leaderboard(workbench.subject("digits-vit"), methods, bits)


def test_a_stopped_one_keeps_what_is_finished() -> None:
    class Once(Progress):
        def show(self, label: str, done: int, total: int | None) -> None:
            if done == 2:
                self.stop.set()

    board = leaderboard(workbench.subject("digits-vit"), ["nearest", "gptq"], [3, 4], (0,), Once(), **SMALL)
    assert board[["method", "bits"]].to_numpy().tolist() == [["nearest", 3], ["nearest", 4]]
