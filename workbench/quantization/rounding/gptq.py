"""GPTQ: column-wise optimal-brain-surgeon rounding (Frantar, Ashkboos, Hoefler and Alistarh, 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.axis import Options, parameter
from workbench.kernels.quantized.round_columns import at_once, round_columns
from workbench.quantization.number.elements import Element
from workbench.quantization.number.formats import Format
from workbench.quantization.number.grid import Grid, fit, group_of
from workbench.quantization.rounding.problem import Problem
from workbench.quantization.rounding.rounding import ROUNDING


def gptq(
    weight: Tensor, feedback: Tensor, grid: Grid, mask: Tensor | None = None, order: Tensor | None = None
) -> Tensor:
    """Round a matrix (out, in) to `grid`, each column's error compensated by the columns not yet rounded.

    feedback : (in, in) from `linear_feedback` (of the permuted second moment when `order` is given),
        shared by every layer with these inputs
    mask : weights that must stay zero; what a compensation puts there counts as error and is passed on
    Returns values on the grid, float32.
    """
    errors = in_columns(weight, order)
    values = errors.clone()
    scale, zero = grid.columns(weight.shape[1])
    solve(
        values,
        errors,
        without_diagonal(feedback.to(values.dtype)),
        in_order(scale, values, order),
        None if zero is None else in_order(zero, values, order),
        None if mask is None else in_columns(mask, order),
        grid.format.element,
    )
    if order is not None:
        values = values[torch.argsort(order)]
    return values.T.contiguous()


def in_columns(weight: Tensor, order: Tensor | None) -> Tensor:
    """(out, in) -> (in, out), a new tensor, float32: a column of the weight is a contiguous row,
    and the updates are products with rows.
    """
    columns = weight.to(torch.float32).T
    if order is not None:
        return columns[order]
    return columns.clone(memory_format=torch.contiguous_format)


def in_order(scale: Tensor, columns: Tensor, order: Tensor | None) -> Tensor:
    """Scales or zero points (out or 1, in or 1) as (in, out)."""
    return (scale.T if order is None else scale.T[order]).contiguous().expand_as(columns)


def without_diagonal(feedback: Tensor) -> Tensor:
    """A copy with zeros on the diagonal: no column answers its own error."""
    return feedback.clone().fill_diagonal_(0)


def solve(
    values: Tensor,
    errors: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    keep: Tensor | None,
    element: Element,
) -> None:
    """`round_columns` of any number of columns, in place, and of any element. The paper updates lazily in
    blocks; here the blocks are halved recursively, so nearly all of the work is matrix products.
    """
    width = len(values)
    if width <= at_once(values, zero, element.numbers):
        round_columns(values, errors, feedback, scale, zero, keep, element.numbers, element.round_into)
        return
    half = width // 2
    first, last = slice(half), slice(half, width)
    for part in (first, last):
        if part is last:
            values[last].addmm_(feedback[first, last].T, errors[first])
        solve(
            values[part],
            errors[part],
            feedback[part, part],
            scale[part],
            None if zero is None else zero[part],
            None if keep is None else keep[part],
            element,
        )


def gptq_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """||(W - Q) X||_F^2 from the second moment X X^T of the inputs."""
    gap = (weight - rounded).double()
    return float(((gap @ gram.double()) * gap).sum())


def gptq_with_moving_scales(
    weight: Tensor, feedback: Tensor, format: Format, group: int, rule: str, mask: Tensor | None = None
) -> tuple[Tensor, Grid]:
    """GPTQ whose group scales are found when the group is reached, from the weights as compensated so far
    (the paper's grouped variant); returns the values and the grid they are on.
    `group` must divide the columns.
    """
    errors, feedback = in_columns(weight, None), feedback.float()
    keep = None if mask is None else in_columns(mask, None)
    values, moved = torch.empty_like(errors), torch.empty_like(errors[:group])
    rows = torch.empty(len(weight), group, device=weight.device)
    scales, zeros, eye = [], [], torch.eye(group, device=weight.device)
    for start in range(0, len(errors), group):
        part = slice(start, start + group)
        dense, work, square = errors[part], values[part], feedback[part, part]
        if start:
            answers = torch.mm(feedback[:start, part].T, errors[:start], out=work)
            # What the weights have become, all that follow being free,
            # is their answers through the inverse of the group's own feedback.
            inverse = torch.linalg.solve_triangular(square.T, eye, upper=False, unitriangular=True)
            torch.mm(inverse, answers, out=moved).add_(dense)
            work.add_(dense)
            rows.copy_(moved.T)
        else:
            work.copy_(dense)
            rows.copy_(dense.T)
        found = fit(rows, format, "channel", group, rule)
        scales.append(found.scale)
        zeros.append(found.zero)
        solve(
            work,
            dense,
            without_diagonal(square),
            in_order(found.scale, dense, None),
            None if found.zero is None else in_order(found.zero, dense, None),
            None if keep is None else keep[part],
            format.element,
        )
    zero = None if zeros[0] is None else torch.cat([z for z in zeros if z is not None], -1)
    return values.T.contiguous(), Grid(format, torch.cat(scales, -1), zero, group)


class GPTQ(Options):
    damp: float = parameter(
        0.01, "damping of the inputs' second moment, as a share of its mean diagonal", gt=0, le=1, scale="log"
    )
    act_order: bool = parameter(False, "round the columns with the largest inputs first")


@ROUNDING.add(
    "gptq",
    formula="w_j <- w_j - (w_q - Q(w_q)) / [H^-1]_qq [H^-1]_qj, column by column",
    source="Frantar, Ashkboos, Hoefler and Alistarh 2023, algorithm 1",
    needs="inputs",
    options=GPTQ,
    traits="rows apart",
)
def column_wise(problem: Problem, options: GPTQ) -> tuple[Tensor, Grid]:
    """Scales of groups are found on the way where the format leaves them free and columns stay in order."""
    feedback, order = problem.factors.of(problem.gram, options.damp, options.act_order)
    width = problem.weight.shape[1]
    group = group_of(problem.format, problem.granularity, problem.group_size, width)
    if (
        group < width
        and width % group == 0
        and not problem.format.block
        and order is None
        and problem.granularity != "tensor"
    ):
        return gptq_with_moving_scales(
            problem.weight, feedback, problem.format, group, problem.rule, problem.mask
        )
    grid = problem.grid()
    return gptq(problem.weight, feedback, grid, problem.mask, order), grid
