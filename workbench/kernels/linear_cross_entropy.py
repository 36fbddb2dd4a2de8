"""Linear layer and cross-entropy together, chunk by chunk: the (tokens, vocabulary) logits never exist.

    L = mean_t [ log sum_v exp(z_tv) - (1 - a) z_t,y(t) - a / V sum_v z_tv ],   z = x W^T,
        a the label smoothing
    dz = (softmax(z) - (1 - a) onehot(y) - a / V) / tokens,   dx = dz W,   dW = dz^T x

For each chunk of tokens the logits are one matrix product, a kernel turns them in place into the loss and dz,
and two more products give the chunk's dx and its part of dW: memory is one chunk of logits, arithmetic that
of the plain layer. The gradients are ready when the forward ends; the backward scales them.
Luo et al. (2025, StreamBP); Hsu et al. (2024, Liger).

>>> x, w = torch.randn(10, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
>>> y = torch.randint(0, 50, (10,))
>>> loss = linear_cross_entropy(x, w, y, chunk=4)
>>> bool(torch.allclose(loss, torch.nn.functional.cross_entropy(x @ w.T, y)))
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from workbench.errors import BadInput
from workbench.kernels.backend import jit, narrow, on_device, power_of_two, tl, use_triton
from workbench.kernels.registry import Case, Configuration, Kernel


@jit
def _cross_entropy(
    z_ptr, y_ptr, loss_ptr, vocabulary, stride, ignore, smoothing, weight, BLOCK: tl.constexpr
):
    """One row of logits: its loss, and the logits replaced by their gradient times `weight`."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(y_ptr + row)
    base = z_ptr + row * stride
    offsets = tl.arange(0, BLOCK)
    if label == ignore:
        for first in range(0, vocabulary, BLOCK):
            tl.store(
                base + first + offsets,
                tl.zeros([BLOCK], tl.float32).to(z_ptr.dtype.element_ty),
                mask=first + offsets < vocabulary,
            )
        tl.store(loss_ptr + row, 0.0)
    else:
        top = tl.full(
            [BLOCK], float("-inf"), tl.float32
        )  # a running maximum and sum per lane, joined at the end
        total = tl.zeros([BLOCK], tl.float32)
        plain = tl.zeros([BLOCK], tl.float32)
        for first in range(0, vocabulary, BLOCK):
            inside = first + offsets < vocabulary
            z = tl.load(base + first + offsets, mask=inside, other=float("-inf")).to(tl.float32)
            new = tl.maximum(top, z, propagate_nan=tl.PropagateNan.ALL)
            safe = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp(top - safe) + tl.exp(z - safe)
            plain += tl.where(inside, z, 0.0)
            top = new
        highest = tl.max(top, 0)
        lse = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
        chosen = tl.load(base + label).to(tl.float32)
        loss = lse - (1.0 - smoothing) * chosen
        if smoothing > 0:
            loss -= smoothing * tl.sum(plain, 0) / vocabulary
        tl.store(loss_ptr + row, loss)
        for first in range(0, vocabulary, BLOCK):
            inside = first + offsets < vocabulary
            z = tl.load(base + first + offsets, mask=inside, other=float("-inf")).to(tl.float32)
            g = (
                tl.exp(z - lse)
                - smoothing / vocabulary
                - tl.where(first + offsets == label, 1.0 - smoothing, 0.0)
            )
            tl.store(base + first + offsets, narrow(g * weight, z_ptr.dtype.element_ty), mask=inside)


def _rows_torch(
    z: torch.Tensor, y: torch.Tensor, ignore: int, smoothing: float, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for all rows of a chunk in plain PyTorch: (losses (rows,) fp32, gradient in z's type)."""
    z32 = z.float()
    kept = y != ignore
    labels = torch.where(kept, y, 0)
    lse = torch.logsumexp(z32, 1)
    loss = (
        lse
        - (1 - smoothing) * z32.gather(1, labels[:, None])[:, 0]
        - (smoothing * z32.mean(1) if smoothing else 0.0)
    )
    g = torch.exp(z32 - lse[:, None]) - smoothing / z.shape[1]
    g.scatter_add_(1, labels[:, None], torch.full_like(g[:, :1], smoothing - 1))
    return torch.where(kept, loss, 0.0), (torch.where(kept[:, None], g, 0.0) * weight).to(z.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        y: torch.Tensor,
        ignore: int,
        smoothing: float,
        mean: bool,
        chunk: int,
        fused: bool,
    ) -> torch.Tensor:
        weight = 1.0 / max(1, int((y != ignore).sum())) if mean else 1.0
        needs = ctx.needs_input_grad
        dx = torch.empty_like(x) if needs[0] else None
        dw = torch.zeros(w.shape, dtype=torch.float32, device=w.device) if needs[1] else None
        db = torch.zeros(w.shape[0], dtype=torch.float32, device=w.device) if needs[2] else None
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for first in range(0, x.shape[0], chunk):
            rows = slice(first, first + chunk)
            z = F.linear(x[rows], w, bias)  # (chunk, vocabulary): the only logits there are
            if fused:
                losses = torch.empty(z.shape[0], dtype=torch.float32, device=x.device)
                block = min(4096, power_of_two(z.shape[1], 16))
                with on_device(x):
                    _cross_entropy[(z.shape[0],)](
                        z,
                        y[rows],
                        losses,
                        z.shape[1],
                        z.stride(0),
                        ignore,
                        smoothing,
                        weight,
                        BLOCK=block,
                        num_warps=8,
                    )
            else:
                losses, z = _rows_torch(z, y[rows], ignore, smoothing, weight)
            loss += losses.sum() * weight
            if dx is not None:
                dx[rows] = z @ w
            if dw is not None:
                dw.addmm_(z.float().t(), x[rows].float()) if z.dtype == torch.float32 else dw.add_(
                    z.t() @ x[rows]
                )
            if db is not None:
                db += z.float().sum(0)
        ctx.save_for_backward(
            dx,
            None if dw is None else dw.to(w.dtype),
            None if db is None or bias is None else db.to(bias.dtype),
        )
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(None if t is None else t * grads[0].to(t.dtype) for t in ctx.saved_tensors), *[None] * 6


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
    `reduction` "mean" (over the labels kept) or "sum". `chunk` tokens at a time; by default as many as make
    their logits as large as x itself. Computed in fp32, returned as an fp32 scalar.
    With no label kept the mean is 0 and so are the gradients.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1]:
        raise BadInput(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}: "
            "need (tokens, width), (vocabulary, width), (tokens,)"
        )
    if reduction not in ("mean", "sum") or not 0 <= label_smoothing < 1:
        raise BadInput(
            f"reduction = {reduction!r}, label_smoothing = {label_smoothing}: "
            "need 'mean' or 'sum', and 0 <= smoothing < 1"
        )
    if labels.numel() and not labels.is_cuda:
        kept = labels[labels != ignore_index]
        if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= weight.shape[0]):
            raise BadInput(
                f"labels: {int(kept.min())} to {int(kept.max())}, "
                f"the vocabulary has {weight.shape[0]} entries; mark what to skip with ignore_index"
            )
    if chunk is None:
        chunk = max(64, power_of_two(x.numel() // max(1, weight.shape[0])))
    fused = use_triton("linear_cross_entropy", x.shape[0] * weight.shape[0], x, backend)
    return _LinearCrossEntropy.apply(
        x, weight, bias, labels, ignore_index, label_smoothing, reduction == "mean", chunk, fused
    )


KERNELS = (
    Kernel(
        "linear_cross_entropy.rows",
        _cross_entropy,
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
