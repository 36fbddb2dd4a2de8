"""Optimal brain surgery on a layer's outputs: SparseGPT (Frantar and Alistarh 2023)
and least squares on the inputs.

The loss is the squared change of a layer's outputs on calibration inputs, ||(W - W') X||^2, whose Hessian is
the same for every output row: H = X X^T (the factor 2 changes nothing).
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import BadInput
from workbench.pruning.pattern import NM, smallest
from workbench.statistics.damping import damped, factor_from_the_last


def seen(gram: Tensor) -> Tensor:
    """The second moment itself, once it is known that the layer saw anything."""
    if float(gram.diagonal().mean()) <= 0:
        raise BadInput(
            "calibration: every input of a layer is zero; give calibration data the layer reacts to"
        )
    return gram


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """U upper triangular with H^-1 = U^T U. Raises `BadInput` naming the damp when H does not factorise.

    H = R R^T with R upper triangular is a Cholesky factorisation from the last row to the first, and U is R's
    inverse: neither H^-1 nor a second factorisation is needed.
    """
    upper = factor_from_the_last(seen(gram), damp)
    if upper is None:
        raise BadInput(
            f"damp: {damp:g} is too small for the calibration Hessian to factorise; "
            "raise it (damp-doctor finds the smallest that works)"
        )
    return triangular_inverse(upper)


def triangular_inverse(upper: Tensor, smallest_block: int = 128) -> Tensor:
    """Inverse of an upper triangular (n, n) by halves, so that nearly all the work is matrix products:
    [[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]]."""
    n = len(upper)
    if n <= smallest_block:
        return torch.linalg.solve_triangular(
            upper, torch.eye(n, dtype=upper.dtype, device=upper.device), upper=True
        )
    half = n // 2
    first, last = (
        triangular_inverse(upper[:half, :half], smallest_block),
        triangular_inverse(upper[half:, half:], smallest_block),
    )
    found = torch.zeros_like(upper)
    found[:half, :half], found[half:, half:] = first, last
    found[:half, half:] = -first @ (upper[:half, half:] @ last)
    return found


def static_saliency(weight: Tensor, gram: Tensor, damp: float) -> Tensor:
    """w^2 / (2 [H^-1]_jj) for every weight: the OBS cost of removing it alone (Hassibi and Stork 1993)."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(seen(gram), damp)))
    return weight.square() / (2 * inverse.diagonal())


def sweep(
    weight: Tensor,
    gram: Tensor,
    damp: float,
    *,
    mask: Tensor | None = None,
    sparsity: float = 0.0,
    pattern: NM | None = None,
    removed: Tensor | None = None,
    block: int = 128,
    inner: int = 32,
) -> tuple[Tensor, Tensor]:
    """One pass over the columns from left to right: remove,
    and let the columns to the right absorb the error.

    weight (out, in), gram (in, in). With `mask` (True = keep) the removals are fixed; otherwise they are
    chosen on the way: for N:M when a group is reached, else the `sparsity` share of smallest w^2 / U_jj^2
    of every block of columns, where U_jj is the factor's diagonal, the inverse Hessian of what is still to
    come (SparseGPT, algorithm 1). `removed` marks weights that are already gone and stay so. Returns
    (new weight, mask). The result does not depend on `inner`, which only sizes matrix products.
    """
    upper = inverse_factor(gram, damp)
    out, width = weight.shape
    columns = weight.mT.clone(
        memory_format=torch.contiguous_format
    )  # (in, out): a column of the weight is a row here, so that the sweep reads and writes in order
    keep = torch.ones_like(columns, dtype=torch.bool) if mask is None else mask.mT.clone()
    diagonal = upper.diagonal()
    squared = diagonal.square()[:, None]
    block = min(block, width)
    if pattern is not None:
        block, inner = (
            block // pattern.of * pattern.of or pattern.of,
            max(inner // pattern.of, 1) * pattern.of,
        )
    for start in range(0, width, block):
        stop = min(start + block, width)
        if mask is None and pattern is None:
            cost = columns[start:stop].square() / squared[start:stop]
            if removed is not None:
                cost.masked_fill_(removed[:, start:stop].mT, -1)
            keep[start:stop] = ~smallest(cost.flatten(), round(sparsity * cost.numel())).reshape(cost.shape)
            if removed is not None:  # more may be gone than are asked for here
                keep[start:stop] &= ~removed[:, start:stop].mT
        errors = torch.empty(stop - start, out, device=weight.device, dtype=weight.dtype)
        for first in range(start, stop, inner):
            last = min(first + inner, stop)
            for j in range(first, last):
                if mask is None and pattern is not None and j % pattern.of == 0:
                    end = min(j + pattern.of, width)
                    cost = columns[j:end].square() / squared[j:end]
                    drop = (end - j) * (pattern.of - pattern.keep) // pattern.of
                    if removed is not None:
                        cost = cost.masked_fill(removed[:, j:end].mT, -1)
                    keep[j:end] = ~smallest(cost.mT, drop).mT
                    if removed is not None:
                        keep[j:end] &= ~removed[:, j:end].mT
                error = errors[j - start]
                torch.div(columns[j], diagonal[j], out=error)
                error.masked_fill_(keep[j], 0)
                if j + 1 < last:
                    columns[j + 1 : last].addr_(upper[j, j + 1 : last], error, alpha=-1)
            if last < stop:
                columns[last:stop].addmm_(
                    upper[first:last, last:stop].mT, errors[first - start : last - start], alpha=-1
                )
        if stop < width:
            columns[stop:].addmm_(upper[start:stop, stop:].mT, errors, alpha=-1)
    return (columns * keep).mT.contiguous(), keep.mT.contiguous()


def least_squares(
    weight: Tensor, gram: Tensor, mask: Tensor, damp: float, iterations: int = 200, tolerance: float = 1e-6
) -> Tensor:
    """The masked weight nearest to the dense layer's outputs:
    min_V ||(W - V) X||^2 with V = 0 outside the mask, row by row.

    Conjugate gradients on M * (V H) = M * (W H), all rows at once, preconditioned by the diagonal of H;
    the start is the masked weight, so the error never grows.
    Stops when every row's residual has fallen by `tolerance`.
    """
    hessian = damped(seen(gram), damp)
    keep = mask.to(weight.dtype)
    scale = 1 / hessian.diagonal()
    solution = weight * keep
    residual = keep * ((weight - solution) @ hessian)
    first = residual.norm(dim=-1, keepdim=True)
    z = residual * scale
    direction, rz = z, (residual * z).sum(-1, keepdim=True)
    for _ in range(iterations):
        if bool((residual.norm(dim=-1, keepdim=True) <= tolerance * first).all()):
            break
        product = keep * (direction @ hessian)
        step = rz / (direction * product).sum(-1, keepdim=True).clamp_min(1e-38)
        solution = solution + step * direction
        residual = residual - step * product
        z = residual * scale
        new = (residual * z).sum(-1, keepdim=True)
        direction, rz = z + new / rz.clamp_min(1e-38) * direction, new
    return solution


def output_error(delta: Tensor, weight: Tensor, gram: Tensor) -> float:
    """||delta X||^2 / ||W X||^2 from the inputs' second moment (in, in)."""
    whole = float(((weight @ gram) * weight).sum())
    return float(((delta @ gram) * delta).sum()) / whole if whole > 0 else 0.0
