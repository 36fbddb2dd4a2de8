"""Eigenvalues at either end of the spectrum, with their vectors, residual norms and multiplicity.

Block Lanczos with full reorthogonalisation and thick restart (Wu and Simon 2000; block form Zhou and Saad
2008). A Krylov space shows at most as many copies of a repeated eigenvalue as its block has vectors, so
converged vectors are locked and a fresh random block searches what is orthogonal to them until nothing above
the wanted ones is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.curvature.operators.curvature_operator import Operator, Stopped


@dataclass
class Eigenpairs:
    """values (k,) from the end inwards; vectors (k, size) orthonormal rows; residuals ||H x - value x||;
    `note` on multiplicity.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    complete: bool  # no eigenvalue beyond the ones listed was missed, checked by a search orthogonal to them
    note: str

    def multiplicities(self, relative: float = 1e-3) -> list[tuple[float, int]]:
        """(value, copies) of eigenvalues that agree to `relative` of the largest magnitude."""
        found: list[tuple[float, int]] = []
        scale = float(self.values.abs().max()) if len(self.values) else 0.0
        for value in self.values.tolist():
            if found and abs(found[-1][0] - value) <= relative * scale:
                found[-1] = (found[-1][0], found[-1][1] + 1)
            else:
                found.append((value, 1))
        return found


def eigenpairs(
    operator: Operator,
    count: int = 10,
    end: str = "top",
    tolerance: float = 1e-5,
    block: int = 4,
    basis: int | None = None,
    max_products: int = 2000,
    verify: bool = True,
    seed: int = 0,
    on_products: Callable[[int, Tensor], None] | None = None,
) -> Eigenpairs:
    """The `count` largest (`end="top"`) or smallest (`"bottom"`) eigenvalues.

    tolerance : residual norms are below `tolerance` times the largest eigenvalue magnitude seen. basis
        : vectors kept in memory (default 2 count + 8 block). verify : search for missed copies (costs about
        one more eigenvalue's search). on_products(done, values) is called after every product; a stop inside
        keeps the converged pairs.
    """
    sign = 1.0 if end == "top" else -1.0
    count = min(count, operator.size)
    search = _Search(
        operator,
        sign,
        tolerance,
        min(block, count, operator.size),
        basis or 2 * count + 8 * block,
        max_products,
        seed,
        on_products,
    )
    locked = torch.zeros(0, operator.size, dtype=operator.dtype, device=operator.device)
    values: list[float] = []
    stopped = complete = False
    following: float | None = None
    while True:
        missing = count - len(values)
        if len(values) == operator.size:
            complete = True
            break
        cut = sorted(values, reverse=True)[count - 1] if missing <= 0 else None
        if cut is not None and not verify:
            break
        try:
            theta, vectors = search.sweep(locked, max(missing, 1), cut)
        except Stopped:
            stopped, (theta, vectors) = True, search.converged_so_far
        if cut is not None and len(theta) and not stopped:
            following = float(theta[0])
            if following <= cut:
                complete = True
                break
        if len(theta):
            locked = torch.cat([locked, vectors])
            values += theta.tolist()
        if stopped or not len(theta):
            break
    order = sorted(range(len(values)), key=lambda i: -values[i])
    if len(order) > count:  # rounding put a copy of the last value above it, and the search went on
        following = max(values[order[count]], values[order[count]] if following is None else following)
    order = order[:count]
    vectors = locked[torch.tensor(order, dtype=torch.long, device=locked.device)]
    found = sign * torch.tensor([values[i] for i in order], dtype=torch.float64)
    if stopped or not len(order):
        residuals = torch.full((len(order),), float("nan"), dtype=torch.float64)
    else:
        residuals = _residuals(operator, vectors, found)
        search.products += len(order)
    made = Eigenpairs(found, vectors, residuals, search.products, complete, "")
    made.note = _note(made, count, following, sign, block, tolerance, verify, stopped)
    return made


def _residuals(operator: Operator, vectors: Tensor, values: Tensor) -> Tensor:
    """True residual norms, from a product with the finished vectors."""
    try:
        images = operator.matmat(vectors)
    except Stopped:
        return torch.full((len(vectors),), float("nan"), dtype=torch.float64)
    return torch.linalg.vector_norm(images - values.to(vectors)[:, None] * vectors, dim=1).double().cpu()


def _note(
    found: Eigenpairs,
    count: int,
    following: float | None,
    sign: float,
    block: int,
    tolerance: float,
    verify: bool,
    stopped: bool,
) -> str:
    if stopped:
        return (
            f"stopped: {len(found.values)} of {count} had converged; copies of repeated values may be missing"
        )
    if len(found.values) < count:
        return (
            f"{len(found.values)} of {count} converged within the allowed products; "
            "allow more, or a larger tolerance"
        )
    if not verify:
        return f"multiplicity not checked: one search shows at most {block} copies of a repeated value"
    if not found.complete:
        return (
            "the search for missed copies did not finish within the allowed products: "
            "multiplicities may be larger"
        )
    last = float(found.values[-1])
    if following is not None and abs(sign * following - last) <= 10 * tolerance * float(
        found.values.abs().max()
    ):
        return (
            f"the last value {last:.6g} has more copies than the {count} asked for: "
            "its multiplicity is not resolved"
        )
    return "multiplicities are resolved"


