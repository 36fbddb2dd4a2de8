"""Stochastic Lanczos quadrature: the eigenvalue density from a few probes, in lockstep where that saves work.

Each probe's Lanczos process (Lanczos 1950; Golub and Welsch 1969 for the quadrature; Ubaru, Chen and Saad
2017 for the density) advances by one step per product, so probes in lockstep share every micro-batch's
forward and first backward pass. Where those are kept between products there is nothing to share,
and `GroupedProbes` runs large probes in small groups, in less memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg
from torch import Tensor

from workbench.curvature.estimators.probes import skewness_factor
from workbench.curvature.operators.curvature_operator import CurvatureOperator, Operator

# bytes of Krylov basis kept for full reorthogonalisation; a constant, so that results do not depend on the
# machine
MEMORY = 2 * 1024**3
# bytes of vectors up to which probes advance together although nothing is saved by it
GROUP_MEMORY = 256 * 1024**2


@dataclass(eq=False)
class Quadrature:
    """Gauss quadrature of each probe's spectral measure: eigenvalue estimates `nodes` with `weights` that add
    up to one.

    Node and weight arrays have one entry per probe (their lengths can differ when a Krylov space is
    exhausted).
    """

    nodes: list[NDArray[np.float64]] = field(default_factory=list)
    weights: list[NDArray[np.float64]] = field(default_factory=list)
    residuals: list[NDArray[np.float64]] = field(
        default_factory=list
    )  # ||H y - node y|| of each node's Ritz vector y

    def moment(self, power: int) -> NDArray[np.float64]:
        """Per probe, mean of eigenvalue**power over the spectrum:
        power 1 is trace / P, power 2 is ||H||_F^2 / P.
        """
        return np.array([float(w @ n**power) for n, w in zip(self.nodes, self.weights, strict=True)])

    def mass_below(self, threshold: float) -> float:
        """Fraction of eigenvalues below a threshold, averaged over probes."""
        return float(np.mean([w[n < threshold].sum() for n, w in zip(self.nodes, self.weights, strict=True)]))

    @property
    def extent(self) -> tuple[float, float]:
        return min(float(n[0]) for n in self.nodes), max(float(n[-1]) for n in self.nodes)

    def densities(self, grid: NDArray[np.float64], width: float) -> NDArray[np.float64]:
        """(probes, grid) spectral densities smoothed by a Gaussian of standard deviation `width`."""
        return np.stack(
            [gaussian_sum(grid, n, w, width) for n, w in zip(self.nodes, self.weights, strict=True)]
        )

    def grid(self, width: float, points: int = 1200) -> NDArray[np.float64]:
        """Abscissae that hold all mass to 5 widths beyond the ends, no coarser than a third of a width."""
        low, high = self.extent
        low, high = low - 6 * width, high + 6 * width
        return np.linspace(low, high, int(min(max(points, 3 * (high - low) / width), 20_000)))

    def default_width(self) -> float:
        """One hundredth of the spectrum's extent."""
        low, high = self.extent
        scale = max(abs(low), abs(high), 1e-12)
        return max((high - low) / 100, 1e-4 * scale)


def gaussian_sum(
    grid: NDArray[np.float64], nodes: NDArray[np.float64], weights: NDArray[np.float64], width: float
) -> NDArray[np.float64]:
    """sum_i weights_i N(grid; nodes_i, width^2)."""
    return (
        np.exp(-0.5 * ((grid[:, None] - nodes[None]) / width) ** 2) @ weights / (width * np.sqrt(2 * np.pi))
    )


