"""Cross-entropy of one chunk of logits: losses and gradients row by row, by a kernel or in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from workbench.kernels.backend import jit, narrow, on_device, power_of_two, tl


@jit
def cross_entropy_row(
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


def rows_torch(
    z: torch.Tensor, y: torch.Tensor, ignore: int, smoothing: float, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for all rows of a chunk in plain PyTorch: (losses (rows,) in fp32 or wider, gradient in z's
    type).
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        losses = losses_torch(z, y, ignore, smoothing)
    (g,) = torch.autograd.grad(losses, z, torch.full_like(losses, weight))
    return losses.detach(), g


def places_of_largest(z: torch.Tensor) -> torch.Tensor:
    """(rows,) the place of each row's largest number, the first of equals."""
    if z.device.type != "cpu" or z.dtype not in (torch.float32, torch.float64):
        return z.argmax(-1)
    return torch.from_numpy(z.detach().numpy().argmax(-1))  # in a fifth of the time


def losses_torch(z: torch.Tensor, y: torch.Tensor, ignore: int, smoothing: float) -> torch.Tensor:
    """The losses (rows,) alone."""
    return F.cross_entropy(
        z.to(widened(z)), y, ignore_index=ignore, label_smoothing=smoothing, reduction="none"
    )


def sum_kept(losses: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The sum of the losses of labels that are kept, in the order of `F.cross_entropy`."""
    if losses.is_cuda:
        return losses.sum()
    logs = -losses[kept][:, None]
    return F.nll_loss(logs, torch.zeros(len(logs), dtype=torch.long), reduction="sum")


def rows_triton(
    z: torch.Tensor, y: torch.Tensor, ignore: int, smoothing: float, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the kernel, which writes the gradient over the logits."""
    losses = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
    block = min(4096, power_of_two(z.shape[1], 16))
    with on_device(z):
        cross_entropy_row[(z.shape[0],)](
            z,
            y,
            losses,
            z.shape[1],
            z.stride(0),
            ignore,
            smoothing,
            weight,
            BLOCK=block,
            num_warps=8,
        )
    return losses, z


def widened(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
