"""Estimators on exactly known Hessians: softmax regression on digits, logistic regression,
small dense matrices.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer
from torch import nn

import workbench
from tests.curvature.small import mlp
from workbench.curvature import DenseOperator, curvature_operator, eigenpairs
from workbench.curvature.estimators.lanczos import GroupedProbes, Lockstep, band, gaussian_sum, outliers
from workbench.curvature.estimators.probes import rademacher, standard_error
from workbench.curvature.estimators.traces import METHODS, estimate
from workbench.subjects import Subject

TOP, NEXT, THIRD = 1.0455299687, 0.0698833, 0.0638585
TRACE, SQUARE, ZEROS = 13.5127791110, 9.9864517456, 91


@pytest.fixture(scope="module")
def digits() -> Subject:
    return workbench.subject("digits-softmax")


@pytest.fixture(scope="module")
def digits_matrix(digits: Subject) -> torch.Tensor:
    """The exact Hessian (1/C)(I - 11'/C) kron X'X/n, from the data alone."""
    x = digits.splits["all"]["inputs"].double()
    c = 10
    return torch.kron((torch.eye(c, dtype=torch.float64) - 1 / c) / c, x.T @ x / len(x))


def test_the_operator_is_the_published_hessian(digits: Subject, digits_matrix: torch.Tensor) -> None:
    for kind in ("hessian", "ggn"):
        with curvature_operator(
            digits, kind, split="all", examples=1797, batch_size=600, dtype="float64"
        ) as operator:
            found = operator.matmat(torch.eye(operator.size, dtype=torch.float64))
        assert torch.allclose(found, digits_matrix, atol=1e-12)
    values = torch.linalg.eigvalsh(digits_matrix)
    assert int((values.abs() < 1e-10).sum()) == ZEROS
    assert float(values.sum()) == pytest.approx(TRACE, abs=1e-9)
    assert float(values.square().sum()) == pytest.approx(SQUARE, abs=1e-9)


@pytest.mark.parametrize("block", [1, 4])
def test_repeated_eigenvalues_are_found_with_their_multiplicity(digits: Subject, block: int) -> None:
    with curvature_operator(digits, split="all", examples=1797, batch_size=1797, dtype="float64") as operator:
        found = eigenpairs(operator, 18, block=block, tolerance=1e-9)
    assert found.values[:9].tolist() == pytest.approx([TOP] * 9, abs=1e-9)
    assert found.values[9:].tolist() == pytest.approx([NEXT] * 9, abs=1e-7)
    assert (
        found.complete and found.note == "multiplicities are resolved" and float(found.residuals.max()) < 1e-8
    )
    assert [count for _, count in found.multiplicities()] == [9, 9]
    gram = found.vectors @ found.vectors.T
    assert torch.allclose(gram, torch.eye(18, dtype=torch.float64), atol=1e-8)


def test_a_cut_multiplicity_is_said_to_be_unresolved(digits: Subject) -> None:
    with curvature_operator(digits, split="all", examples=1797, batch_size=1797) as operator:
        assert "not resolved" in eigenpairs(operator, 4, block=2).note
        assert "not checked" in eigenpairs(operator, 4, block=2, verify=False).note


def test_logistic_regression_on_breast_cancer() -> None:
    x = torch.tensor(load_breast_cancer().data, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0, unbiased=False)
    model = nn.Linear(30, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    y = torch.tensor(load_breast_cancer().target, dtype=torch.float64)

    def logistic(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(output[:, 0], batch["labels"])

    subject = workbench.subject(model, data={"calibration": {"inputs": x, "labels": y}}, loss=logistic)
    for kind in ("hessian", "ggn"):
        with curvature_operator(subject, kind, examples=569, batch_size=100, dtype="float64") as operator:
            top = eigenpairs(operator, 3, tolerance=1e-10).values
            bottom = eigenpairs(operator, 1, "bottom", tolerance=1e-10).values
            trace = float(operator.matmat(torch.eye(30, dtype=torch.float64)).trace())
        assert top.tolist() == pytest.approx([3.32040192, 1.42283865, 0.70448724], abs=1e-8)
        assert trace == pytest.approx(7.5, abs=1e-10)
        assert float(top[0] / bottom[0]) == pytest.approx(99828, rel=1e-4)


def known(values: torch.Tensor, seed: int = 0) -> DenseOperator:
    torch.manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
    return DenseOperator(q @ torch.diag(values.double()) @ q.T)


def test_both_ends_of_an_indefinite_matrix_after_restarts() -> None:
    values = torch.cat(
        [torch.linspace(-1, 1, 290), torch.tensor([9.0, 7.5, 7.4, 5.0, 3.0, -2.0, -4.0, -4.1, -6.0, -8.0])]
    )
    operator = known(values)
    top = eigenpairs(operator, 4, tolerance=1e-9, block=1, basis=14)
    bottom = eigenpairs(operator, 4, "bottom", tolerance=1e-9, block=2, basis=14)
    assert top.values.tolist() == pytest.approx([9.0, 7.5, 7.4, 5.0], abs=1e-7) and top.complete
    assert bottom.values.tolist() == pytest.approx([-8.0, -6.0, -4.1, -4.0], abs=1e-7) and bottom.complete
    image = operator.matmat(top.vectors)
    assert torch.allclose(image, top.values[:, None] * top.vectors, atol=1e-6)


def test_few_products_say_so() -> None:
    assert (
        "converged within the allowed products"
        in eigenpairs(known(torch.linspace(0, 1, 300)), 5, tolerance=1e-12, max_products=12).note
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_tiny_and_degenerate_matrices(size: int) -> None:
    identity = DenseOperator(torch.eye(size, dtype=torch.float64))
    assert eigenpairs(identity, 9).values.tolist() == pytest.approx([1.0] * size)
    zero = DenseOperator(torch.zeros(size, size, dtype=torch.float64))
    assert eigenpairs(zero, 2).values.abs().max() < 1e-12
    for operator, value in ((identity, size), (zero, 0.0)):
        for method in METHODS:
            found = estimate(operator, method, 12)
            assert abs(found.value - value) <= 6 * found.error + 1e-9
        run = Lockstep(operator, rademacher(operator, range(2), 0), 10)
        assert list(run.run()) == [1]
        assert run.quadrature().moment(1).tolist() == pytest.approx([value / size] * 2, abs=1e-12)


def test_full_length_lanczos_is_the_exact_spectral_measure() -> None:
    """With as many steps as dimensions, weights are the squared components of the probe along
    the eigenvectors.
    """
    operator = known(torch.linspace(-2, 5, 40))
    starts = rademacher(operator, range(3), 1)
    run = Lockstep(operator, starts.clone(), 40)
    list(run.run())
    values, vectors = torch.linalg.eigh(operator.matrix)
    quadrature = run.quadrature()
    for nodes, weights, start in zip(quadrature.nodes, quadrature.weights, starts, strict=True):
        assert nodes == pytest.approx(values.numpy(), abs=1e-9)
        assert weights == pytest.approx(((vectors.T @ start).square() / 40).numpy(), abs=1e-9)


def test_quadrature_without_reorthogonalisation_keeps_the_density() -> None:
    """Copies of converged outliers appear, but their weights add up: smoothed densities agree."""
    values = torch.cat([torch.linspace(-1, 1, 380), torch.tensor([60.0, 41.0, 25.0, 14.0])])
    operator = known(values)
    starts = rademacher(operator, range(4), 0)
    runs = [Lockstep(operator, starts.float().double(), 60, full) for full in (True, False)]
    for run in runs:
        list(run.run())
    full, short = (run.quadrature() for run in runs)
    grid = np.linspace(-5, 65, 2000)
    exact, found = full.densities(grid, 0.6), short.densities(grid, 0.6)
    assert np.abs(exact - found).max() < 1e-3 * exact.max()
    assert short.moment(1) == pytest.approx(full.moment(1), rel=1e-9)
    assert len(outliers(full, operator.size)[0]) >= 4


def test_probes_in_groups_give_what_they_give_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large vectors, and every graph kept: one probe after the other.
    Graphs built for every product: all together.
    """
    subject = mlp(examples=24)
    found = []
    for limit, room in ((2**40, 2**40), (0, 2**40), (0, 0)):
        monkeypatch.setattr("workbench.curvature.estimators.lanczos.GROUP_MEMORY", limit)
        monkeypatch.setattr("workbench.curvature.operators.curvature_operator.GRAPH_MEMORY", room)
        with curvature_operator(subject, batch_size=5, dtype="float64") as operator:
            run = GroupedProbes(
                operator,
                lambda numbers, operator=operator: rademacher(operator, numbers, 0),
                3,
                6,
                parts=operator.slices,
            )  # type: ignore[misc]
            assert [len(group) for group in run.groups] == ([1, 1, 1] if (limit, room) == (0, 2**40) else [3])
            assert len(list(run.run())) == run.steps and run.done == 6
            assert len(operator._kept) == (5 if room else 0)
        found.append(
            (np.concatenate([*run.quadrature().nodes, *run.quadrature().weights]), run.forms, run.noise)
        )
    for nodes, forms, noise in found[1:]:
        assert (
            np.allclose(nodes, found[0][0])
            and np.allclose(forms, found[0][1])
            and noise == pytest.approx(found[0][2])
        )


def test_resolved_outliers_carry_their_copies(digits: Subject) -> None:
    with curvature_operator(digits, split="all", examples=1797, batch_size=1797) as operator:
        run = Lockstep(operator, rademacher(operator, range(16), 0), 30)
        list(run.run())
    found, (low, high) = outliers(run.quadrature(), 640)
    assert [o.value for o in found[:3]] == pytest.approx([TOP, NEXT, THIRD], rel=1e-4)
    assert found[0].copies == pytest.approx(9, abs=4)
    assert low <= 1e-6 and high < NEXT


def test_density_moments_match_trace_and_norm_within_their_errors(digits_matrix: torch.Tensor) -> None:
    operator = DenseOperator(digits_matrix)
    hits = 0
    for seed in range(20):
        run = Lockstep(operator, rademacher(operator, range(32), seed), 12)
        list(run.run())
        quadrature = run.quadrature()
        for power, exact in ((1, TRACE), (2, SQUARE)):
            values = 640 * quadrature.moment(power)
            hits += abs(values.mean() - exact) < 2 * standard_error(values)
    assert hits >= 36  # of 40; two standard errors cover 95 %
    grid = quadrature.grid(0.01)
    density, _, _ = band(quadrature.densities(grid, 0.01))
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-3)
    assert np.trapezoid(density * grid, grid) == pytest.approx(quadrature.moment(1).mean(), rel=1e-3)
    assert np.trapezoid(density * grid**2, grid) == pytest.approx(
        quadrature.moment(2).mean() + 0.01**2, rel=1e-3
    )


