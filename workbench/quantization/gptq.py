"""GPTQ: column-wise optimal-brain-surgeon rounding (Frantar, Ashkboos, Hoefler and Alistarh, 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.quantization.grid import Grid, fit

LEAF = 16  # columns handled one by one between two matrix updates


def damped(gram: Tensor, damp: float) -> Tensor:
    """A copy of the inputs' second moment that can be inverted: unseen inputs get 1, the diagonal gains `damp` times its mean."""
    found = gram.clone()
    diagonal = found.diagonal()
    unseen = diagonal == 0
    diagonal[unseen] = 1.0 if bool(unseen.all()) else diagonal[~unseen].mean()
    diagonal += damp * diagonal.mean()
    return found


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor U of the damped inverse, inverse = U^T U: row i of U holds how the rounding error of column i
    is best spread over the columns after it. Damping grows tenfold while the matrix is numerically singular."""
    while True:
        lower, failed = torch.linalg.cholesky_ex(damped(gram, damp))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damp = max(damp * 10, 1e-6)


def column_order(gram: Tensor) -> Tensor:
    """Columns by decreasing input energy ("act-order"): the costly ones are rounded while many can still compensate."""
    return torch.argsort(gram.diagonal(), descending=True, stable=True)


def gptq(weight: Tensor, upper: Tensor, grid: Grid, mask: Tensor | None = None, order: Tensor | None = None) -> Tensor:
    """Round a matrix (out, in) to `grid`, each column's error compensated by the columns not yet rounded.

    upper : (in, in) from `inverse_factor` (of the permuted second moment when `order` is given), shared by every layer with these inputs
    mask : weights that must stay zero; what a compensation puts there counts as error and is passed on
    Returns values on the grid, float32.

    The paper updates lazily in blocks; here the blocks are halved recursively, so all but `LEAF` columns' worth of the
    work is matrix products.
    """
    # Worked on transposed: a column of the weight is a contiguous row, and the leaf's updates are matrix-vector products.
    work = weight.float().T if order is None else weight.float().T[order]
    work = work.contiguous()  # (in, out)
    if work.data_ptr() == weight.data_ptr():
        work = work.clone()
    width, rows = work.shape
    scale, zero = (None if t is None else t.expand(-1, rows).contiguous() for t in (s if s is None else s.movedim(-1, 0) for s in grid.columns(width)))
    assert scale is not None
    if order is not None:
        scale, zero = scale[order], None if zero is None else zero[order]
    keep = None if mask is None else (mask.T if order is None else mask.T[order]).to(work.dtype)
    upper = upper.to(work.dtype)
    reach = (1 / upper.diagonal()).tolist()
    errors = torch.empty_like(work)
    rounded = torch.empty_like(work)
    round_units = grid.format.element.round

    def solve(start: int, end: int) -> None:
        if end - start > LEAF:
            middle = (start + end) // 2
            solve(start, middle)
            work[middle:end].addmm_(upper[start:middle, middle:end].T, errors[start:middle], alpha=-1)
            solve(middle, end)
            return
        for i in range(start, end):
            column = work[i]
            if i > start:
                column.addmv_(errors[start:i].T, upper[start:i, i], alpha=-1)
            units = column / scale[i]
            if zero is None:
                value = round_units(units).mul_(scale[i])
            else:
                value = round_units(units.add_(zero[i])).sub_(zero[i]).mul_(scale[i])
            if keep is not None:
                value.mul_(keep[i])
            rounded[i] = value
            torch.sub(column, value, out=errors[i]).mul_(reach[i])

    solve(0, width)
    if order is not None:
        rounded = rounded[torch.argsort(order)]
    return rounded.T.contiguous()


def gptq_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """||(W - Q) X||_F^2 from the second moment X X^T of the inputs."""
    gap = (weight - rounded).double()
    return float(((gap @ gram.double()) * gap).sum())


def gptq_with_moving_scales(weight: Tensor, upper: Tensor, grid: Grid, rule: str, mask: Tensor | None = None) -> tuple[Tensor, Grid]:
    """GPTQ whose group scales are found when the group is reached, from the weights as compensated so far (the paper's
    grouped variant); returns the values and the grid they are on. Groups must divide the columns."""
    work, values, scales, zeros = weight.float().clone(), [], [], []
    width = work.shape[1]
    for start in range(0, width, grid.group):
        end = min(start + grid.group, width)
        part = fit(work[:, start:end], grid.format, "channel", grid.group, rule)
        piece = None if mask is None else mask[:, start:end]
        found = gptq(work[:, start:end], upper[start:end, start:end], part, piece)
        values.append(found)
        scales.append(part.scale)
        zeros.append(part.zero)
        if end < width:
            # The errors, in units of the factor's diagonal, follow from the triangular system the group solved.
            gap = work[:, start:end] - found
            error = torch.linalg.solve_triangular(upper[start:end, start:end].T, gap.T, upper=False)  # (group, out)
            work[:, end:] -= error.T @ upper[start:end, end:]
    zero = None if zeros[0] is None else torch.cat([z for z in zeros if z is not None], -1)
    return torch.cat(values, -1), Grid(grid.format, torch.cat(scales, -1), zero, grid.group)
