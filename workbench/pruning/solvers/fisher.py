"""oBERT: optimal brain surgery with a block-diagonal empirical Fisher
(Kurtic et al. 2022; Singh and Alistarh 2020).

    F = damp I + (1/m) sum_k g_k g_k^T,  kept in blocks of about 50 consecutive weights of one row
    saliency of a group Q of a block:      rho_Q = 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q            (eq. 3)
    update of the survivors S of a block:  F_SS delta_S = F_SQ w_Q                           (eq. 4)

The update is solved jointly for everything removed from a block; for one weight it is -w_q F^-1[:,
q] / [F^-1]_qq. The blocks of a chunk of rows are formed, factorised and used together, so memory holds one
chunk of one layer. Fisher blocks and their inverses are the kernels' (`kernels.sparse.block_fisher`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.kernels.sparse.block_fisher import block_fisher, block_fisher_inverse
from workbench.pruning.pattern import NM, Tiles
from workbench.statistics import GradientFactors, StackedGradients

Gradients = GradientFactors | StackedGradients
CHUNK = 4 << 20  # floats of gradients formed at once: few enough to stay near the processor


def block_width(inputs: int, block: int) -> int:
    """The largest divisor of the row length in (block / 2, block], else `block` itself
    (the last block is then padded).
    """
    for width in range(min(block, inputs), block // 2, -1):
        if inputs % width == 0:
            return width
    return min(block, inputs)


def chunks(rows: int, inputs: int, examples: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // (inputs * examples))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def gradient_rows(gradients: Gradients, start: int, stop: int, width: int) -> Tensor:
    """Gradients of rows start..stop side by side, (examples, weights), each row filled with zeros up to
    a multiple of the block's width.
    """
    g = gradients.rows(start, stop)  # (examples, rows, in)
    if rest := -g.shape[-1] % width:  # padding by nothing would copy
        g = F.pad(g, (0, rest))
    return g.flatten(1)


def blocked(matrix: Tensor, width: int) -> Tensor:
    """(rows, in) -> (blocks, width), padded like `gradient_rows`."""
    return F.pad(matrix, (0, -matrix.shape[-1] % width)).reshape(-1, width)


def unblocked(blocks: Tensor, inputs: int, width: int) -> Tensor:
    """The inverse of `blocked`."""
    return blocks.reshape(-1, -(-inputs // width) * width)[:, :inputs]


def like_gradients(weight: Tensor, gradients: Gradients) -> Tensor:
    """The weight in float64 where the gradients are, else in float32."""
    return weight.double() if gradients.rows(0, 1).dtype == torch.float64 else weight.float()


def absolute_damp(gradients: list[Gradients], weights: int, fraction: float) -> float:
    """`fraction` of the mean diagonal of the empirical Fisher over all the weights pruned together."""
    trace = sum(g.square_sum() / g.examples for g in gradients)
    return max(fraction * trace / weights, torch.finfo(torch.float32).tiny * 1e8)


def greedy_costs(weight: Tensor, inverse: Tensor) -> Tensor:
    """Remove weights one by one inside each block, always the cheapest, with exact updates;
    the cost at each removal.

    weight (blocks, B), inverse (blocks, B, B), overwritten. Returns (blocks, B): the running maximum of
    w_q^2 / (2 [F^-1]_qq) at the removal of q, so any threshold cuts a prefix of the removal order of every
    block.
    """
    weight = weight.clone()
    blocks, width = weight.shape
    index = torch.arange(blocks, device=weight.device)
    cost, alive = torch.zeros_like(weight), torch.ones_like(weight, dtype=torch.bool)
    top = weight.new_zeros(blocks)
    for _ in range(width):
        diagonal = inverse.diagonal(dim1=-2, dim2=-1)
        rho = torch.where(alive, weight.square() / diagonal.clamp_min(1e-30), torch.inf)
        best, q = rho.min(-1)
        top = torch.maximum(top, best / 2)
        cost[index, q] = top
        alive[index, q] = False
        column = inverse[index, :, q]  # (blocks, B)
        pivot = column[index, q].clamp_min(1e-30)
        weight.addcmul_(column, (-weight[index, q] / pivot)[:, None])
        weight.masked_fill_(~alive, 0)
        inverse.baddbmm_((column / pivot[:, None])[:, :, None], column[:, None, :], alpha=-1)
        inverse[index, q, q] = 1  # removed: never read again, kept away from zero
    return cost


def saliency(weight: Tensor, gradients: Gradients, damp: float, block: int, greedy: bool = False) -> Tensor:
    """rho of every single weight, (rows, in); `greedy` updates each block after each removal
    (see `greedy_costs`).
    """
    weight = like_gradients(weight, gradients)
    inputs = weight.shape[-1]
    width = block_width(inputs, block)
    found = torch.empty_like(weight)
    for start, stop in chunks(len(weight), inputs, gradients.examples):
        inverse = block_fisher_inverse(gradient_rows(gradients, start, stop, width), width, damp)
        w = blocked(weight[start:stop], width)
        if greedy:
            parts = zip(w.split(256), inverse.split(256), strict=True)  # small enough to stay in cache
            rho = torch.cat([greedy_costs(a, b) for a, b in parts])
        else:
            rho = w.square() / (2 * inverse.diagonal(dim1=-2, dim2=-1))
        found[start:stop] = unblocked(rho, inputs, width)
    return found


def nm_scores(weight: Tensor, gradients: Gradients, damp: float, block: int, pattern: NM) -> Tensor:
    """Scores whose N:M mask is the exact one: in each M-group,
    the joint rho_Q of every possible set of removals is compared.

    The cheapest set gets rho 0, the rest 1. Needs a block width that M divides; groups run along the inputs.
    """
    weight = like_gradients(weight, gradients)
    inputs, of, drop = weight.shape[-1], pattern.of, pattern.of - pattern.keep
    width = block_width(inputs, max(block // of * of, of))
    width = width if width % of == 0 else max(block // of * of, of)
    sets = torch.tensor(list(combinations(range(of), drop)), device=weight.device)  # (sets, drop)
    found = torch.empty_like(weight)
    for start, stop in chunks(len(weight), inputs, gradients.examples):
        inverse = block_fisher_inverse(gradient_rows(gradients, start, stop, width), width, damp)
        w = blocked(weight[start:stop], width).unflatten(-1, (-1, of))  # (blocks, groups, M)
        tiles = (
            inverse.unflatten(-1, (-1, of))
            .unflatten(-3, (-1, of))
            .diagonal(dim1=1, dim2=3)
            .permute(0, 3, 1, 2)
        )  # (blocks, groups, M, M)
        inside = tiles[..., sets[:, :, None], sets[:, None, :]]  # (blocks, groups, sets, drop, drop)
        wq = w[..., sets]  # (blocks, groups, sets, drop)
        rho = (wq * torch.linalg.solve(inside, wq.unsqueeze(-1)).squeeze(-1)).sum(-1) / 2
        chosen = sets[rho.argmin(-1)]  # (blocks, groups, drop)
        scores = torch.ones_like(w).scatter_(-1, chosen, 0.0)
        found[start:stop] = unblocked(scores.flatten(1), inputs, width)
    return found


def tile_scores(weight: Tensor, gradients: Gradients, damp: float, block: int, pattern: Tiles) -> Tensor:
    """Scores whose sums over tiles are the tiles' joint rho_Q; a tile's is spread evenly over its weights.

    Rows of a tile lie in different blocks of F, so its rho_Q is the sum of those of its rows. Needs rows that
    the tiles' columns divide; blocks of F are the multiple of the columns next to `block`.
    """
    weight = like_gradients(weight, gradients)
    inputs, columns = weight.shape[-1], pattern.columns
    width = max(block // columns, 1) * columns
    found = torch.empty_like(weight)
    for start, stop in chunks(len(weight), inputs, gradients.examples):
        inverse = block_fisher_inverse(gradient_rows(gradients, start, stop, width), width, damp)
        w = blocked(weight[start:stop], width).unflatten(-1, (-1, columns))  # (blocks, groups, C)
        inside = (
            inverse.unflatten(-1, (-1, columns))
            .unflatten(-3, (-1, columns))
            .diagonal(dim1=1, dim2=3)
            .permute(0, 3, 1, 2)
        )  # (blocks, groups, C, C)
        rho = (w * torch.linalg.solve(inside, w.unsqueeze(-1)).squeeze(-1)).sum(-1, keepdim=True) / 2
        scores = (rho / columns).expand_as(w)
        found[start:stop] = unblocked(scores.flatten(1), inputs, width)
    return found


def update(weight: Tensor, mask: Tensor, gradients: Gradients, damp: float, block: int) -> Tensor:
    """The pruned weight (rows, in) with the survivors' joint optimal update, block by block."""
    dtype, weight = weight.dtype, like_gradients(weight, gradients)
    inputs = weight.shape[-1]
    width = block_width(inputs, block)
    found = torch.empty_like(weight)
    for start, stop in chunks(len(weight), inputs, gradients.examples):
        w, keep = blocked(weight[start:stop], width), blocked(mask[start:stop].to(weight.dtype), width)
        fisher = block_fisher(gradient_rows(gradients, start, stop, width), width, damping=damp)
        rhs = keep * torch.bmm(fisher, (w * (1 - keep)).unsqueeze(-1)).squeeze(-1)
        fisher *= keep[:, :, None] * keep[:, None, :]
        fisher.diagonal(dim1=-2, dim2=-1).add_(damp * (1 - keep))
        scale = (
            1 / damp
        )  # entries near 1e-9 underflow nothing, but keep the factorisation away from denormals
        delta = torch.cholesky_solve(
            (rhs * scale).unsqueeze(-1), torch.linalg.cholesky(fisher * scale)
        ).squeeze(-1)
        found[start:stop] = unblocked((w + delta) * keep, inputs, width)
    return found.to(dtype)
