"""Linear layer and cross-entropy together, chunk by chunk: the (tokens, vocabulary) logits never exist.

    L = mean_t [ log sum_v exp(z_tv) - (1 - a) z_t,y(t) - a / V sum_v z_tv ],   z = x W^T,
        a the label smoothing
    dz = (softmax(z) - (1 - a) onehot(y) - a / V) / tokens,   dx = dz W,   dW = dz^T x

For each chunk of tokens the logits are one matrix product, a kernel turns them in place into the loss and dz,
and two more products give the chunk's dx and its part of dW: memory is one chunk of logits, arithmetic that
of the plain layer. The gradients are ready when the forward ends; the backward scales them. The second
derivative, along v = (vx, vW, vb), goes through the chunks again (Pearlmutter, 1994):

    zeta = vx W^T + x vW^T + vb,   h = (p zeta - p <p, zeta>) / tokens,   p = softmax(z)
    x: h W + dz vW,   W: h^T x + dz^T vx,   b: sum_t h

Luo et al. (2025, StreamBP); Hsu et al. (2024, Liger).

>>> x, w = torch.randn(10, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
>>> y = torch.randint(0, 50, (10,))
>>> loss = linear_cross_entropy(x, w, y, chunk=4)
>>> bool(torch.allclose(loss, torch.nn.functional.cross_entropy(x @ w.T, y)))
True
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from workbench.errors import BadInput
from workbench.kernels.backend import power_of_two, use_triton
from workbench.kernels.registry import Case, Configuration, Kernel
from workbench.kernels.training.cross_entropy_rows import (
    cross_entropy_row,
    losses_torch,
    places_of_largest,
    rows_torch,
    rows_triton,
    sum_kept,
    widened,
)


@dataclass(frozen=True)
class _Settings:
    """What a loss is beside its tensors. The sum of the tokens' losses is divided by `count`; `autocast` is
    the type that products are made in, None without autocast.
    """

    ignore: int
    smoothing: float
    count: int
    chunk: int
    fused: bool
    autocast: torch.dtype | None

    @property
    def weight(self) -> float:
        return 1.0 / self.count

    def late(self, x: torch.Tensor) -> bool:
        """Whether gradients wait for the upstream scalar: in fp16 those of a mean over many tokens vanish
        unless the loss is scaled up first.
        """
        return torch.float16 in (self.autocast, x.dtype)

    def precision(self, x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(x.device.type, self.autocast)


Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _chunks(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    settings: _Settings,
    weight: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, Gradients]:
    """(sum of the losses, its gradients times `weight` in those of x, w and bias that need one)."""
    wide = widened(x)
    dx = torch.empty_like(x) if needs[0] else None
    dw = db = None
    loss = torch.zeros((), dtype=wide, device=x.device)
    for first in range(0, x.shape[0], settings.chunk):
        rows = slice(first, first + settings.chunk)
        z = F.linear(x[rows], w, bias)  # (chunk, vocabulary): the only logits there are
        if settings.fused:
            losses, z = rows_triton(z, y[rows], settings.ignore, settings.smoothing, weight)
        elif any(needs):
            losses, z = rows_torch(z, y[rows], settings.ignore, settings.smoothing, weight)
        else:
            losses = losses_torch(z, y[rows], settings.ignore, settings.smoothing)
        loss += sum_kept(losses, y[rows] != settings.ignore)
        if dx is not None:
            dx[rows] = z @ w
        if needs[1]:
            part = z.t() @ x[rows]
            dw = part.to(wide) if dw is None else dw.add_(part)
        if needs[2]:
            part = z.to(wide).sum(0)
            db = part if db is None else db.add_(part)
    if needs[1]:
        dw = torch.zeros_like(w) if dw is None else dw.to(w.dtype)
    if needs[2] and bias is not None:
        db = torch.zeros_like(bias) if db is None else db.to(bias.dtype)
    return loss, (dx, dw, db)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        y: torch.Tensor,
        settings: _Settings,
    ) -> torch.Tensor:
        ctx.needs = ctx.needs_input_grad[:3]
        now = (False, False, False) if settings.late(x) else ctx.needs
        loss, gradients = _chunks(x, w, bias, y, settings, settings.weight, now)
        ctx.settings = settings
        ctx.save_for_backward(x, w, bias, y, *gradients)
        return loss / settings.count

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w, bias, y, *gradients = ctx.saved_tensors
        settings, g = ctx.settings, grads[0]
        if settings.late(x):
            with torch.no_grad(), settings.precision(x):
                scale = settings.weight * float(g)
                _, gradients = _chunks(x, w, bias, y, settings, scale, ctx.needs)
            if torch.is_grad_enabled():
                gradients = [None if t is None else t / g.to(t.dtype) for t in gradients]
        if torch.is_grad_enabled():  # somebody will differentiate once more
            return *_Gradients.apply(x, w, bias, g, y, *gradients, settings), None, None
        if settings.late(x):
            return *gradients, None, None
        return *(None if t is None else t * g.to(t.dtype) for t in gradients), None, None


class _Gradients(torch.autograd.Function):
    """The gradients times the upstream scalar g, as a function of x, W, b and g."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        g: torch.Tensor,
        y: torch.Tensor,
        dx: torch.Tensor | None,
        dw: torch.Tensor | None,
        db: torch.Tensor | None,
        settings: _Settings,
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.save_for_backward(x, w, bias, g, y)
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        return tuple(None if t is None else t * g.to(t.dtype) for t in (dx, dw, db))

    @staticmethod
    def backward(
        ctx: Any, vx: torch.Tensor | None, vw: torch.Tensor | None, vb: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        x, w, bias, g, y = ctx.saved_tensors
        settings: _Settings = ctx.settings
        wide, needs = widened(x), ctx.needs_input_grad
        x, w, g = x.to(wide), w.to(wide), g.to(wide)
        bias, vx, vw, vb = (None if t is None else t.to(wide) for t in (bias, vx, vw, vb))
        gx = torch.zeros_like(x) if needs[0] else None
        gw = torch.zeros_like(w) if needs[1] else None
        gb = torch.zeros_like(bias) if needs[2] and bias is not None else None
        along = torch.zeros((), dtype=wide, device=x.device)  # the derivative of the loss along v
        for first in range(0, x.shape[0], settings.chunk):
            rows = slice(first, first + settings.chunk)
            kept = (y[rows] != settings.ignore)[:, None].to(wide) * settings.weight
            p = torch.softmax(F.linear(x[rows], w, bias), 1)
            zeta = torch.zeros_like(p) if vb is None else vb.expand_as(p)
            if vx is not None:
                zeta = zeta + vx[rows] @ w.t()
            if vw is not None:
                zeta = zeta + x[rows] @ vw.t()
            weighted = p * zeta
            h = (weighted - p * weighted.sum(1, keepdim=True)) * kept * g
            labels = torch.where(y[rows] == settings.ignore, 0, y[rows])
            onehot = torch.full_like(labels[:, None], 1, dtype=wide) * (settings.smoothing - 1)
            dz = (p - settings.smoothing / p.shape[1]).scatter_add(1, labels[:, None], onehot) * kept
            along = along + (dz * zeta).sum()
            dz = dz * g
            if gx is not None:
                gx[rows] = h @ w if vw is None else h @ w + dz @ vw
            if gw is not None:
                gw += h.t() @ x[rows] if vx is None else h.t() @ x[rows] + dz.t() @ vx[rows]
            if gb is not None:
                gb += h.sum(0)
        return gx, gw, gb, along if needs[3] else None, *[None] * 5


#: Logits (numbers) that a chunk may have in any case: 1 MB of fp32, which stays in a processor's cache.
LOGITS = 1 << 18


def chunk_of(x: torch.Tensor, vocabulary: int) -> int:
    """Tokens at a time: as many as make their logits as large as x (tokens, width) itself, but at most
    a quarter of all; at least 64, and as many as have `LOGITS` logits.
    """
    vocabulary = max(1, vocabulary)
    fitting = power_of_two(x.numel() // vocabulary)
    return max(64, LOGITS // vocabulary, min(fitting, x.shape[0] // 4))


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    chunk: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Cross-entropy in nats of the logits x W^T + b at `labels`, without the logits;
    differentiable in x, weight and bias.

    x (tokens, width), weight (vocabulary, width), labels (tokens,) int64 with `ignore_index` left out;
    `reduction` "mean" (over the labels kept) or "sum". `chunk` tokens at a time; by default `chunk_of`.
    Computed in fp32 (fp64 for fp64 inputs), returned as a scalar of that type. Twice differentiable.
    With no label kept the mean is 0 and so are the gradients.
    """
    _check(x, weight, labels, ignore_index)
    if reduction not in ("mean", "sum") or not 0 <= label_smoothing < 1:
        raise BadInput(
            f"reduction = {reduction!r}, label_smoothing = {label_smoothing}: "
            "need 'mean' or 'sum', and 0 <= smoothing < 1"
        )
    mean, kind = reduction == "mean", x.device.type
    settings = _Settings(
        ignore_index,
        label_smoothing,
        max(1, int((labels != ignore_index).sum())) if mean else 1,
        chunk or chunk_of(x, weight.shape[0]),
        _fused(x, weight, backend),
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
    )
    return _LinearCrossEntropy.apply(x, weight, bias, labels, settings)


@torch.no_grad()
def linear_cross_entropy_and_hits(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean cross-entropy, number of labels that have the largest logit) in one pass; not differentiable.

    >>> x, w, y = torch.eye(3), torch.eye(3), torch.tensor([0, 1, 0])
    >>> linear_cross_entropy_and_hits(x, w, y)[1]
    tensor(2)
    """
    _check(x, weight, labels, ignore_index)
    chunk = chunk or chunk_of(x, weight.shape[0])
    fused = _fused(x, weight, backend)
    loss = torch.zeros((), dtype=widened(x), device=x.device)
    hits = torch.zeros((), dtype=torch.long, device=x.device)
    for first in range(0, x.shape[0], chunk):
        y = labels[first : first + chunk]
        z = F.linear(x[first : first + chunk], weight, bias)
        hits += (places_of_largest(z) == y).sum()
        losses = (
            rows_triton(z, y, ignore_index, 0.0, 0.0)[0] if fused else losses_torch(z, y, ignore_index, 0.0)
        )
        loss += sum_kept(losses, y != ignore_index)
    return loss / (labels != ignore_index).sum().clamp_min(1), hits


def _fused(x: torch.Tensor, weight: torch.Tensor, backend: str) -> bool:
    return x.dtype != torch.float64 and use_triton(
        "linear_cross_entropy", x.shape[0] * weight.shape[0], x, backend
    )


def _check(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1]:
        raise BadInput(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}: "
            "need (tokens, width), (vocabulary, width), (tokens,)"
        )
    if labels.numel() and not labels.is_cuda:
        kept = labels[labels != ignore_index]
        if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= weight.shape[0]):
            raise BadInput(
                f"labels: {int(kept.min())} to {int(kept.max())}, "
                f"the vocabulary has {weight.shape[0]} entries; mark what to skip with ignore_index"
            )


KERNELS = (
    Kernel(
        "linear_cross_entropy.rows",
        cross_entropy_row,
        tuple(
            Configuration(
                kind,
                {
                    "z_ptr": f"*{kind}",
                    "y_ptr": "*i64",
                    "loss_ptr": "*fp32",
                    "smoothing": "fp32",
                    "weight": "fp32",
                },
                {"BLOCK": 4096},
                warps=8,
            )
            for kind in ("bf16", "fp32")
        ),
    ),
)


def cases() -> list[Case]:
    """8192 tokens of width 4096 to a vocabulary of 128,256, forward and backward."""
    tokens, width, vocabulary = 8192, 4096, 128256

    def make(device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        w = (0.02 * torch.randn(vocabulary, width, device=device, dtype=torch.bfloat16)).requires_grad_()
        y = torch.randint(0, vocabulary, (tokens,), device=device)
        return lambda: linear_cross_entropy(x, w, y, backend="triton").backward(), lambda: F.cross_entropy(
            (x @ w.t()).float(), y
        ).backward()

    flops = 6.0 * tokens * width * vocabulary
    moved = 8.0 * tokens * width + 8.0 * vocabulary * width + 6.0 * tokens * vocabulary
    return [
        Case(
            "linear_cross_entropy",
            f"{tokens} x {width} x {vocabulary} bf16, forward and backward",
            tokens * vocabulary,
            moved,
            flops,
            make,
            "bf16",
        )
    ]
