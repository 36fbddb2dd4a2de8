"""Layer-wise adaptive rates for large batches: LAMB (You et al. 2020, algorithm 2) and LARS (You, Gitman & Ginsburg 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def trust_ratios(weights: list[Tensor], updates: list[Tensor], largest: float) -> list[Tensor]:
    """phi(|w|) / |u| per tensor with phi(z) = min(z, largest); 1 where either norm is zero. Scalars of the weights' dtype."""
    ratios = []
    for weight, update in zip(torch._foreach_norm(weights), torch._foreach_norm(updates), strict=True):
        ratio = weight.clamp(max=largest) / update
        ratios.append(torch.where((weight > 0) & (update > 0), ratio, torch.ones_like(ratio)))
    return ratios


class LAMB(Optimizer):
    """Adam's direction, scaled per tensor to the size of the weights.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  r = m_hat / (sqrt(v_hat) + eps);  u = r + wd w
    w <- w - lr phi(|w|) / |u| u, phi(z) = min(z, largest), ratio 1 when a norm is 0.

    `state[p]["trust_ratio"]` holds the last ratio of each tensor. bias_correction=False gives the variant of the authors' code.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
                 weight_decay: float = 0.01, largest: float = 10.0, bias_correction: bool = True) -> None:  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, largest=largest, bias_correction=bias_correction))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            grads = [p.grad for p in weights]
            for p in weights:
                if not self.state[p]:
                    self.state[p] = {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p]["step"] += 1
            first, second = ([self.state[p][k] for p in weights] for k in ("exp_avg", "exp_avg_sq"))
            (beta1, beta2), t = group["betas"], self.state[weights[0]]["step"]
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            c1, c2 = (1 - beta1**t, 1 - beta2**t) if group["bias_correction"] else (1.0, 1.0)
            updates = list(torch._foreach_sqrt(second))
            # m / c1 / (sqrt(v / c2) + eps) = m * (sqrt(c2) / c1) / (sqrt(v) + eps sqrt(c2))
            torch._foreach_add_(updates, group["eps"] * c2**0.5)
            torch._foreach_reciprocal_(updates)
            torch._foreach_mul_(updates, first)
            torch._foreach_mul_(updates, c2**0.5 / c1)
            if group["weight_decay"]:
                torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
            ratios = trust_ratios(weights, updates, group["largest"])
            torch._foreach_mul_(updates, ratios)
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
            for p, ratio in zip(weights, ratios, strict=True):
                self.state[p]["trust_ratio"] = ratio
        return loss


class LARS(Optimizer):
    """Momentum SGD whose step is scaled per tensor to the size of the weights.

    u = g + wd w;  m <- momentum m + lr eta |w| / (|g| + wd |w|) u;  w <- w - m. Ratio 1 when a norm is 0.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1.0, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            grads = [p.grad for p in weights]
            for p in weights:
                if not self.state[p]:
                    self.state[p] = {"momentum": torch.zeros_like(p)}
            momenta = [self.state[p]["momentum"] for p in weights]
            decay = group["weight_decay"]
            rates = []
            for p, w, g in zip(weights, torch._foreach_norm(weights), torch._foreach_norm(grads), strict=True):
                ratio = torch.where((w > 0) & (g > 0), group["trust"] * w / (g + decay * w), torch.ones_like(w))
                self.state[p]["trust_ratio"] = ratio
                rates.append(ratio * group["lr"])
            updates = torch._foreach_add(grads, weights, alpha=decay)
            torch._foreach_mul_(updates, rates)
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_sub_(weights, momenta)
        return loss
