"""The middle of J^T S J: what each Gauss-Newton or Fisher matrix does in the space of the model's outputs.

With z_n the outputs of item n (one row of `Task.flat`), J_n = dz_n/dw and losses l_n, every one of them is
(1/N) sum_n J_n^T S_n J_n with (Martens 2020, sections 8 to 11; Kunstner, Balles and Hennig 2019)

    ggn               S_n = d2 l_n / dz_n2; cross-entropy: diag(p) - p p^T, half squared error: I
    empirical-fisher  S_n = g_n g_n^T, g_n = dl_n/dz_n at the true target; cross-entropy: p - onehot(y)
    mc-fisher         S_n = mean over samples y ~ p(y | z_n) of g g^T; its expectation is the GGN for these
                      losses

The classes below apply the block-diagonal S to (items, outputs) matrices as a *sum* over items;
the operator divides by N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import BadInput
from workbench.subjects import Batch, Task

KINDS = ("hessian", "ggn", "empirical-fisher", "mc-fisher")


def check_kind(kind: str, task: Task) -> None:
    """`BadInput` for an unknown operator or one that the task's loss does not define."""
    if kind not in KINDS:
        raise BadInput(f"operator: {kind!r} is unknown; known: {', '.join(KINDS)}")
    if kind == "mc-fisher" and task.loss_kind == "other":
        raise BadInput(
            "operator: mc-fisher draws targets from the model's own distribution, "
            "which this custom loss does not define; use ggn or hessian"
        )


class OutputCurvature:
    """S for one micro-batch. `rows` is the (items, outputs) tensor of the graph that J belongs to."""

    def __init__(
        self, kind: str, task: Task, output: Tensor, batch: Batch, draws: Tensor | None = None
    ) -> None:
        self.kind, self.task, self.batch = kind, task, batch
        self.scale = float(task.items(batch))  # a mean loss over this micro-batch, as a sum
        if task.loss_kind == "other":
            self.rows = output
            self.output = output.detach().requires_grad_(True)
            self.factors = self._example_gradients() if kind == "empirical-fisher" else None
            return
        self.rows, targets = task.flat(output, batch)
        z = self.rows.detach()
        if task.loss_kind == "cross_entropy":
            self.p = z.softmax(-1)
            if kind == "empirical-fisher":
                factors = (self.p - torch.nn.functional.one_hot(targets, z.shape[-1]))[None]
            elif kind == "mc-fisher":
                assert draws is not None  # (items, samples) uniform numbers: inverse transform sampling
                cumulated = self.p.cumsum(-1)
                sampled = torch.searchsorted(cumulated, draws.to(cumulated) * cumulated[:, -1:]).clamp_max(
                    z.shape[-1] - 1
                )  # (items, samples)
                factors = self.p - torch.nn.functional.one_hot(sampled.T, z.shape[-1])
            else:
                factors = None
        elif kind == "empirical-fisher":
            factors = (z - targets)[None]
        elif kind == "mc-fisher":
            assert draws is not None  # (items, samples, outputs) uniform numbers
            factors = torch.special.ndtri(draws.to(z)).movedim(1, 0)
        else:
            factors = None
        self.factors = None if factors is None else factors.to(z.dtype)  # (samples, items, outputs)

    def _example_gradients(self) -> Tensor:
        """Gradient of each example's own loss in its outputs, (1, examples, ...)."""
        found = torch.zeros_like(self.output)
        for i in range(len(self.output)):
            one = self.output[i : i + 1].detach().requires_grad_(True)
            loss = self.task.criterion(one, {k: v[i : i + 1] for k, v in self.batch.items()})
            found[i] = torch.autograd.grad(loss, one)[0][0]
        return found[None]

    def __call__(self, tangents: Tensor) -> Tensor:
        """S u for `tangents` u of the shape of `rows`."""
        if self.factors is not None:
            g = self.factors.flatten(2)  # (samples, items, outputs)
            inner = (g * tangents.flatten(1)).sum(-1, keepdim=True)
            return (g * inner).mean(0).reshape(tangents.shape)
        if self.task.loss_kind == "cross_entropy":
            weighted = self.p * tangents
            return weighted - self.p * weighted.sum(-1, keepdim=True)
        if self.task.loss_kind == "squared_error":
            return tangents
        loss = self.task.criterion(self.output, self.batch)
        slope = torch.autograd.grad(loss, self.output, create_graph=True)[0]
        if not slope.requires_grad:
            return torch.zeros_like(tangents)
        return self.scale * torch.autograd.grad(slope, self.output, tangents)[0]


def draw_uniform(
    kind: str, task: Task, batch: Batch, outputs: int, samples: int, generator: torch.Generator
) -> Tensor | None:
    """Uniform numbers for one micro-batch, the same for an item whatever micro-batch it falls in
    (None when not sampling).
    """
    if kind != "mc-fisher":
        return None
    items = task.items(batch)
    shape = (items, samples) if task.loss_kind == "cross_entropy" else (items, samples, outputs)
    return torch.rand(shape, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