def test_the_band_covers_the_exact_density_at_its_nominal_rate(digits_matrix: torch.Tensor) -> None:
    """95 % pointwise: over 60 seeds and points across the whole density, with the quadrature exact
    (70 steps, 62 distinct values).
    """
    values = torch.linalg.eigvalsh(digits_matrix).numpy()
    width = 0.01
    grid = np.concatenate([np.linspace(-0.02, 0.09, 30), np.linspace(1.02, 1.07, 10)])
    exact = gaussian_sum(grid, values, np.full(640, 1 / 640), width)
    operator = DenseOperator(digits_matrix)
    inside: list[NDArray[np.bool_]] = []
    for seed in range(60):
        run = Lockstep(operator, rademacher(operator, range(16), 1000 + seed), 70)
        list(run.run())
        _, low, high = band(run.quadrature().densities(grid, width))
        inside.append((low <= exact) & (exact <= high))
    assert 0.92 <= float(np.mean(inside)) <= 0.98


@pytest.mark.parametrize("method", METHODS)
def test_traces_are_within_two_standard_errors_as_often_as_they_say(
    digits_matrix: torch.Tensor, method: str
) -> None:
    operator = DenseOperator(digits_matrix)
    hits = [
        abs((found := estimate(operator, method, 48, seed)).value - TRACE) <= 2 * found.error
        for seed in range(100)
    ]
    assert sum(hits) >= 95


