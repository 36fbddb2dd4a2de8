"""GaLore (Zhao et al. 2024): Adam's moments in a low-rank subspace of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def projection(gradient: Tensor, rank: int) -> tuple[Tensor, bool]:
    """The leading `rank` singular vectors of the shorter side: P (shorter, rank) and whether that side is the left one (out)."""
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    on_left = gradient.shape[0] <= gradient.shape[1]
    return (left[:, :rank].contiguous() if on_left else right[:rank].mT.contiguous()), on_left


class GaLore(Optimizer):
    """R = P^T G;  N = Adam(R);  w <- w - lr (alpha P N + wd w), with P refreshed from the gradient's SVD every `refresh` steps.

    Matrices (out, in) with both sides above `rank` are projected on their shorter side, the rest is plain AdamW. State of an (m, n)
    matrix, m <= n: 2 n r for the moments and m r for P, where Adam keeps 2 m n. Moments are kept across refreshes, as the authors do.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
                 rank: int = 32, refresh: int = 200, alpha: float = 0.25) -> None:  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, rank=rank, refresh=refresh, alpha=alpha))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, rank = self.state[p], group["rank"]
        low = p.ndim == 2 and min(p.shape) > rank
        t = state["step"] = state.get("step", 0) + 1
        if low and (t - 1) % group["refresh"] == 0:
            state["projection"], _ = projection(gradient, rank)
        on_left = low and p.shape[0] <= p.shape[1]
        if low:
            basis = state["projection"]
            gradient = basis.mT @ gradient if on_left else gradient @ basis
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        beta1, beta2 = group["betas"]
        first = state["exp_avg"].lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = first / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + group["eps"])
        if low:
            update = group["alpha"] * (basis @ update if on_left else update @ basis.mT)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(update, alpha=group["lr"])
