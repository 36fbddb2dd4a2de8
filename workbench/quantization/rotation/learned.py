"""Rotations of the residual stream that are found, not drawn: learned on the Stiefel manifold (Liu et
al. 2025, SpinQuant), or from principal components (Saxena et al. 2025, ResQ)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from workbench.progress import Progress
from workbench.quantization.activations.activations import ActivationQuant, activation_format
from workbench.quantization.rotation.fold import folded, random_rotation, rotate, turned
from workbench.quantization.transform.hadamard_orders import widest
from workbench.statistics import second_moments
from workbench.subjects import Subject
from workbench.subjects.changes import bake
from workbench.subjects.tasks import Batch


def cayley_step(rotation: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """One descent step that stays orthogonal: R' = (I + a/2 Y)^-1 (I - a/2 Y) R with the skew Y = G^ - G^^T,
    G^ = G R^T - 1/2 R R^T G R^T (Liu et al. 2025, section 3.2).
    <G, -Y R> = -|Y|^2/2 <= 0, so it descends for a small rate a > 0.

    rotation, gradient : (n, n), one dtype. The rate is in units of 1 / |Y| (Frobenius), so it is an angle,
        whatever the loss's scale.
    """
    half = gradient @ rotation.T
    half = half - 0.5 * rotation @ (rotation.T @ half)
    skew = half - half.T
    size = float(skew.norm())
    if size == 0:
        return rotation
    skew = skew * (rate / size / 2)
    eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye + skew, (eye - skew) @ rotation)


def learned_rotation(
    subject: Subject,
    steps: int = 50,
    rate: float = 1.0,
    activation_bits: int = 4,
    examples: int = 64,
    batch_size: int = 8,
    start: str = "hadamard",
    heads: bool = True,
    online: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Subject, list[float]]:
    """(rotated subject, loss at every step): the rotation of the stream, and one of each block's heads, that
    minimise the loss with the inputs of the blocks' layers rounded per token, weights exact
    (SpinQuant's R1 and R2). Mini-batches of the calibration split; the rate decays linearly. With `online`
    the inputs of the layers that end the blocks are rounded after a Hadamard rotation (R4), as they will be.

    The rotations with the least such loss over all `examples`, the start included, looked at five times,
    are taken.
    """
    progress = progress or Progress()
    model = bake(subject.copy().model)
    with torch.no_grad():
        stream = folded(model)
    work = subject.with_model(model)
    whole = LossOf(work)
    generator = torch.Generator().manual_seed(seed)
    width, device = stream.embeddings[0].weight.shape[1], stream.head.weight.device
    turns = [random_rotation(width, start, generator).to(device)]
    turns += [random_rotation(stream.head_size, start, generator).to(device) for _ in stream.heads if heads]
    names = {module: name for name, module in model.named_modules()}
    format = activation_format("int", activation_bits).name
    last = [block[-1][2] for block in stream.blocks] if online else []
    hooks = []
    for layer in work.layers("blocks"):
        turns_inputs = any(layer.module is module for module in last)
        rounding = token_rounding(format, layer.shape[-1] if turns_inputs else 0).to(device)
        hooks.append(layer.module.register_forward_pre_hook(rounding.before))

    def loss(rotations: Sequence[Tensor], batch: Batch) -> Tensor:
        values = turned(stream, rotations[0].float(), [r.float() for r in rotations[1:]])
        weights = {f"model.{names[module]}.{tensor}": value for (module, tensor), value in values.items()}
        return functional_call(whole, weights, (batch,))

    @torch.no_grad()
    def over_all() -> float:
        found = [
            (float(loss(turns, b)), work.task.items(b))
            for b in work.batches("calibration", batch_size, examples)
        ]
        return sum(a * n for a, n in found) / sum(n for _, n in found)

    batches = list(work.batches("calibration", batch_size, examples))
    least, best, losses = over_all(), list(turns), []
    try:
        for step in progress.track(range(steps), "learning the rotation"):
            pick = int(torch.randint(len(batches), (), generator=generator))
            with torch.enable_grad():
                moving = [t.clone().requires_grad_() for t in turns]
                value = loss(moving, batches[pick])
                gradients = torch.autograd.grad(value, moving)
            losses.append(float(value.detach()))
            turns = [
                cayley_step(t, g, rate * (1 - step / steps)) for t, g in zip(turns, gradients, strict=True)
            ]
            if (step + 1) % max(1, steps // 5) == 0 and (found := over_all()) < least:
                least, best = found, list(turns)
    finally:
        for hook in hooks:
            hook.remove()
    return rotate(subject, rotation=orthogonal(best[0]), heads=[orthogonal(t) for t in best[1:]]), losses


def token_rounding(format: str, turned_width: int = 0) -> ActivationQuant:
    """Rounds each token's inputs; those of a given width after a Hadamard rotation, which is undone."""
    if not turned_width:
        return ActivationQuant(format=format, granularity="token")
    signs, block = torch.ones(turned_width), widest(turned_width)
    return ActivationQuant(signs=signs, block=block, format=format, granularity="token")


class LossOf(nn.Module):
    """The loss of a batch as a module, so that it can be called with other weights."""

    def __init__(self, work: Subject) -> None:
        super().__init__()
        self.model, self.task = work.model, work.task

    def forward(self, batch: Batch) -> Tensor:
        return self.task.loss(self.model, batch)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix: removes what rounding gathered over many steps."""
    left, _, right = torch.linalg.svd(matrix.double())
    return left @ right


def principal(gram: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """U = [P_low R_low, P_high R_high] (n, n), float64: principal components of a second moment, turned at
    random within the `share` of largest variance and within the rest (Saxena et al. 2025, ResQ).
    Coordinates are U^T x; the last ones hold the most energy.
    """
    _, vectors = torch.linalg.eigh(gram.double())  # ascending
    high = max(1, round(share * len(gram)))
    parts = [vectors[:, : len(gram) - high], vectors[:, len(gram) - high :]]
    turns = [random_rotation(p.shape[1], "orthogonal", generator).to(gram.device) for p in parts]
    return torch.cat([p @ t for p, t in zip(parts, turns, strict=True)], 1)


def principal_rotation(
    subject: Subject,
    share: float = 0.125,
    examples: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> Subject:
    """The subject with its stream in ResQ's coordinates: one PCA over what all norms hand to the layers that
    read them.
    """
    model = bake(subject.copy().model)
    with torch.no_grad():
        stream = folded(model)
    work = subject.with_model(model)
    readers = {readers[0] for block in stream.blocks for _, readers, _ in block}
    layers = [layer for layer in work.layers("*") if layer.module in readers]
    moments = second_moments(work, layers, "calibration", examples, progress=progress)
    gram = torch.stack([m.gram[0].double() for m in moments.values() if m.gram is not None]).sum(0)
    return rotate(subject, rotation=principal(gram, share, torch.Generator().manual_seed(seed)).T)