def test_sketching_beats_plain_probes_where_few_eigenvalues_carry_the_trace() -> None:
    values = 1 / torch.arange(1, 301, dtype=torch.float64) ** 2
    operator = known(values)
    errors = {
        m: math.sqrt(
            np.mean([(estimate(operator, m, 48, s).value - float(values.sum())) ** 2 for s in range(20)])
        )
        for m in METHODS
    }
    assert errors["hutch++"] < errors["hutchinson"] / 5 and errors["xtrace"] < errors["hutch++"]


def test_xtrace_equals_its_definition() -> None:
    """Leave-one-out bases formed one by one."""
    from workbench.curvature.estimators.probes import gaussian

    operator = known(torch.linspace(-1, 3, 30))
    h = operator.matrix
    probes = gaussian(operator, range(5), 3)
    values = []
    for i in range(5):
        rest = torch.cat([probes[:i], probes[i + 1 :]])
        q = torch.linalg.qr((rest @ h).T)[0]
        left = probes[i] - q @ (q.T @ probes[i])
        values.append(float((q.T @ h @ q).trace() + left @ h @ left))
    assert estimate(operator, "xtrace", 10, 3).samples == pytest.approx(np.array(values), rel=1e-9)


def test_stopping_when_the_interval_is_narrow() -> None:
    operator = known(torch.linspace(1, 2, 200))
    for method in METHODS:
        found = estimate(operator, method, 400, 0, wanted=0.05)
        assert 2 * found.error <= 0.05 * found.value and found.products < 200
        assert found.value == pytest.approx(300, rel=0.05)


def test_standard_error_is_students_for_symmetric_samples() -> None:
    values = np.array([-1.0, 1.0])
    assert standard_error(values) == pytest.approx(math.sqrt(2) / math.sqrt(2) * 13.968 / 2, rel=1e-3)
    assert math.isnan(standard_error([1.0]))
