"""Exact answers for a few weights, to judge the approximations by:
brute force and the full OBS path of a quadratic.

The quadratic is L(v) = 1/2 (v - w)^T H (v - w): its minimum w is the dense weight,
and a pruned weight may be refitted.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from workbench.errors import BadInput

LIMIT = 20  # 2^20 subsets


def refit(weight: Tensor, hessian: Tensor, kept: Tensor) -> tuple[Tensor, float]:
    """The best weight with zeros outside `kept` and its loss: H_KK v_K = H_K: w.
    weight (n,), hessian (n, n), kept bool (n,).
    """
    found = torch.zeros_like(weight)
    index = kept.nonzero().flatten()
    if len(index):
        found[index] = torch.linalg.solve(hessian[index][:, index], hessian[index] @ weight)
    delta = found - weight
    return found, float(delta @ hessian @ delta) / 2


def best_subset(weight: Tensor, hessian: Tensor, keep: int, update: bool = True) -> tuple[Tensor, float]:
    """The mask of `keep` weights with the smallest loss by trying all of them,
    with or without refitting the survivors.
    """
    n = len(weight)
    if n > LIMIT:
        raise BadInput(f"weight: {n} weights have too many subsets to try; at most {LIMIT} are accepted")
    best: tuple[Tensor, float] | None = None
    for chosen in combinations(range(n), keep):
        mask = torch.zeros(n, dtype=torch.bool, device=weight.device)
        mask[list(chosen)] = True
        delta = weight * mask - weight
        loss = refit(weight, hessian, mask)[1] if update else float(delta @ hessian @ delta) / 2
        if best is None or loss < best[1]:
            best = mask, loss
    assert best is not None
    return best


def obs_path(weight: Tensor, hessian: Tensor) -> list[tuple[int, float]]:
    """Remove all weights one by one, always the one with the smallest w_q^2 / [H^-1]_qq, updating the rest
    (Hassibi and Stork 1993).

    Returns (weight removed, loss after it), in order.
    """
    inverse, w, path, loss = torch.linalg.inv(hessian), weight.clone(), [], 0.0
    alive = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    for _ in range(len(weight)):
        cost = torch.where(alive, w.square() / inverse.diagonal(), torch.inf)
        q = int(cost.argmin())
        loss += float(cost[q]) / 2
        w = w - inverse[:, q] * (w[q] / inverse[q, q])
        inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        inverse[q, q] = 1.0
        alive[q] = False
        w[~alive] = 0
        path.append((q, loss))
    return path
