"""GPTQ against the textbook column loop, and its invariants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import Grid, fit
from workbench.quantization.rounding.feedback import linear_feedback
from workbench.quantization.rounding.gptq import gptq, gptq_error, gptq_with_moving_scales
from workbench.statistics.damping import damped


def textbook(weight: Tensor, gram: Tensor, grid: Grid, damp: float, mask: Tensor | None = None) -> Tensor:
    """Optimal brain surgeon, one column at a time with the inverse Hessian downdated explicitly
    (Frantar et al. 2023, section 3).
    """
    work, inverse = weight.double().clone(), torch.linalg.inv(damped(gram, damp).double())
    scale, zero = (None if t is None else t.double() for t in grid.columns(weight.shape[1]))
    assert scale is not None
    out = torch.zeros_like(work)
    for i in range(weight.shape[1]):
        shift = 0.0 if zero is None else zero[:, i]
        out[:, i] = (grid.format.element.round(work[:, i] / scale[:, i] + shift) - shift) * scale[:, i]
        if mask is not None:
            out[:, i] *= mask[:, i]
        error = (work[:, i] - out[:, i]) / inverse[i, i]
        work -= error[:, None] * inverse[i]
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return out.float()


@pytest.fixture()
def layer() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(400, 96) @ torch.randn(96, 96)
    return torch.randn(40, 96), inputs.T @ inputs


def test_the_feedback_factorises_the_second_moment(layer: tuple[Tensor, Tensor]) -> None:
    """H = F D F^T, F unit upper triangular; the inverse of F with its rows scaled is the Cholesky factor
    of the inverse that GPTQ's paper uses.
    """
    gram = layer[1].double()
    feedback, hessian = linear_feedback(gram, 0.01), damped(gram, 0.01)
    assert (feedback.diagonal() == 1).all() and (feedback.tril(-1) == 0).all()
    inverse = torch.linalg.inv(feedback)
    middle = inverse @ hessian @ inverse.T
    assert torch.allclose(middle, torch.diag(middle.diagonal()), atol=1e-9 * float(middle.diagonal().max()))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    assert torch.allclose(inverse, upper / upper.diagonal()[:, None], atol=1e-8)


@pytest.mark.parametrize("name", ["int3", "uint4", "e2m1", "nf4", "mxfp4"])
def test_equals_the_textbook_loop(layer: tuple[Tensor, Tensor], name: str) -> None:
    weight, gram = layer
    grid = fit(weight, named(name), "auto", 96)
    mine = gptq(weight, linear_feedback(gram, 0.01), grid)
    expected = textbook(weight, gram, grid, 0.01)
    agree = (mine - expected).abs() < 1e-4
    assert (
        agree.float().mean() > 0.97
    )  # a tie broken differently in single precision changes what follows in that row
    assert gptq_error(weight, mine, gram) == pytest.approx(gptq_error(weight, expected, gram), rel=0.02)
    assert gptq_error(weight, mine, gram) < 0.6 * gptq_error(weight, grid.round(weight), gram)


def test_masked_weights_stay_zero_and_the_rest_compensates(layer: tuple[Tensor, Tensor]) -> None:
    weight, gram = layer
    mask = torch.rand(weight.shape) < 0.5
    weight = weight * mask
    grid = fit(weight, named("int3"), "channel")
    mine = gptq(weight, linear_feedback(gram, 0.01), grid, mask)
    assert (mine[~mask] == 0).all()
    assert gptq_error(weight, mine, gram) == pytest.approx(
        gptq_error(weight, textbook(weight, gram, grid, 0.01, mask), gram), rel=0.03
    )
    assert gptq_error(weight, mine, gram) < gptq_error(weight, grid.round(weight), gram)


def test_order_changes_the_path_not_the_grid(layer: tuple[Tensor, Tensor]) -> None:
    weight, gram = layer
    grid = fit(weight, named("int4"), "group", 32)
    order = torch.argsort(gram.diagonal(), descending=True)
    mine = gptq(weight, linear_feedback(gram[order][:, order], 0.01), grid, order=order)
    assert torch.allclose(grid.round(mine), mine, atol=1e-6)
    assert gptq_error(weight, mine, gram) < gptq_error(weight, grid.round(weight), gram)


def test_uncorrelated_inputs_leave_nothing_to_compensate() -> None:
    weight = torch.randn(8, 64)
    grid = fit(weight, named("int3"), "channel")
    assert torch.allclose(
        gptq(weight, linear_feedback(torch.eye(64), 0.01), grid), grid.round(weight), atol=1e-6
    )


def test_moving_scales_match_a_plain_implementation(layer: tuple[Tensor, Tensor]) -> None:
    weight, gram = layer
    feedback = linear_feedback(gram, 0.01)
    values, grid = gptq_with_moving_scales(weight, feedback, named("int4"), 32, "minmax")
    upper = torch.linalg.cholesky(
        torch.linalg.inv(damped(gram, 0.01).double()), upper=True
    ).float()  # the paper's factor
    work, plain, scales = weight.clone(), torch.zeros_like(weight), []
    for i in range(96):
        if i % 32 == 0:
            part = fit(work[:, i : i + 32], named("int4"), "channel")
            scales.append(part.scale)
        plain[:, i] = part.round(work[:, i : i + 1])[:, 0]
        work[:, i:] -= ((work[:, i] - plain[:, i]) / upper[i, i])[:, None] * upper[i, i:]
    assert torch.allclose(grid.scale, torch.cat(scales, 1), atol=1e-3)
    assert ((values - plain).abs() < 1e-3).float().mean() > 0.97
    assert torch.allclose(grid.round(values), values, atol=1e-6)


@pytest.mark.parametrize("gram", [torch.zeros(32, 32), torch.ones(32, 32), torch.diag(torch.arange(32.0))])
def test_singular_second_moments(gram: Tensor) -> None:
    weight = torch.randn(4, 32)
    grid = fit(weight, named("int4"))
    values = gptq(weight, linear_feedback(gram, 0.01), grid)
    assert torch.isfinite(values).all() and torch.allclose(grid.round(values), values, atol=1e-6)


@pytest.mark.parametrize("stored", ["as it is", "transposed", "in double precision"])
@pytest.mark.parametrize("ordered", [False, True])
def test_weights_and_feedback_are_left_alone(
    layer: tuple[Tensor, Tensor], stored: str, ordered: bool
) -> None:
    """An operation that works in place works on copies."""
    weight, gram = layer
    plain = weight
    if stored == "transposed":
        weight = weight.T.contiguous().T
    if stored == "in double precision":
        weight = weight.double()
    before, feedback = weight.clone(), linear_feedback(gram, 0.01)
    again, grid = feedback.clone(), fit(plain, named("uint4"), "group", 32)
    order = torch.randperm(96) if ordered else None
    found = gptq(weight, feedback, grid, order=order)
    assert torch.equal(found, gptq(plain, feedback, grid, order=order))
    moving, _ = gptq_with_moving_scales(weight, feedback, named("uint4"), 32, "minmax")
    assert torch.equal(moving, gptq_with_moving_scales(plain, feedback, named("uint4"), 32, "minmax")[0])
    assert torch.equal(weight, before) and torch.equal(feedback, again)


@pytest.mark.parametrize("name", ["int3", "uint4", "int8-odd", "e2m1", "e4m3fn", "nf4", "fixed8.4"])
def test_rounding_that_may_write_gives_the_same(name: str) -> None:
    element = named(name).element
    x = torch.cat([torch.randn(500) * element.highest, torch.arange(-20, 20) / 2, torch.tensor([0.0, -0.0])])
    assert torch.equal(element.round_into(x.clone()), element.round(x))
