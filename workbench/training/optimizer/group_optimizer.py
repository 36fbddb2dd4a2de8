"""What every optimizer of this folder shares: closure, gradients, zero state on first use, a step count.
A subclass is its formula.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def evaluated(closure: Callable[[], float] | None) -> float | None:
    """The loss of torch's optional closure, with gradients."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class GroupOptimizer(Optimizer, ABC):
    """`update(group, weights, gradients)` is one step of one parameter group,
    without gradients being recorded.

    weights : the parameters of the group that have a gradient. `group["step"]` counts from 1. An optimizer
        that needs more than gradients (another backward pass, halves of the batch) defines `prepare(run)`,
        which `fit` calls when gradients are complete.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = evaluated(closure)
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                group["step"] = group.get("step", 0) + 1
                self.update(group, weights, [p.grad for p in weights])
        return loss

    @abstractmethod
    def update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        """One step of one group, in place; neither list is empty."""

    def kept(self, name: str, weights: list[Tensor], like: list[Tensor] | None = None) -> list[Tensor]:
        """State tensors `name` of the weights, zeros of the shape of `like` (the weights) when new."""
        for weight, shape in zip(weights, like or weights, strict=True):
            if name not in self.state[weight]:
                self.state[weight][name] = torch.zeros_like(shape)
        return [self.state[weight][name] for weight in weights]


def adam_direction(
    first: list[Tensor],
    second: list[Tensor],
    gradients: list[Tensor],
    betas: tuple[float, float],
    eps: float,
    step: int,
    bias_correction: bool = True,
) -> tuple[list[Tensor], float]:
    """Update both moments in place; new tensors and a scale whose product is m_hat / (sqrt(v_hat) + eps)
    (Kingma & Ba 2015, algorithm 1).

    The scale belongs to the caller's learning rate, which saves a pass over the tensors.
    """
    beta1, beta2 = betas
    torch._foreach_lerp_(first, gradients, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
    c1, c2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    # m / c1 / (sqrt(v / c2) + eps) = m / (sqrt(v) + eps sqrt(c2)) x sqrt(c2) / c1
    direction = list(torch._foreach_sqrt(second))
    torch._foreach_add_(direction, eps * c2**0.5)
    divide_into(direction, first)
    return direction, c2**0.5 / c1


def divide_into(below: list[Tensor], above: list[Tensor]) -> None:
    """below <- above / below, where it lies: on a CPU two passes over memory at hand cost less than one into
    new memory.
    """
    torch._foreach_reciprocal_(below)
    torch._foreach_mul_(below, above)
