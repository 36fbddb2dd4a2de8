"""Batch-size theory: the spiked random matrix formula against simulated noise,
and the instrument against brute force.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import workbench
from workbench.curvature import BatchSizeTheory
from workbench.curvature.estimators.batch_theory import bulk_edge, effective_batch, shifted_eigenvalue
from workbench.errors import BadInput
from workbench.subjects import Subject


@pytest.mark.parametrize("spike", [0.3, 2.0, 5.0])
def test_the_formula_places_the_top_of_a_spiked_noise_matrix(spike: float) -> None:
    """One eigenvalue beside symmetric noise of entry variance s^2 / b:
    above the threshold it moves by level / spike, below it drowns.
    """
    size, batch = 600, 4
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(size, size, generator=draw, dtype=torch.float64) / size**0.5
    noise = (noise + noise.T) / 2**0.5
    spiked = noise.clone()
    spiked[0, 0] += spike
    found = float(torch.linalg.eigvalsh(spiked)[-1])
    total = float(size * batch)  # V = b E |noise|_F^2 = b P^2 (1 / P)
    assert shifted_eigenvalue(spike, total, size, batch) == pytest.approx(found, rel=0.03)
    assert bulk_edge(total, size, batch) == pytest.approx(float(torch.linalg.eigvalsh(noise)[-1]), rel=0.03)
    expected = spike + 1 / spike if spike > 1 else 2.0
    assert shifted_eigenvalue(spike, total, size, batch) == pytest.approx(expected, rel=1e-12)


def test_a_batch_of_all_examples_has_no_noise() -> None:
    assert (
        effective_batch(50, 100) == 100 and effective_batch(8) == 8 and math.isinf(effective_batch(100, 100))
    )
    assert bulk_edge(3.0, 10, 100, 100) == 0 and shifted_eigenvalue(0.7, 3.0, 10, 100, 100) == 0.7


def linear(examples: int = 96) -> Subject:
    """Least squares: every batch's Hessian is I kron X'X / n, whatever the weights."""
    torch.manual_seed(3)
    model = nn.Linear(6, 2, bias=False)
    split = {
        "inputs": torch.randn(examples, 6) * torch.linspace(0.5, 2, 6),
        "labels": torch.randn(examples, 2),
    }
    return workbench.subject(
        model, data=dict.fromkeys(("train", "calibration", "validation", "test"), split), loss="squared_error"
    )


def test_measured_tops_and_noise_equal_brute_force() -> None:
    subject = linear()
    x = subject.split("train")["inputs"].double()
    full = x.T @ x / len(x)
    top = float(torch.linalg.eigvalsh(full)[-1])
    noise = 2 * sum(float((torch.outer(row, row) - full).square().sum()) for row in x) / (len(x) - 1)

    # one micro-batch an example: the noise is exact up to its probes
    result = BatchSizeTheory(
        examples=96, smallest=12, sizes=3, repeats=3, noise_probes=64, batch_size=1, tolerance=1e-5
    ).run(subject, cache=False)
    table, facts = result.table.set_index("batch"), result.facts
    assert not result.partial and list(table.index) == [12, 34, 96]
    assert facts["full_top"] == pytest.approx(top, rel=1e-4) and facts["parameters"] == 12
    assert facts["example_noise"] == pytest.approx(noise, rel=0.15)
    last = table.loc[96]
    assert (
        last["measured"] == pytest.approx(top, rel=1e-4)
        and last["predicted"] == pytest.approx(top, rel=1e-4)
        and last["noise_edge"] == 0
    )
    assert last["two_over_measured"] == pytest.approx(2 / top, rel=1e-4)
    assert table.loc[12, "predicted"] == pytest.approx(
        shifted_eigenvalue(facts["full_top"], facts["example_noise"], 12, 12, 96), rel=1e-12
    )

    assert result.tables is not None
    runs, draw = result.tables["runs"], torch.Generator().manual_seed(0)
    rows = x[torch.randperm(96, generator=draw)]
    assert list(runs["batch"]) == [12] * 3 + [34] * 3 + [96]
    for batch, found in zip(runs["batch"], runs["top_eigenvalue"], strict=True):
        chosen = rows[torch.randperm(96, generator=draw)[:batch]]
        assert found == pytest.approx(float(torch.linalg.eigvalsh(chosen.T @ chosen / batch)[-1]), rel=1e-4)
    assert len(result.figure(batch=20).data) > len(result.figure().data)


class Quadratic(nn.Module):
    """1/2 w.X w for a matrix X an example: its Hessian is X."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(size))

    def forward(self, matrices: torch.Tensor) -> torch.Tensor:
        return 0.5 * (matrices @ self.w) @ self.w


def test_where_the_theorys_assumption_holds_the_instrument_measures_what_it_predicts() -> None:
    """One eigenvalue beside independent symmetric noise in every example's own Hessian,
    batches from drowned to clear of the noise.
    """
    size, examples, spike, level = (
        120,
        160,
        2.0,
        0.2667,
    )  # the noise's edge passes the eigenvalue at 8 examples
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(examples, size, size, generator=draw) * level**0.5
    matrices = (noise + noise.mT) / 2**0.5
    matrices[:, 0, 0] += spike
    split = {"inputs": matrices, "labels": torch.zeros(examples)}
    subject = workbench.subject(
        Quadratic(size),
        data=dict.fromkeys(("train", "calibration", "validation", "test"), split),
        loss=lambda y, batch: y.mean(),
    )
    result = BatchSizeTheory(
        examples=examples, smallest=3, sizes=6, repeats=6, batch_size=4, noise_probes=8
    ).run(subject, cache=False)
    assert result.facts["example_noise"] == pytest.approx(size**2 * level, rel=0.05)
    assert result.table["measured"].to_numpy() == pytest.approx(
        result.table["predicted"].to_numpy(), rel=0.05
    )
    drowned = result.table["batch"] <= 6
    assert drowned.any() and (result.table["predicted"] == result.table["noise_edge"])[drowned].all()
    assert result.facts["r2_predicted"] > 0.98


def test_the_largest_stable_rate_of_gradient_descent_on_a_quadratic_is_two_over_lambda() -> None:
    subject = linear()
    x = subject.split("train")["inputs"].double()
    top = float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1])
    result = BatchSizeTheory(
        examples=96, smallest=48, sizes=2, repeats=1, batch_size=24, learning_rates=True, training_steps=100
    ).run(subject, cache=False)
    last = result.table.set_index("batch").loc[96].to_dict()
    assert last["sgd_limit"] == pytest.approx(2 / top, rel=0.06) and math.isfinite(last["adam_limit"])


def test_bad_sizes_are_named_first() -> None:
    with pytest.raises(BadInput, match="smallest"):
        BatchSizeTheory(examples=96, smallest=96).run(linear(), cache=False)
    with pytest.raises(BadInput, match="batch_size"):
        BatchSizeTheory(examples=96, smallest=8, batch_size=96).run(linear(), cache=False)
