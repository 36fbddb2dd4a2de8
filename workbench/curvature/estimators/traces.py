"""Trace, Frobenius norm and diagonal from products with random vectors,
with standard errors that hold for few probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.curvature.estimators.probes import gaussian, rademacher, standard_error
from workbench.curvature.operators.curvature_operator import Operator, Stopped

METHODS = ("hutchinson", "hutch++", "xtrace")


@dataclass
class TraceEstimate:
    """`value` with `error` (see `standard_error`), from `products` matrix-vector products;
    `samples` are what was averaged.
    """

    method: str
    value: float
    error: float
    products: int
    samples: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    frobenius_squared: float = math.nan
    frobenius_squared_error: float = math.nan
    partial: bool = False


@dataclass
class ProbeSums:
    """What Hutchinson probes accumulate: per-probe v.Hv and |Hv|^2, per block too,
    and the diagonal's first two moments.
    """

    forms: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    block_forms: list[list[float]] = field(default_factory=list)  # one list a probe
    diagonal: Tensor | None = None
    diagonal_square: Tensor | None = None

    def add(self, vectors: Tensor, images: Tensor, slices: list[slice], diagonal: bool) -> None:
        for v, h in zip(vectors, images, strict=True):
            product = v * h
            self.forms.append(float(product.sum(dtype=torch.float64)))
            self.squares.append(float(h.double().square().sum()))
            self.block_forms.append([float(product[s].sum(dtype=torch.float64)) for s in slices])
            if diagonal:
                if self.diagonal is None or self.diagonal_square is None:
                    self.diagonal, self.diagonal_square = torch.zeros_like(v), torch.zeros_like(v)
                self.diagonal += product
                self.diagonal_square += product.square()


def hutchinson_probes(
    operator: Operator,
    probes: int,
    seed: int = 0,
    group: int = 8,
    slices: list[slice] | None = None,
    diagonal: bool = False,
) -> Iterator[ProbeSums]:
    """Rademacher probes in groups (Hutchinson 1990); yields the sums after each group.

    E v.Hv is the trace, E |Hv|^2 the squared Frobenius norm, E v * Hv the diagonal (Bekas, Kokiopoulou
    and Saad 2007), and the partial sums over a block of coordinates that block's trace, all from the same
    products.
    """
    sums = ProbeSums()
    for start in range(0, probes, group):
        vectors = rademacher(operator, range(start, min(start + group, probes)), seed)
        sums.add(vectors, operator.matmat(vectors), slices or [], diagonal)
        yield sums


def narrow(value: float, error: float, wanted: float) -> bool:
    """Whether two standard errors are within the wanted fraction of the value (never, when `wanted` is 0)."""
    return wanted > 0 and error == error and 2 * error <= wanted * abs(value)


def hutchinson(
    operator: Operator,
    probes: int = 32,
    seed: int = 0,
    wanted: float = 0.0,
    group: int = 8,
    each: Callable[[TraceEstimate], None] | None = None,
) -> TraceEstimate:
    """Hutchinson's estimate from up to `probes` products; ends early once +-2 standard errors are within
    `wanted` of the value.

    `each` receives the estimate after every group. A stop keeps the groups so far.
    """
    found = TraceEstimate("hutchinson", math.nan, math.nan, 0, partial=True)
    try:
        for sums in hutchinson_probes(operator, probes, seed, group):
            values = np.array(sums.forms)
            found = TraceEstimate(
                "hutchinson",
                float(values.mean()),
                standard_error(values),
                len(values),
                values,
                float(np.mean(sums.squares)),
                standard_error(sums.squares),
            )
            if each is not None:
                each(found)
            if len(values) >= 8 and narrow(found.value, found.error, wanted):
                break
    except Stopped:
        found.partial = True
    return found


def orthonormal(rows: Tensor) -> Tensor:
    """An orthonormal basis of the rows' span, numerically dependent ones dropped: (rank, size)."""
    q, r = torch.linalg.qr(rows.mT)
    diagonal = r.diagonal().abs()
    if float(diagonal.min()) > 1e3 * torch.finfo(rows.dtype).eps * float(diagonal.max()):
        return q.mT
    u, s, _ = torch.linalg.svd(rows.mT, full_matrices=False)
    return u.mT[s > 1e3 * torch.finfo(rows.dtype).eps * s[0]] if float(s[0]) > 0 else rows[:0]