class _Search:
    def __init__(
        self,
        operator: Operator,
        sign: float,
        tolerance: float,
        block: int,
        basis: int,
        max_products: int,
        seed: int,
        on_products: Callable[[int, Tensor], None] | None,
    ) -> None:
        self.operator, self.sign, self.tolerance, self.block = operator, sign, tolerance, block
        self.basis, self.max_products, self.on_products = basis, max_products, on_products
        self.generator = torch.Generator().manual_seed(seed)
        self.products, self.scale = 0, 0.0
        self.converged_so_far: tuple[Tensor, Tensor] = self._nothing()

    def _nothing(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(
            0, self.operator.size, dtype=self.operator.dtype, device=self.operator.device
        )

    def _random(self, count: int) -> Tensor:
        made = torch.randn(count, self.operator.size, generator=self.generator)
        return made.to(self.operator.device, self.operator.dtype)

    def sweep(self, locked: Tensor, want: int, cut: float | None) -> tuple[Tensor, Tensor]:
        """Converged largest Ritz pairs of the operator restricted to the complement of `locked`,
        largest first.

        With `cut`, it ends as soon as the largest is known to lie above it or has converged below it.
        """
        operator, room = self.operator, self.operator.size - len(locked)
        width = min(self.block, room)
        most = min(max(self.basis, want + 3 * width), room)
        basis = torch.empty(most + width, operator.size, dtype=operator.dtype, device=operator.device)
        projected = torch.zeros(most + width, most + width, dtype=torch.float64)
        basis[:width] = self._fresh(self._random(width), locked)
        filled = 0
        self.converged_so_far = self._nothing()
        while True:
            new = slice(filled, filled + width)
            images = self.sign * operator.matmat(basis[new])
            self.products += width
            filled += width
            overlap = basis[:filled] @ images.mT
            projected[:filled, new] = overlap.double().cpu()
            projected[new, :filled] = overlap.mT.double().cpu()
            rest = images - overlap.mT @ basis[:filled]
            rest = rest - (rest @ basis[:filled].mT) @ basis[:filled]
            if len(locked):
                rest = rest - (rest @ locked.mT) @ locked
            theta, ritz = torch.linalg.eigh(
                (projected[:filled, :filled] + projected[:filled, :filled].mT) / 2
            )
            theta, ritz = theta.flip(0), ritz.flip(1)
            self.scale = max(self.scale, float(theta.abs().max()))
            gram = rest @ rest.mT
            tail = ritz[new]  # (width, filled): coefficients on the newest block
            residual = (tail * (gram.double().cpu() @ tail)).sum(0).clamp_min(0).sqrt()
            good = residual <= self.tolerance * max(self.scale, 1e-30)
            whole = filled >= room
            head = len(theta) if whole else int(torch.cumprod(good.int(), 0).sum())
            self.converged_so_far = (
                (theta[:head], ritz[:, :head].mT.to(basis) @ basis[:filled]) if head else self._nothing()
            )
            if self.on_products is not None:
                self.on_products(self.products, self.sign * theta[:want])
            if head >= want or whole or self.products >= self.max_products:
                keep = head if cut is None else max(1 if head else 0, int((theta[:head] > cut).sum()))
                return self.converged_so_far[0][:keep], self.converged_so_far[1][:keep]
            width_next = min(width, room - filled)
            if filled + width_next > most:
                keep = max(min(want + width, filled - width), 1)
                basis[:keep] = ritz[:, :keep].mT.to(basis) @ basis[:filled]
                projected.zero_()
                projected[range(keep), range(keep)] = theta[:keep]
                filled = keep
            width = width_next
            basis[filled : filled + width] = self._fresh(rest[:width], torch.cat([locked, basis[:filled]]))

    def _fresh(self, rows: Tensor, against: Tensor) -> Tensor:
        """Orthonormal rows spanning `rows` off `against`; a direction that vanished is replaced by a random
        one.
        """
        made: list[Tensor] = []
        floor = 100 * torch.finfo(rows.dtype).eps * max(self.scale, 1e-30)
        for row in rows:
            for attempt in range(4):
                before = torch.linalg.vector_norm(row)
                if attempt == 0 and self.scale > 0 and before <= floor:
                    row = self._random(1)[0]
                    continue
                row = row / before
                for _ in range(2):
                    row = row - against.mT @ (against @ row)
                    for other in made:
                        row = row - (other @ row) * other
                    row = row / torch.linalg.vector_norm(row).clamp_min(1e-30)
                break
            made.append(row)
        return torch.stack(made)
