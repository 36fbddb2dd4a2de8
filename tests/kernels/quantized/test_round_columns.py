"""GPTQ's column loop: the kernel against a plain loop bit for bit, and against PyTorch's in the product."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.errors import BadInput
from workbench.kernels.quantized.numbers import NF4, Numbers
from workbench.kernels.quantized.round_columns import COLUMNS, at_once, round_columns
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import fit
from workbench.quantization.rounding import gptq as product
from workbench.quantization.rounding.feedback import linear_feedback

GRIDS = {
    "int4": Numbers(0, -8.0, 7.0),
    "uint3": Numbers(0, 0.0, 7.0),
    "e2m1": Numbers(1, 0.0, 6.0, 2, 1),
    "nf4": Numbers(2, codebook=NF4),
}


def one_by_one(
    weight: Tensor, feedback: Tensor, scale: Tensor, zero: Tensor | None, keep: Tensor | None, grid: Numbers
) -> tuple[Tensor, Tensor]:
    """Every error is added to the columns after it at once: the order in which the kernel adds."""
    work, values = weight.clone(), torch.empty_like(weight)
    for i in range(len(weight)):
        shift = 0.0 if zero is None else zero[i]
        values[i] = (grid.round(work[i] / scale[i] + shift) - shift) * scale[i]
        if keep is not None:
            values[i] *= keep[i]
        work += feedback[i][:, None] * (weight[i] - values[i])[None, :]
    return values, weight - values


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("columns", "outputs"), [(1, 1), (16, 16), (37, 18)])
def test_the_kernel_is_the_plain_loop(grid: str, columns: int, outputs: int) -> None:
    numbers, pruned = GRIDS[grid], grid in ("uint3", "e2m1")
    weight = torch.randn(columns, outputs)
    feedback = (0.2 * torch.randn(2 * columns, 2 * columns))[::2, ::2].T.triu(1)  # of any strides
    scale = (torch.rand(1, outputs) + 0.2).expand(columns, outputs)
    zero = torch.full((columns, 1), 3.0).expand(columns, outputs) if grid == "uint3" else None
    keep = (torch.rand(columns, outputs) < 0.6).float() if pruned else None
    values, errors = weight.clone(), weight.clone()
    round_columns(values, errors, feedback, scale, zero, keep, numbers, backend="triton")
    wanted = one_by_one(weight, feedback, scale, zero, keep, numbers)
    assert torch.equal(values, wanted[0]) and torch.equal(errors, wanted[1])
    values, errors = weight.clone(), weight.clone()
    round_columns(values, errors, feedback, scale, zero, keep, numbers, backend="torch")
    assert ((values - wanted[0]).abs() < 1e-5).float().mean() > 0.95  # a tie may fall to the other side


def test_parts_of_larger_tensors_are_written_in_place_and_nothing_beside_them() -> None:
    """What a kernel writes ends where the tensor that it was given ends."""
    values, errors = torch.randn(40, 50), torch.randn(40, 50)
    before = values.clone(), errors.clone()
    part = slice(8, 31), slice(3, 47)
    feedback, ones = torch.zeros(23, 23), torch.ones(23, 44)
    round_columns(values[part], errors[part], feedback, ones, None, None, GRIDS["int4"], backend="triton")
    for now, then in zip((values, errors), before, strict=True):
        now[part] = then[part] = 0
        assert torch.equal(now, then)


@pytest.mark.parametrize(
    ("name", "moving", "widths"),
    [("uint4", True, {40}), ("e2m1", False, {40}), ("int4", False, {40}), ("fixed8.4", True, {10})],
)
def test_the_product_on_a_gpu_is_the_product(
    name: str, moving: bool, widths: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales found on the way and a mask, or one scale a row and an order; 64 does not divide the columns."""
    inputs = torch.randn(300, 80) @ torch.randn(80, 80)
    weight, gram, order = torch.randn(12, 80), inputs.T @ inputs, torch.randperm(80)
    mask = torch.rand(weight.shape) < 0.7
    if moving:
        weight = weight * mask
    format = named(name)

    def found() -> Tensor:
        if moving:
            feedback = linear_feedback(gram, 0.01)
            return product.gptq_with_moving_scales(weight, feedback, format, 40, "auto", mask)[0]
        feedback = linear_feedback(gram[order][:, order], 0.01)
        return product.gptq(weight, feedback, fit(weight, format, "channel"), order=order)

    plain, seen = found(), set[int]()

    def recorded(values: Tensor, *rest: Any) -> None:
        seen.add(len(values))
        round_columns(values, *rest, backend="triton" if len(values) > 16 else "torch")

    monkeypatch.setattr(product, "at_once", functools.partial(at_once, backend="triton"))
    monkeypatch.setattr(product, "round_columns", recorded)
    kernel = found()
    errors = [product.gptq_error(weight, values, gram) for values in (kernel, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    assert ((kernel - plain).abs() < 1e-4).float().mean() > 0.9
    assert seen == widths


def test_numbers_that_the_kernel_does_not_know_go_to_torch() -> None:
    values = torch.randn(3, 4)
    assert at_once(values, None, None, "triton") == at_once(values, values, GRIDS["nf4"], "triton") == 16
    assert at_once(values, values, GRIDS["int4"], "triton") == COLUMNS
    with pytest.raises(BadInput, match="backend"):
        at_once(values, None, GRIDS["int4"], "cuda")
