"""GPTQ: column-wise optimal-brain-surgeon rounding (Frantar, Ashkboos, Hoefler and Alistarh, 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.axis import Options, parameter
from workbench.quantization.number.formats import Format
from workbench.quantization.number.grid import Grid, fit, group_of
from workbench.quantization.rounding.problem import Problem
from workbench.quantization.rounding.rounding import ROUNDING

LEAF = 16  # columns handled one by one between two matrix updates


def gptq(
    weight: Tensor, feedback: Tensor, grid: Grid, mask: Tensor | None = None, order: Tensor | None = None
) -> Tensor:
    """Round a matrix (out, in) to `grid`, each column's error compensated by the columns not yet rounded.

    feedback : (in, in) from `linear_feedback` (of the permuted second moment when `order` is given),
        shared by every layer with these inputs
    mask : weights that must stay zero; what a compensation puts there counts as error and is passed on
    Returns values on the grid, float32.
    """
    columns = in_columns(weight, order)
    scale, zero = grid.columns(weight.shape[1])
    rounded = torch.empty_like(columns)
    solve(
        columns,
        columns.clone(),
        feedback.to(columns.dtype),
        spread(scale, columns, order),
        None if zero is None else spread(zero, columns, order),
        None if mask is None else in_columns(mask, order),
        grid,
        rounded,
        torch.zeros_like(columns),
    )
    if order is not None:
        rounded = rounded[torch.argsort(order)]
    return rounded.T.contiguous()


def in_columns(weight: Tensor, order: Tensor | None) -> Tensor:
    """(out, in) -> (in, out), float32: a column of the weight is a contiguous row,
    and the updates are products with rows.
    """
    return (weight.float().T if order is None else weight.float().T[order]).contiguous()


def spread(scale: Tensor, columns: Tensor, order: Tensor | None) -> Tensor:
    """Scales or zero points (out or 1, in) as (in, out)."""
    return (scale.T if order is None else scale.T[order]).expand_as(columns).contiguous()


def solve(
    weight: Tensor,
    work: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    keep: Tensor | None,
    grid: Grid,
    rounded: Tensor,
    errors: Tensor,
) -> None:
    """Fill `rounded` and `errors` = weight - rounded, all (columns, out),
    the columns in the order in which they are rounded.

    work : the weight with the answers to the columns before these, overwritten;
        feedback : (columns, columns);  errors : zeros at first The paper updates lazily in blocks; here
            the blocks are halved recursively, so all but `LEAF` columns' worth of the work is matrix
            products.
    """
    width = len(work)
    if width > LEAF:
        half = width // 2
        first, last = slice(half), slice(half, width)
        for part in (first, last):
            if part is last:
                work[last].addmm_(feedback[first, last].T, errors[first])
            solve(
                weight[part],
                work[part],
                feedback[part, part],
                scale[part],
                None if zero is None else zero[part],
                None if keep is None else keep[part],
                grid,
                rounded[part],
                errors[part],
            )
        return
    round_units, before = (
        grid.format.element.round,
        errors.T,
    )  # (out, columns): those not yet rounded are zeros
    rows = zip(
        weight.unbind(),
        work.unbind(),
        scale.unbind(),
        feedback.unbind(1),
        rounded.unbind(),
        errors.unbind(),
        strict=True,
    )
    for i, (dense, column, step, answers, value, error) in enumerate(rows):
        if i:
            column.addmv_(before, answers)
        units = column.div_(step)
        units = round_units(units) if zero is None else round_units(units.add_(zero[i])).sub_(zero[i])
        torch.mul(units, step, out=value)
        if keep is not None:
            value.mul_(keep[i])
        torch.sub(dense, value, out=error)


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
    columns, feedback = in_columns(weight, None), feedback.float()
    keep = None if mask is None else in_columns(mask, None)
    rounded, errors = torch.empty_like(columns), torch.zeros_like(columns)
    scales, zeros, eye = [], [], torch.eye(group, device=columns.device)
    for start in range(0, len(columns), group):
        part = slice(start, start + group)
        square = feedback[part, part]
        answers = feedback[:start, part].T @ errors[:start]  # (group, out)
        # What the weights have become, all that follow being free,
        # is their answers through the inverse of the group's own feedback.
        moved = (
            columns[part]
            + torch.linalg.solve_triangular(square.T, eye, upper=False, unitriangular=True) @ answers
            if start
            else columns[part]
        )
        found = fit(moved.T.contiguous(), format, "channel", group, rule)
        scales.append(found.scale)
        zeros.append(found.zero)
        scale, zero = (
            None if t is None else t.T.contiguous().expand_as(moved) for t in (found.scale, found.zero)
        )
        assert scale is not None
        solve(
            columns[part],
            columns[part] + answers,
            square,
            scale,
            zero,
            None if keep is None else keep[part],
            found,
            rounded[part],
            errors[part],
        )
    zero = None if zeros[0] is None else torch.cat([z for z in zeros if z is not None], -1)
    return rounded.T.contiguous(), Grid(format, torch.cat(scales, -1), zero, group)


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
