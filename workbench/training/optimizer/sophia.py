"""Sophia (Liu et al. 2023, algorithm 3): momentum over a clipped diagonal of the Hessian,
estimated every few steps by Hutchinson.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.axis import parameter
from workbench.curvature.operators.attention import twice_differentiable
from workbench.training.optimizer.group_optimizer import GroupOptimizer, divide_into
from workbench.training.optimizer.optimizers import OPTIMIZER, MomentOptions, decay_groups

if TYPE_CHECKING:
    from workbench.training.loop import Training


class Sophia(GroupOptimizer):
    """m <- b1 m + (1 - b1) g;  every `every` steps h <- b2 h + (1 - b2) u * (H u), u of random signs
    w <- (1 - lr wd) w;  w <- w - lr clip(m / max(gamma h, eps), 1), elementwise.

    `fit` calls `prepare`, which estimates on the first `examples` of the batch in use; another loop calls
    `estimate(loss)`. Where h is not positive the step is the sign of m, as the authors mean it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        every: int = 10,
        examples: int = 32,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, gamma=gamma, eps=eps, weight_decay=weight_decay))
        self.every, self.examples = every, examples

    def prepare(self, run: Training) -> None:
        if run.step % self.every == 0:
            self.estimate(lambda: run.subject.loss(run.batch(self.examples)))

    def estimate(self, loss: Callable[[], Tensor]) -> None:
        """One Hutchinson probe of the Hessian's diagonal of `loss()`, into the average."""
        weights = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        with torch.enable_grad(), twice_differentiable():
            found = torch.autograd.grad(loss(), weights, create_graph=True, allow_unused=True)
            used = [(w, g) for w, g in zip(weights, found, strict=True) if g is not None and g.requires_grad]
            probes = [torch.randint(0, 2, w.shape, device=w.device).to(w.dtype) * 2 - 1 for w, _ in used]
            products = torch.autograd.grad(
                [g for _, g in used], [w for w, _ in used], probes, allow_unused=True
            )
        self.average(
            [w for w, _ in used],
            [torch.zeros_like(u) if h is None else u * h for u, h in zip(probes, products, strict=True)],
        )

    @torch.no_grad()
    def average(self, weights: Sequence[Tensor], diagonals: Sequence[Tensor]) -> None:
        """h <- b2 h + (1 - b2) diagonal for each weight."""
        share = {id(p): 1 - group["betas"][1] for group in self.param_groups for p in group["params"]}
        for h, weight, diagonal in zip(self.kept("hessian", list(weights)), weights, diagonals, strict=True):
            h.lerp_(diagonal, share[id(weight)])

    def update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        first, diagonal = self.kept("exp_avg", weights), self.kept("hessian", weights)
        torch._foreach_lerp_(first, gradients, 1 - group["betas"][0])
        updates = list(torch._foreach_mul(diagonal, group["gamma"]))
        torch._foreach_clamp_min_(updates, group["eps"])
        divide_into(updates, first)
        torch._foreach_clamp_min_(updates, -1.0)
        torch._foreach_clamp_max_(updates, 1.0)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(weights, updates, alpha=group["lr"])


class SophiaOptions(MomentOptions):
    betas: tuple[float, float] = parameter(
        (0.96, 0.99), "decay of the averages of gradients and of the Hessian's diagonal, each in [0, 1)"
    )
    gamma: float = parameter(0.01, "scale of the diagonal; smaller clips more coordinates", gt=0)
    eps: float = parameter(1e-12, "smallest scaled curvature", gt=0)
    every: int = parameter(10, "steps between two estimates of the diagonal", ge=1, unit="steps")
    examples: int = parameter(32, "examples of the batch that an estimate uses", ge=1, unit="examples")


@OPTIMIZER.add(
    "sophia",
    formula="w <- (1 - lr wd) w - lr clip(m / max(gamma h, eps), 1), h a Hutchinson diagonal",
    source="Liu et al. 2023",
    options=SophiaOptions,
)
def sophia(model: nn.Module, learning_rate: float, weight_decay: float, options: SophiaOptions) -> Optimizer:
    return Sophia(
        decay_groups(model, weight_decay),
        lr=learning_rate,
        betas=options.betas,
        gamma=options.gamma,
        eps=options.eps,
        every=options.every,
        examples=options.examples,
    )