def band(
    densities: NDArray[np.float64], level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Pointwise mean over probes and its Student-t confidence band at `level`, widened for skewed samples;
    (mean, low, high). One probe: NaN.
    """
    mean = densities.mean(0)
    count = len(densities)
    if count < 2:
        empty = np.full_like(mean, np.nan)
        return mean, empty, empty
    from scipy import stats  # slow to import

    half = (
        stats.t.ppf(0.5 + level / 2, count - 1)
        * densities.std(0, ddof=1)
        / np.sqrt(count)
        * skewness_factor(densities)
    )
    return mean, np.maximum(mean - half, 0), mean + half


def keeps_basis(size: int, probes: int, steps: int, bytes_each: int) -> bool:
    """Whether the Krylov bases of all probes fit the memory set aside for full reorthogonalisation."""
    return size * probes * (steps + 1) * bytes_each <= MEMORY


class Lockstep:
    """k Lanczos processes advancing together, or k for every block of coordinates.
    After each `step`, `quadrature()` is the estimate so far.

    With `reorthogonalise` every new vector is orthogonalised against all earlier ones (twice where needed,
    Daniel et al. 1976). Without, only the three-term recurrence is kept: converged outliers then reappear as
    copies whose weights add up to the right total, so densities stay right and memory is three vectors
    a probe (Greenbaum 1989). `blocks` are slices of coordinates; the operator's `block_matmat` then gives
    each block's own spectrum. `starts` (k, size) is taken over and overwritten. After the first step `forms`
    (k, parts) holds z_p.(H z)_p for the starts z and the slices `parts`:
    traces of diagonal blocks at no further cost.
    """

    def __init__(
        self,
        operator: Operator,
        starts: Tensor,
        steps: int,
        reorthogonalise: bool = True,
        blocks: list[slice] | None = None,
        parts: Sequence[slice] = (),
    ) -> None:
        self.operator, self.parts = operator, parts
        self.whole, self.blocks = blocks is None, blocks or [slice(0, operator.size)]
        self.matmat = operator.matmat if blocks is None else operator.block_matmat  # type: ignore[attr-defined]
        self.probes, self.done = len(starts), 0
        self.steps = min(steps, max(s.stop - s.start for s in self.blocks))
        self.scales = torch.linalg.vector_norm(starts, dim=1).double().cpu().numpy()
        for s in self.blocks:
            starts[:, s] /= torch.linalg.vector_norm(starts[:, s], dim=1, keepdim=True)
        self.current: Tensor = starts
        self.previous: Tensor | None = None
        self.alphas: dict[tuple[int, int], list[float]] = {
            (k, b): [] for k in range(self.probes) for b in range(len(self.blocks))
        }
        self.betas: dict[tuple[int, int], list[float]] = {key: [] for key in self.alphas}
        self.active = set(self.alphas)
        self.forms: NDArray[np.float64] = np.full((self.probes, len(parts)), np.nan)
        self.noise: float | None = (
            None  # see CurvatureOperator.noise, for unit covariance probes; free as well
        )
        self.basis = starts.new_empty(self.probes, self.steps, operator.size) if reorthogonalise else None
        self._spare: Tensor | None = None  # memory that the next product is written to

    def release(self) -> None:
        """Give the vectors back; `quadrature` goes on working, `step` does not."""
        self.basis = self.previous = self._spare = None
        self.current = self.current.new_empty(0)

    def step(self) -> None:
        """One more product for every probe whose Krylov space is not exhausted."""
        going = sorted({k for k, _ in self.active})
        q = self.current
        noisy = (
            self.operator
            if self.done == 0 and self.whole and isinstance(self.operator, CurvatureOperator)
            else None
        )
        if noisy is not None:
            noisy.batch_squares = None
        if len(going) == self.probes:
            w = self.matmat(q, out=self._spare)
        else:
            w = torch.zeros_like(q)
            w[going] = self.matmat(q[going])
        if self.done == 0:
            for column, s in enumerate(self.parts):
                self.forms[:, column] = self.scales**2 * (q[:, s] * w[:, s]).sum(1).double().cpu().numpy()
            spread = None if noisy is None else noisy.noise(w)
            self.noise = None if spread is None else spread * self.operator.size
        for k in going:
            if self.basis is not None:
                self.basis[k, self.done] = q[k]
            for b, s in enumerate(self.blocks):
                if (k, b) in self.active:
                    self._advance(k, b, q[k, s], w[k, s])
        self.done += 1
        self._spare, self.previous, self.current = self.previous, q, w

    def _advance(self, k: int, b: int, q: Tensor, w: Tensor) -> None:
        """Turn the product `w` of the newest vector `q` into the next one, in place."""
        alphas, betas, s = self.alphas[k, b], self.betas[k, b], self.blocks[b]
        alpha = float(torch.dot(w, q))
        w.sub_(q, alpha=alpha)
        if self.previous is not None:
            w.sub_(self.previous[k, s], alpha=betas[-1])
        if self.basis is not None:
            orthogonalise(w, self.basis[k, : self.done + 1, s])
        beta = float(torch.linalg.vector_norm(w))
        alphas.append(alpha)
        betas.append(beta)
        scale = max(abs(a) + c for a, c in zip(alphas, [0.0, *betas], strict=False))
        if (
            beta <= 100 * torch.finfo(w.dtype).eps * scale or scale == 0 or len(alphas) >= s.stop - s.start
        ):  # the Krylov space is exhausted
            self.active.discard((k, b))
            w.zero_()
        else:
            w.div_(beta)

    def run(self) -> Iterator[int]:
        """Advance to the end, yielding the number of steps done after each."""
        while self.active and self.done < self.steps:
            self.step()
            yield self.done

    def quadrature(self, block: int = 0) -> Quadrature:
        """Nodes and weights from the tridiagonal matrices so far."""
        found = Quadrature()
        for k in range(self.probes):
            a, b = self.alphas[k, block], self.betas[k, block]
            if not a:
                continue
            nodes, vectors = linalg.eigh_tridiagonal(np.array(a), np.array(b[: len(a) - 1]))
            found.nodes.append(nodes)
            found.weights.append(vectors[0] ** 2)
            rounding = torch.finfo(self.current.dtype).eps * abs(nodes).max()
            found.residuals.append(np.maximum(abs(b[len(a) - 1] * vectors[-1]), rounding))
        return found


def probe_groups(operator: Operator, probes: int) -> list[range]:
    """The numbers of the probes that advance together: all of them, unless their vectors (three a probe)
    are large and sharing saves nothing.
    """
    each = 3 * operator.size * operator.dtype.itemsize
    if (
        probes * each > GROUP_MEMORY
        and isinstance(operator, CurvatureOperator)
        and operator.keeps_all_graphs()
    ):
        together = max(GROUP_MEMORY // each, 1)
        return [range(k, min(k + together, probes)) for k in range(0, probes, together)]
    return [range(probes)]


class GroupedProbes:
    """Groups of probes, one `Lockstep` after the other, read as one. A probe does not depend on its group.

    draw : probes of these numbers, (k, size). The other arguments are those of `Lockstep`.
    """

    def __init__(
        self,
        operator: Operator,
        draw: Callable[[Sequence[int]], Tensor],
        probes: int,
        steps: int,
        reorthogonalise: bool = True,
        blocks: list[slice] | None = None,
        parts: Sequence[slice] = (),
    ) -> None:
        self.groups = probe_groups(operator, probes)
        self._open: Callable[[range], Lockstep] = lambda group: Lockstep(
            operator, draw(group), steps, reorthogonalise, blocks, parts
        )
        self._runs = [self._open(self.groups[0])]
        self.steps = len(self.groups) * self._runs[0].steps

    def run(self) -> Iterator[int]:
        """Advance to the end, yielding the number of steps done after each, over all groups."""
        done = 0
        for number, group in enumerate(self.groups):
            if number:
                self._runs[-1].release()
                self._runs.append(self._open(group))
            for _ in self._runs[-1].run():
                yield (done := done + 1)

    def release(self) -> None:
        self._runs[-1].release()

    @property
    def done(self) -> int:
        """Steps of the probe that got furthest."""
        return self._runs[0].done

    @property
    def forms(self) -> NDArray[np.float64]:
        """Those of the probes started so far, (probes, parts)."""
        return np.concatenate([run.forms for run in self._runs if run.done] or [self._runs[0].forms])

    @property
    def noise(self) -> float | None:
        found = [(run.noise, run.probes) for run in self._runs if run.noise is not None]
        return (
            sum(noise * probes for noise, probes in found) / sum(probes for _, probes in found)
            if found
            else None
        )

    def quadrature(self, block: int = 0) -> Quadrature:
        return pooled([run.quadrature(block) for run in self._runs])


def orthogonalise(vector: Tensor, basis: Tensor) -> None:
    """Take the components along the orthonormal rows of `basis` out of `vector` (size,), in place;
    twice when it shrank by half or more.
    """
    before = torch.linalg.vector_norm(vector)
    vector -= basis.mT @ (basis @ vector)
    if torch.linalg.vector_norm(vector) < 0.5 * before:
        vector -= basis.mT @ (basis @ vector)


def pooled(quadratures: list[Quadrature]) -> Quadrature:
    """The probes of several runs together."""
    made = Quadrature()
    for one in quadratures:
        made.nodes += one.nodes
        made.weights += one.weights
        made.residuals += one.residuals
    return made


@dataclass(frozen=True)
class Outlier:
    """An eigenvalue that stands apart and has converged: its value, residual norm,
    and the number of copies its weight suggests.
    """

    value: float
    residual: float
    copies: float


def outliers(quadrature: Quadrature, size: int, limit: int = 40) -> tuple[list[Outlier], tuple[float, float]]:
    """Resolved eigenvalues at both ends, and the edges of what remains unresolved (the bulk).

    From each end inwards, a node counts when at least half of the probes have one there whose residual norm
    is below 1 % of its magnitude. `copies` is the mean weight times `size`;
    it is unbiased but noisy with few probes.
    """
    edges, found = [], []
    scale = max(map(abs, quadrature.extent))
    for sign in (1.0, -1.0):
        probes = list(zip(quadrature.nodes, quadrature.weights, quadrature.residuals, strict=True))
        remaining = [
            sorted((sign * float(n), float(w), float(r)) for n, w, r in zip(*one, strict=True))
            for one in probes
        ]
        edge = 0.0
        for _ in range(limit):
            head = max((rows[-1] for rows in remaining if rows), default=None)
            if head is None or head[0] <= 0:
                break
            edge = head[0]
            floor = head[0] - max(5e-4 * scale, 2 * min(head[2], 0.01 * head[0]))
            near = [[row for row in rows if row[0] >= floor] for rows in remaining]
            sure = [rows for rows in near if rows and min(row[2] for row in rows) <= 0.01 * head[0]]
            if 2 * len(sure) < len(remaining):
                break
            best = min((row for rows in sure for row in rows), key=lambda row: row[2])
            weight = sum(row[1] for rows in near for row in rows) / len(remaining)
            found.append(Outlier(sign * best[0], best[2], weight * size))
            remaining = [rows[: len(rows) - len(gone)] for rows, gone in zip(remaining, near, strict=True)]
        edges.append(sign * edge)
    return sorted(found, key=lambda o: -o.value), (edges[1], edges[0])
