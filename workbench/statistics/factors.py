"""Per-example gradients of many layers from one batched backward pass, kept in factored form.

The gradient of example k with respect to a linear weight is sum over tokens t of delta_kt x_kt^T
(Goodfellow 2015): its inputs x and the gradients delta at its outputs. Keeping the factors costs tokens
x (in + out) numbers per example instead of out x in, and any rows of the gradient can be formed when they are
needed, so a layer's Fisher blocks are built without the whole model's gradients in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.statistics.gradients import learning
from workbench.subjects import Layer, Subject


@dataclass
class StackedGradients:
    """Gradients that could not be factored (stacked experts), kept whole: (groups, experts x out, in)."""

    gradients: Tensor

    @property
    def examples(self) -> int:
        return len(self.gradients)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.gradients[:, start:stop]

    def square_sum(self) -> float:
        return float(self.gradients.square().sum())

    def mean(self) -> Tensor:
        return self.gradients.mean(0)


@dataclass
class GradientFactors:
    """Factors of one layer's gradients: lists of inputs (examples, tokens, in) and output gradients
    (examples, tokens, out).
    """

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    mask: Tensor | None = None  # (out, in): gradients of pruned weights are zero

    @property
    def examples(self) -> int:
        return sum(len(x) for x in self.inputs)

    def rows(self, start: int, stop: int) -> Tensor:
        """Gradients of the weight's rows start..stop, one per example:
        (examples, stop - start, in), float32.
        """
        short = (
            bool(self.inputs)
            and self.inputs[0].dtype == torch.bfloat16
            and multiplies_bfloat16(self.inputs[0].device.type)
        )
        # The device's own bfloat16 product sums in float32 and rounds once,
        # to as many digits as the factors have: five times faster than float32.
        parts = [
            d[..., start:stop].mT @ x if short else d[..., start:stop].float().mT @ x.float()
            for x, d in zip(self.inputs, self.outputs, strict=True)
        ]
        found = torch.cat(parts).float()
        return found if self.mask is None else found * self.mask[start:stop]

    def square_sum(self) -> float:
        """Sum over examples of the squared gradient norm, from the tokens' Gram matrices:
        (x x^T) * (delta delta^T).
        """
        total = 0.0
        for x, d in zip(self.inputs, self.outputs, strict=True):
            x, d = x.float(), d.float()
            total += float(((x @ x.mT) * (d @ d.mT)).sum())
        return total

    def mean(self) -> Tensor:
        """The mean gradient (out, in)."""
        total = sum(
            torch.einsum("kto,kti->oi", d.float(), x.float())
            for x, d in zip(self.inputs, self.outputs, strict=True)
        )
        assert isinstance(total, Tensor)
        total = total / self.examples
        return total if self.mask is None else total * self.mask

    def averaged(self, size: int) -> GradientFactors:
        """Means of the gradients of every `size` consecutive examples;
        what is left over at the end of a list makes a mean of its own.

        The tokens of a group are put behind one another, so the means stay factored.
        Lists whose lengths `size` divides make equal groups.
        """
        found = GradientFactors(mask=self.mask)
        for x, d in zip(self.inputs, self.outputs, strict=True):
            whole = len(x) // size * size
            for part, count in ((slice(whole), size), (slice(whole, None), len(x) - whole)):
                if len(x[part]):
                    found.inputs.append(x[part].reshape(-1, count * x.shape[1], x.shape[-1]))
                    found.outputs.append((d[part] / count).reshape(-1, count * d.shape[1], d.shape[-1]))
        return found


@functools.lru_cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether bfloat16 products are done by the device's own instructions."""
    if device != "cpu":
        return True
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def bytes_per_example(subject: Subject, layers: Sequence[Layer], split: str, dtype: torch.dtype) -> int:
    """An upper bound of what the factors of one example take."""
    batch = next(subject.batches(split, 64))
    tokens = max((v.shape[1] for v in batch.values() if v.ndim >= 2 and not v.is_floating_point()), default=1)
    if tokens == 1:
        config = getattr(subject.model, "config", None)
        patch = getattr(config, "patch_size", None)
        tokens = (getattr(config, "image_size", 1) // patch) ** 2 + 1 if isinstance(patch, int) else 1
    width = sum(sum(layer.shape[-2:]) for layer in layers)
    return tokens * width * torch.finfo(dtype).bits // 8


def gradient_factors(
    subject: Subject,
    layers: Sequence[Layer],
    split: str = "calibration",
    examples: int = 256,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> dict[str, GradientFactors]:
    """Factored gradients of each example's own mean loss, for plain matrices (not stacked experts).

    A layer called several times in one forward pass contributes all its calls. `BadInput` for stacked experts
    and for layers whose input does not have the examples as its first dimension.
    """
    from workbench.subjects import Mask

    progress = progress or Progress()
    found = {layer.name: GradientFactors() for layer in layers}
    for layer in layers:
        if len(layer.shape) != 2:
            raise BadInput(
                f"layers: {layer.name} is a stack of experts, whose tokens are not sorted by example; "
                "use mini-batch gradients (example_gradients)"
            )
        for change in layer.changes:
            if isinstance(change, Mask):
                found[layer.name].mask = change.mask
    stored: dict[int, tuple[Tensor, Tensor]] = {}
    calls: list[tuple[str, Tensor, Tensor]] = []  # layer, inputs, output (in the graph)
    handles = []
    size = 0

    def shaped(rows: Tensor) -> Tensor:
        if rows.shape[0] != size and (rows.ndim != 2 or rows.shape[0] % size):
            raise BadInput(
                f"layers: an input of shape {tuple(rows.shape)} cannot be split into {size} examples"
            )
        return rows.reshape(size, -1, rows.shape[-1])

    def watch(layer: Layer) -> Any:
        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows = inputs[0]
            key = rows.data_ptr()
            if (
                key not in stored or stored[key][0] is not rows
            ):  # query, key and value share one copy of their input
                stored[key] = (rows, shaped(rows.detach()).to(dtype))
            calls.append((layer.name, stored[key][1], output))

        return layer.module.register_forward_hook(forward)

    total = min(examples, subject.size(split))
    try:
        handles = [watch(layer) for layer in layers]
        for batch in progress.track(
            subject.batches(split, batch_size, total), "gradients", -(-total // batch_size)
        ):
            size = len(next(iter(batch.values())))
            items = torch.tensor(
                [subject.task.items({k: v[i : i + 1] for k, v in batch.items()}) for i in range(size)],
                device=subject.device,
            )
            if int(items.sum()) == 0:
                continue
            with torch.enable_grad(), learning(layer.original for layer in layers):
                loss = subject.loss(batch)
                # The graph is left at the outputs: the weights' own gradients are never formed.
                grads = torch.autograd.grad(loss, [output for _, _, output in calls], allow_unused=True)
            scale = (items.sum() / items.clamp_min(1)).reshape(
                -1, 1, 1
            )  # the batch mean weighs an example by its items
            pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
            for (name, inputs, output), grad in zip(calls, grads, strict=True):
                delta = shaped(torch.zeros_like(output) if grad is None else grad) * scale
                pairs.setdefault(name, []).append((inputs, delta.to(dtype)))
            for layer in layers:
                factors, (out, width) = found[layer.name], layer.shape
                mine = pairs.get(layer.name) or [
                    (
                        torch.zeros(size, 1, width, dtype=dtype, device=subject.device),
                        torch.zeros(size, 1, out, dtype=dtype, device=subject.device),
                    )
                ]
                factors.inputs.append(torch.cat([x for x, _ in mine], 1) if len(mine) > 1 else mine[0][0])
                factors.outputs.append(torch.cat([d for _, d in mine], 1) if len(mine) > 1 else mine[0][1])
            calls.clear()
            stored.clear()
    finally:
        for handle in handles:
            handle.remove()
    return found
