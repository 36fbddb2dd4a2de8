"""The loss change a weight change should cost: g.d + 1/2 d.Hd,
with one Hessian-vector product for all layers together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from workbench.curvature.operators.weights import (
    Place,
    check_finite,
    differentiable,
    place_of,
    with_weights,
)
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.subjects import Subject, all_layers


@dataclass(frozen=True)
class Prediction:
    """Second-order prediction of the mean loss change, in the loss's unit (nats for cross-entropy).

    by_layer : name -> (first, second) with first = g_l . d_l and second = 1/2 d_l . (H d)_l. Seconds contain
        the layer's share of the interactions with the other changed layers,
        so they add up to 1/2 d.Hd exactly.
    """

    by_layer: dict[str, tuple[float, float]] = field(default_factory=dict)
    examples: int = 0
    partial: bool = False

    @property
    def first(self) -> float:
        return sum(first for first, _ in self.by_layer.values())

    @property
    def second(self) -> float:
        return sum(second for _, second in self.by_layer.values())

    @property
    def total(self) -> float:
        return self.first + self.second


def changed_places(subject: Subject, deltas: dict[str, Tensor]) -> tuple[list[Place], list[Tensor]]:
    """Places and changes in stored orientation; `BadInput` for an unknown layer or a wrong shape."""
    layers = {layer.name: layer for layer in all_layers(subject.model)}
    if not deltas:
        raise BadInput("deltas: empty; give at least one layer's weight change")
    places, changes = [], []
    for name, delta in deltas.items():
        if name not in layers:
            raise BadInput(
                f"deltas: {name!r} is no layer of this subject; names look like {', '.join(list(layers)[:3])}"
            )
        layer = layers[name]
        if tuple(delta.shape) != layer.shape:
            raise BadInput(
                f"deltas: {name} has shape {tuple(delta.shape)}, the layer's weight is {layer.shape}"
            )
        value = delta.detach().to(layer.original.device, layer.original.dtype)
        places.append(place_of(layer))
        changes.append(value.mT if layer.transposed else value)
    return places, changes


def predicted_change(
    subject: Subject,
    deltas: dict[str, Tensor],
    split: str = "calibration",
    examples: int = 64,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Prediction:
    """Predict the mean loss change of adding `deltas` (layer name -> (..., out, in))
    to the effective weights, all at once.

    Exact derivatives over `examples` of `split`, accumulated over micro-batches.
    When stopped, the batches so far are used.
    """
    progress = progress or Progress()
    places, changes = changed_places(subject, deltas)
    sums = torch.zeros(len(places), 2, dtype=torch.float64)
    items = seen = 0
    count = -(-min(examples, subject.size(split)) // batch_size)
    with differentiable(subject.model, places) as weights, torch.enable_grad():
        for number, batch in enumerate(
            progress.track(subject.batches(split, batch_size, examples), "quadratic prediction", count)
        ):
            weight = subject.task.items(batch)
            if weight == 0:
                continue
            loss = subject.loss(batch)
            check_finite(loss, f"batch {number} of {split}")
            gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
            used = [(g, d) for g, d in zip(gradients, changes, strict=True) if g is not None]
            slopes = [None if g is None else (g * d).sum() for g, d in zip(gradients, changes, strict=True)]
            curved = any(g.requires_grad for g, _ in used)
            slope = sum(s for s in slopes if s is not None)
            products = (
                torch.autograd.grad(slope, weights, allow_unused=True)  # type: ignore[arg-type]
                if curved
                else [None] * len(weights)
            )
            for row, (s, product, change) in enumerate(zip(slopes, products, changes, strict=True)):
                sums[row, 0] += 0.0 if s is None else weight * float(s.detach())
                sums[row, 1] += 0.0 if product is None else weight * 0.5 * float((product * change).sum())
            items += weight
            seen += len(next(iter(batch.values())))
    if items == 0:
        raise BadInput(
            f"split: the first {examples} examples of {split!r} hold no target; check the label column"
        )
    means = (sums / items).tolist()
    return Prediction(
        {p.name: (first, second) for p, (first, second) in zip(places, means, strict=True)},
        seen,
        progress.partial,
    )


@torch.no_grad()
def measured_change(
    subject: Subject,
    deltas: dict[str, Tensor],
    split: str = "calibration",
    examples: int = 64,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> float:
    """The mean loss change that adding `deltas` really makes,
    on exactly the batches of `predicted_change`.
    """
    progress = progress or Progress()
    places, changes = changed_places(subject, deltas)
    with differentiable(subject.model, places) as weights:
        moved = [w.detach() + d for w, d in zip(weights, changes, strict=True)]
    before = mean_loss(subject, split, examples, batch_size, progress)
    with with_weights(subject.model, places, moved):
        return mean_loss(subject, split, examples, batch_size, progress) - before


@torch.no_grad()
def mean_loss(
    subject: Subject, split: str, examples: int, batch_size: int, progress: Progress | None = None
) -> float:
    """Mean loss over the first `examples` of a split, in evaluation mode, accumulated in double precision."""
    progress = progress or Progress()
    total, items = 0.0, 0
    count = -(-min(examples, subject.size(split)) // batch_size)
    with differentiable(subject.model, []):
        for batch in progress.track(subject.batches(split, batch_size, examples), "measured loss", count):
            weight = subject.task.items(batch)
            if weight:
                total += float(subject.loss(batch)) * weight
                items += weight
    if items == 0:
        raise BadInput(
            f"split: the first {examples} examples of {split!r} hold no target; check the label column"
        )
    return total / items
