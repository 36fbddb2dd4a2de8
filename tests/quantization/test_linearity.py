"""The linear model of damage, where it is exact: independent layers that add up, and a squared error."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workbench.measures.suffix import Suffix
from workbench.progress import Progress
from workbench.quantization import Allocate, AllocationScores
from workbench.quantization.allocation.linearity import Noise, sizes, slope
from workbench.subjects import Subject
from workbench.subjects.tasks import ModuleRegression

WIDTHS, EXAMPLES = (16, 24, 20, 24), 48


@pytest.fixture(scope="module")
def on() -> Subject:
    """y = W3 W2 W1 x, of stock modules: what is a user's own code takes long to read."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(WIDTHS)]
    split = {"inputs": torch.randn(EXAMPLES, WIDTHS[0]), "labels": torch.zeros(EXAMPLES, WIDTHS[-1])}
    splits = dict.fromkeys(("train", "calibration", "test"), split)
    return Subject("product", nn.Sequential(*layers).eval(), ModuleRegression(), splits)


FIELDS: dict[str, Any] = {
    "layers": "*",
    "widths": [2, 3, 4],
    "group_size": 16,
    "sensitivity": "linearity",
    "sensitivity.levels": 4,
    "sensitivity.draws": 6,
    "calibration_examples": EXAMPLES,
    "predict_examples": EXAMPLES,
    "rounding": "nearest",
}


def test_the_slope_is_the_known_one(on: Subject) -> None:
    """Noise N of norm t |W2| changes the outputs by |W3 N W1 x|^2, in expectation t^2 |W2|^2 |W3|^2 times the
    mean of |W1 x|^2 over W2's size, and so for each layer: alpha is that as a share of the outputs' variance,
    at any t.
    """
    table = AllocationScores(**FIELDS, swaps=0).run(on, Progress(), cache=False).table
    with torch.no_grad():
        inputs = on.split("calibration")["inputs"].double()
        matrices = [layer.weight.double() for layer in on.model]
        variance = float(on.model(inputs.float()).double().var(0, correction=0).mean())
        for place, matrix in enumerate(matrices):
            seen = functools.reduce(lambda rows, w: rows @ w.T, matrices[:place], inputs)
            behind = functools.reduce(
                lambda left, w: w @ left, matrices[place + 1 :], torch.eye(len(matrix)).double()
            )
            moved = float(matrix.square().sum() * behind.square().sum() * seen.square().sum(1).mean())
            known = moved / matrix.numel() / WIDTHS[-1] / variance
            mine = table[table["layer"] == str(place)].iloc[0]
            assert abs(mine["alpha"] - known) < 4 * mine["alpha_error"]
            assert mine["alpha_error"] < 0.1 * known
    assert table["cost"].to_numpy() == pytest.approx((table["alpha"] * table["weight_error"]).to_numpy())


def test_the_program_is_the_best_of_all_choices(on: Subject) -> None:
    result = Allocate(**FIELDS, bits=4.5, swaps=0, solver="dynamic-program", draws=1).run(
        on, Progress(), cache=False
    )
    problem = result.problem()  # type: ignore[attr-defined]
    choices = [np.array(c) for c in itertools.product(range(3), repeat=len(problem.layers))]
    best = min(problem.damage(c) for c in choices if problem.bits(c) <= 4.5)
    assert result.facts["predicted_change"] == pytest.approx(best)
    assert result.facts["proven_bound"] == pytest.approx(best)
    assert result.table["strategy"].iloc[0] == "dynamic program"
    assert problem.unit == "distance" and result.facts["distance"] > 0
    # layers whose errors are small and know nothing of each other add up
    assert result.facts["predicted_distance"] == pytest.approx(result.facts["distance"], rel=0.4)


class Sum(nn.Module):
    """y = sum_l W_l x: every block's input is that of the model, and every block's output is read."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 6, bias=False) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([part(inputs) for part in self.parts]).sum(0)


def test_blocks_side_by_side_are_no_chain() -> None:
    """Kind: that a block reads what it read was taken to mean that only its neighbour reads what it puts out.
    Nothing swapped in gives nothing, also behind the first of blocks that are added up.
    """
    split = {"inputs": torch.randn(9, 8), "labels": torch.zeros(9, 6)}
    chain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    for model, order in ((Sum(), []), (chain, None)):
        subject = Subject("parts", model.eval(), ModuleRegression(), {"test": split})
        suffix = Suffix(subject, "test", 9, Progress(), 1.0)
        assert order is None or suffix.order == order
        for block in [name for name, _ in subject.blocks()]:
            suffix.advance(block)
            found = suffix.ask({})
            assert found is not None and not found.any()


def test_least_squares_and_sizes() -> None:
    x = sizes(Noise(levels=4, largest=0.2, draws=2))
    assert x.tolist() == pytest.approx([0.01, 0.01, 0.02, 0.02, 0.03, 0.03, 0.04, 0.04])
    assert slope(x, 3 * x) == pytest.approx((3, 0))
    noisy = 3 * x + np.array([1, -1] * 4) * 1e-3
    design = np.linalg.lstsq(x[:, None], noisy, rcond=None)
    assert slope(x, noisy)[0] == pytest.approx(design[0][0])
    assert slope(x, noisy)[1] == pytest.approx(np.sqrt(design[1][0] / 7 / (x @ x)))
    assert np.isnan(slope([1.0], [2.0])[1])
