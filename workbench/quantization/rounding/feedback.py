"""What GPTQ asks of a second moment: its linear feedback, shared by layers with the same inputs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from workbench.errors import BadInput
from workbench.statistics.damping import factor_from_the_last

#: Damping, as a share of the mean diagonal, beyond which a matrix is not what was measured any more.
LARGEST_DAMP = 1e6


def linear_feedback(gram: Tensor, damp: float) -> Tensor:
    """Unit upper triangular F with F D F^T the damped second moment, D diagonal: column i of F holds how
    the rounding errors of the columns before i are best answered in column i (Chee et al. 2023, QuIP,
    equation 4 and theorem 6, who show that this is GPTQ).

    F is the inverse of GPTQ's factor, its rows divided by their diagonal, so that one Cholesky factorisation,
    from the last column to the first, replaces two and an inverse.
    Damping grows tenfold while the matrix is numerically singular, up to `LARGEST_DAMP`.
    """
    while damp <= LARGEST_DAMP:
        upper = factor_from_the_last(gram, damp)
        if upper is not None:
            return upper.div_(upper.diagonal().clone())
        damp = max(damp * 10, 1e-6)
    finite = bool(gram.isfinite().all())
    raise BadInput(
        "rounding: the second moment of a layer's inputs "
        + ("cannot be inverted at any damping" if finite else "is not finite")
        + "; look at the calibration split's inputs, or take rounding nearest"
    )


def column_order(gram: Tensor) -> Tensor:
    """Columns by decreasing input energy ("act-order"): the costly ones are rounded while many can still
    compensate.
    """
    return torch.argsort(gram.diagonal(), descending=True, stable=True)


@dataclass
class Factors:
    """Linear feedback of the second moments seen last: layers with the same inputs (query, key, value)
    share one.
    """

    gram: Tensor | None = None
    made: dict[tuple[float, bool], tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def of(self, gram: Tensor, damp: float, act_order: bool) -> tuple[Tensor, Tensor | None]:
        """(linear feedback, column order or None)."""
        if self.gram is None or self.gram.shape != gram.shape or not torch.equal(self.gram, gram):
            self.gram, self.made = gram, {}
        if (damp, act_order) not in self.made:
            order = column_order(gram) if act_order else None
            self.made[damp, act_order] = (
                linear_feedback(gram if order is None else gram[order][:, order], damp),
                order,
            )
        return self.made[damp, act_order]