def hutch_plus_plus(
    operator: Operator, products: int = 48, seed: int = 0, each: Callable[[TraceEstimate], None] | None = None
) -> TraceEstimate:
    """Hutch++ (Meyer, Musco, Musco and Woodruff 2021, algorithm 1):
    the trace on a sketched range, exactly, and Hutchinson on the rest.

    A third of the products sketch the range, a third give the trace on it, a third are probes of the rest;
    the standard error is that of the rest (the first part is exact given the sketch).
    """
    third = min(max(products // 3, 2), operator.size)
    found = TraceEstimate("hutch++", math.nan, math.nan, 0, partial=True)
    try:
        basis = orthonormal(operator.matmat(rademacher(operator, range(third), seed)))
        exact = float((basis * operator.matmat(basis)).sum(dtype=torch.float64)) if len(basis) else 0.0
        used = third + len(basis)
        tests = max(products // 3, 2)
        probes = rademacher(operator, range(third, third + tests), seed)
        probes = probes - (probes @ basis.mT) @ basis
        rest = (probes * operator.matmat(probes)).sum(1, dtype=torch.float64).cpu().numpy()
        samples = exact + rest
        error = (
            standard_error(samples) if len(basis) < operator.size else 0.0
        )  # the sketch spans everything: exact
        found = TraceEstimate("hutch++", float(samples.mean()), error, used + tests, samples)
    except Stopped:
        return found
    if each is not None:
        each(found)
    return found


def xtrace(
    operator: Operator, products: int = 48, seed: int = 0, each: Callable[[TraceEstimate], None] | None = None
) -> TraceEstimate:
    """XTrace (Epperly, Tropp and Webber 2024, section 2): every probe tests the range that all the others
    sketch.

    With m = products / 2 Gaussian probes w_i, Y = H W = Q R and Q_i spanning all columns of Y but the i-th,
    t_i = tr(Q_i' H Q_i) + w_i'(I - Q_i Q_i') H (I - Q_i Q_i') w_i. As span(Q_i) is the complement in span(Q)
    of s_i ~ R^-T e_i, all t_i follow from Q, H Q and R: two products a probe. The t_i share their sketches,
    so they are positively correlated and their spread alone is too small
    (up to 1.3 times on decaying spectra); the error is widened by sqrt(2).
    """
    count = min(max(products // 2, 3), operator.size)
    found = TraceEstimate("xtrace", math.nan, math.nan, 0, partial=True)
    try:
        probes = gaussian(operator, range(count), seed)
        images = operator.matmat(probes)
        basis, upper = torch.linalg.qr(images.mT)  # (size, m), (m, m)
        scale = upper.diagonal().abs()
        if count == operator.size or float(scale.min()) <= 1e3 * torch.finfo(images.dtype).eps * float(
            scale.max()
        ):
            return _whole_range(operator, probes, images)
        core = basis.mT @ operator.matmat(basis.mT.contiguous()).mT  # Q' H Q
    except Stopped:
        return found
    h, r = ((core + core.mT) / 2).double().cpu(), upper.double().cpu()
    w = (basis.mT @ probes.mT).double().cpu()  # column i: Q' w_i
    forms = (probes * images).sum(1, dtype=torch.float64).cpu()  # w_i' H w_i
    s = torch.linalg.inv(r).mT
    s = s / torch.linalg.vector_norm(s, dim=0)
    x = w - s * (s * w).sum(0)  # the part of Q' w_i along Q_i
    samples = (h.trace() - (s * (h @ s)).sum(0) + forms - 2 * (x * r).sum(0) + (x * (h @ x)).sum(0)).numpy()
    found = TraceEstimate(
        "xtrace", float(samples.mean()), math.sqrt(2) * standard_error(samples), 2 * count, samples
    )
    if each is not None:
        each(found)
    return found


def _whole_range(operator: Operator, probes: Tensor, images: Tensor) -> TraceEstimate:
    """The probes already span the matrix's range: its trace is the trace on that range, up to rounding."""
    basis = orthonormal(images)
    if not len(basis):
        return TraceEstimate("xtrace", 0.0, 0.0, len(probes), np.zeros(len(probes)))
    exact = float((basis * operator.matmat(basis)).sum(dtype=torch.float64))
    rounding = (
        float(torch.finfo(images.dtype).eps) * float(torch.linalg.vector_norm(images)) * math.sqrt(len(basis))
    )
    return TraceEstimate("xtrace", exact, rounding, len(probes) + len(basis), np.full(len(probes), exact))


def estimate(
    operator: Operator,
    method: str,
    products: int,
    seed: int = 0,
    wanted: float = 0.0,
    each: Callable[[TraceEstimate], None] | None = None,
) -> TraceEstimate:
    """The trace by name of method; sketching methods double their products until the interval is as narrow as
    `wanted`.
    """
    if method == "hutchinson":
        return hutchinson(operator, products, seed, wanted, each=each)
    solve = hutch_plus_plus if method == "hutch++" else xtrace
    if wanted <= 0:
        return solve(operator, products, seed, each)
    size = min(12, products)
    while True:
        found = solve(operator, size, seed, each)
        if found.partial or narrow(found.value, found.error, wanted) or size >= products:
            return found
        size = min(2 * size, products)
