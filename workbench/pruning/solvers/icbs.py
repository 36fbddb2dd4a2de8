"""Mask refinement by block coordinate descent: the combinatorial brain surgeon solved a block at a time
(iCBS, Rosenberg et al. 2024).

With x_i = 1 for a removed weight (dw_i = -w_i x_i) and the empirical Fisher of m gradients as the Hessian,
the predicted loss is

    q(x) = sum_i (-gbar_i w_i + damp w_i^2 / 2) x_i + 1/(2m) sum_k (sum_i g_ki w_i x_i)^2,

a quadratic over 0/1 vectors with a fixed number of ones. A block of candidates near the keep / remove
boundary is improved by swaps, everything else held fixed; then the next block. Only improvements are taken,
so q never rises. (The authors anneal each block; here a block is brought to a swap optimum by steepest
descent, and again from `restarts` annealed masks, of which the best is taken.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.pruning.solvers.fisher import Gradients, chunks


def objective(interactions: Tensor, linear: Tensor, removed: Tensor) -> Tensor:
    """q for a 0/1 vector: linear . x + x^T Q x / 2. interactions (n, n), linear (n,), removed (n,) float."""
    return linear @ removed + removed @ interactions @ removed / 2


def swap_descent(interactions: Tensor, linear: Tensor, removed: Tensor, limit: int = 1000) -> Tensor:
    """Take the best swap of a removed and a kept weight until none lowers q. Returns the new 0/1 vector."""
    x = removed.clone()
    field = interactions @ x + linear
    diagonal = interactions.diagonal()
    for _ in range(limit):
        inside, outside = x.nonzero().flatten(), (1 - x).nonzero().flatten()
        if not len(inside) or not len(outside):
            break
        gain_in = field[outside] + diagonal[outside] / 2  # remove i
        gain_out = -field[inside] + diagonal[inside] / 2  # bring j back
        change = gain_in[:, None] + gain_out[None, :] - interactions[outside][:, inside]
        best = int(change.argmin())
        i, j = outside[best // len(inside)], inside[best % len(inside)]
        if float(change.flatten()[best]) >= -1e-12 * float(diagonal.max()):
            break
        x[i], x[j] = 1, 0
        field += interactions[:, i] - interactions[:, j]
    return x


def solve_block(
    interactions: Tensor, linear: Tensor, removed: Tensor, restarts: int, generator: torch.Generator
) -> Tensor:
    """The best of a descent from the present mask and of descents from annealed starts with as many ones."""
    best = swap_descent(interactions, linear, removed)
    value = objective(interactions, linear, best)
    for _ in range(restarts):
        start = anneal(interactions, linear, best, generator)
        other = swap_descent(interactions, linear, start)
        found = objective(interactions, linear, other)
        if found < value:
            best, value = other, found
    return best


def anneal(
    interactions: Tensor, linear: Tensor, removed: Tensor, generator: torch.Generator, sweeps: int = 4
) -> Tensor:
    """Random swaps accepted with probability exp(-change / T),
    T falling geometrically from the typical change to a hundredth of it.
    """
    x = removed.clone()
    field = interactions @ x + linear
    diagonal = interactions.diagonal()
    steps = sweeps * len(x)
    top = float((field.abs() + diagonal / 2).median()) + 1e-30
    draws = torch.rand(steps, 3, generator=generator).tolist()
    for step, (a, b, c) in enumerate(draws):
        inside, outside = x.nonzero().flatten(), (1 - x).nonzero().flatten()
        if not len(inside) or not len(outside):
            break
        i, j = outside[int(a * len(outside))], inside[int(b * len(inside))]
        change = float(field[i] - field[j] + diagonal[i] / 2 + diagonal[j] / 2 - interactions[i, j])
        temperature = top * 0.01 ** (step / steps)
        if change <= 0 or c < torch.exp(torch.tensor(-change / temperature)):
            x[i], x[j] = 1, 0
            field += interactions[:, i] - interactions[:, j]
    return x


def refine(
    weight: Tensor,
    mask: Tensor,
    scores: Tensor,
    gradients: Gradients,
    damp: float,
    *,
    block: int = 256,
    candidates: int = 4096,
    rounds: int = 2,
    restarts: int = 0,
    slope: bool = False,
    seed: int = 0,
) -> tuple[Tensor, list[float]]:
    """Improve a layer's mask (rows, in), True = keep, without changing how many it keeps.

    Candidates are the weights whose scores are nearest to the boundary between kept and removed. Returns
    the new mask and q after each block. Without `slope` the first-order term is left out, as at a minimum:
    a mean gradient that is not zero would otherwise be followed far beyond where it holds, layer by layer.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = torch.promote_types(weight.dtype, torch.float32)
    weight = weight.to(kind)
    flat, gone = scores.flatten(), ~mask.flatten()
    low, high = flat[gone], flat[~gone]
    if not len(low) or not len(high):
        return mask, []
    half = min(candidates // 2, len(low), len(high))
    where = torch.cat(
        [
            gone.nonzero().flatten()[low.topk(half).indices],
            (~gone).nonzero().flatten()[high.topk(half, largest=False).indices],
        ]
    )
    found = torch.empty(gradients.examples, len(where), device=weight.device, dtype=kind)
    fixed = torch.zeros(gradients.examples, device=weight.device, dtype=kind)
    row, column = where // weight.shape[1], where % weight.shape[1]
    for start, stop in chunks(len(weight), weight.shape[1], gradients.examples):
        g = gradients.rows(start, stop).to(kind)
        fixed += torch.einsum("kri,ri->k", g, weight[start:stop] * ~mask[start:stop])
        mine = ((row >= start) & (row < stop)).nonzero().flatten()
        found[:, mine] = g[:, row[mine] - start, column[mine]]
    w = weight.flatten()[where]
    moved = (found * w).double()  # (m, candidates): g_ki w_i
    m = len(moved)
    linear = damp * w.double().square() / 2
    if slope:
        linear = linear - moved.mean(0)
    x = gone[where].double()
    total = fixed.double()  # sum over all removed weights of g_ki w_i
    values = []
    for _ in range(rounds):
        order = torch.randperm(len(where), generator=generator).to(weight.device)
        for part in order.split(block):
            a = moved[:, part]
            outside = total - a @ x[part]
            interactions = a.T @ a / m
            new = solve_block(interactions, linear[part] + a.T @ outside / m, x[part], restarts, generator)
            x[part] = new
            total = outside + a @ new
            values.append(float(linear @ x + total.square().sum() / (2 * m)))
    result = mask.flatten().clone()
    result[where] = x == 0
    return result.reshape(mask.shape), values
