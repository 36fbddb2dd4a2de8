"""Masks that are chosen while training: every forward pass turns scores into a mask,
and gradients go straight through the choice.

    W' = W * M,  M = choice(scores)
    dL/dscores = dL/dW' * W                          (so a score shared by a block gets the block's sum)
    dL/dW = dL/dW' * M                               (`through` False: only what is kept learns), or
    dL/dW = dL/dW' + decay (1 - M) * W
        (`through` True: what is pruned learns too, and is pulled towards zero)

The first rule is movement pruning's (Sanh et al. 2020, eq. 4), the last one SR-STE's (Zhou et al. 2021,
eq. 9). A method says what its scores are and how they are compared; when training ends the mask in force
becomes a plain `Mask`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function

from workbench.pruning.pattern import NM, Tiles, expand, make_mask, parse
from workbench.subjects import Change, Layer, Mask


class Choose(Function):
    """weight * mask with the gradients of this module's docstring; all tensors are (..., out, in)."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor, through: bool, decay: float
    ) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.through, ctx.decay = through, decay
        return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grown,) = upstream
        weight, mask = ctx.saved_tensors
        to_scores = grown * weight if ctx.needs_input_grad[1] else None
        to_weight = (
            grown + ctx.decay * torch.where(mask, 0.0, weight)
            if ctx.through
            else torch.where(mask, grown, 0.0)
        )
        return to_weight, to_scores, None, None, None


class Selection(Change):
    """A mask chosen anew at every use of the weight. Subclasses say what the scores are and, if not by rank,
    how they choose.
    """

    order = 90
    through: ClassVar[bool] = False
    decay: float = 0.0

    def __init__(self, pattern: str = "unstructured", sparsity: float = 0.5) -> None:
        super().__init__()
        self.pattern, self.sparsity = pattern, sparsity

    def scores(self, weight: Tensor) -> Tensor:
        """Scores (..., out, in) of a weight (..., out, in); larger stays."""
        raise TypeError(f"{type(self).__name__} has no scores()")

    def choice(self, scores: Tensor) -> Tensor:
        """The mask (..., out, in) for scores: the smallest share of the pattern's units goes."""
        form = parse(self.pattern)
        assert isinstance(form, (Tiles, NM)), "a selection is made inside one matrix"
        return make_mask(scores.detach(), form, self.sparsity)

    def mask_of(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return self.choice(self.scores(weight))

    def change(self, weight: Tensor) -> Tensor:
        scores = self.scores(weight)
        return Choose.apply(weight, scores, self.choice(scores), self.through, self.decay)

    def config(self) -> dict[str, Any]:
        return {"pattern": self.pattern, "sparsity": self.sparsity}


class AdaptiveMask(Selection):
    """The mask follows the weights: scores |w| times `norm`, the inputs' root mean square or ones
    (Huang et al. 2024, AST).
    """

    through = True
    norm: Tensor

    def __init__(self, norm: Tensor, pattern: str = "2:4", sparsity: float = 0.5) -> None:
        super().__init__(pattern, sparsity)
        self.register_buffer("norm", norm)  # (in,) or (experts, 1, in)

    def scores(self, weight: Tensor) -> Tensor:
        return weight.detach().abs() * self.norm


class MovementScores(Selection):
    """Movement pruning (Sanh et al. 2020): a trained score for every weight, which starts at zero and falls
    by lr dL/dW' W, for what is pruned as well, so that it can come back.
    """

    def __init__(self, score: Tensor, pattern: str = "unstructured", sparsity: float = 0.5) -> None:
        super().__init__(pattern, sparsity)
        self.score = score if isinstance(score, nn.Parameter) else nn.Parameter(score)

    def scores(self, weight: Tensor) -> Tensor:
        return self.score


class Gates(Selection):
    """Block movement pruning (Lagunas et al. 2021): a trained score S for every tile,
    which stays while sigmoid(S) > threshold.

    score : (tile rows, tile columns). With `turned` the score belongs to another matrix and is read
        transposed, so that a neuron's row in one matrix and its column in the next have one score between
        them.
    """

    def __init__(
        self, score: Tensor, rows: int = 1, columns: int = 1, threshold: float = 0.5, turned: bool = False
    ) -> None:
        super().__init__()
        self.score = score if isinstance(score, nn.Parameter) else nn.Parameter(score)
        self.tiles, self.threshold, self.turned = Tiles(rows, columns), threshold, turned

    def scores(self, weight: Tensor) -> Tensor:
        units = self.score.mT if self.turned else self.score
        return expand(units, self.tiles, tuple(weight.shape))

    def choice(self, scores: Tensor) -> Tensor:
        return scores.detach().sigmoid() > self.threshold

    def expected(self, shape: tuple[int, ...]) -> Tensor:
        """Sum of sigmoid(S) over the weights of a matrix (..., out, in): what the penalty pulls down."""
        units = self.score.mT if self.turned else self.score
        return expand(units.sigmoid(), self.tiles, shape).sum()

    def config(self) -> dict[str, Any]:
        return {
            "rows": self.tiles.rows,
            "columns": self.tiles.columns,
            "threshold": self.threshold,
            "turned": self.turned,
        }


class LowRankScores(Selection):
    """PST (Li et al. 2022): scores |w| + a1 A B + a2 (R + C), of which only A (out, rank), B (rank, in), R
    (out, 1), C (1, in) are trained.

    |w| is data-free and lets no gradient through; the rest stands for movement's accumulated -dL/dw w, whose
    large entries lie in few rows and columns and whose remainder is nearly of low rank (section 3.2).
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        row: Tensor,
        column: Tensor,
        pattern: str = "unstructured",
        sparsity: float = 0.5,
        inner: float = 1.0,
        lines: float = 1.0,
    ) -> None:
        super().__init__(pattern, sparsity)
        self.left, self.right, self.row, self.column = (nn.Parameter(t) for t in (left, right, row, column))
        self.inner, self.lines = inner, lines

    def scores(self, weight: Tensor) -> Tensor:
        return (
            weight.detach().abs()
            + self.inner * (self.left @ self.right)
            + self.lines * (self.row + self.column)
        )

    def config(self) -> dict[str, Any]:
        return super().config() | {"inner": self.inner, "lines": self.lines}


def selection_of(layer: Layer) -> Selection | None:
    """The layer's trained or adaptive mask, None when it has none."""
    return next((c for c in layer.changes if isinstance(c, Selection)), None)


def beneath(layer: Layer, selection: Selection) -> Tensor:
    """The weight (..., out, in) that the selection sees: after low-rank terms and number formats."""
    stored = layer.original.detach()
    weight = stored.mT if layer.transposed else stored
    for change in layer.changes:
        if change is selection:
            return weight
        weight = change.change(weight)
    return weight


@torch.no_grad()
def mask_in_force(layer: Layer) -> Tensor | None:
    """The mask (..., out, in) that a layer's weight goes through now; None without one."""
    for change in layer.changes:
        if isinstance(change, Selection):
            return change.mask_of(beneath(layer, change))
        if isinstance(change, Mask):
            return change.mask
    return None


@torch.no_grad()
def freeze(layer: Layer) -> None:
    """Replace a selection by the mask it has come to."""
    selection = selection_of(layer)
    if selection is None:
        return
    mask = selection.mask_of(beneath(layer, selection)).contiguous()
    layer.detach(selection)
    layer.attach(Mask(mask))
