"""Means in which each parameter of each model weighs what the loss of that model says it matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from workbench.arithmetic.merging.merging import MERGE, Setting
from workbench.arithmetic.models import Parts, Rule
from workbench.arithmetic.sources import own_tensors
from workbench.axis import Options, parameter
from workbench.progress import Progress
from workbench.statistics.gradients import learning
from workbench.subjects import Batch, Subject

#: Added to every weight, so that none is zero.
FLOOR = 1e-6


class Fisher(Options):
    examples: int = parameter(128, "examples for each model", ge=1, unit="examples")
    labels: Literal["drawn", "given"] = parameter(
        "drawn", "targets of the gradients: drawn from the model's own answers (Fisher), or those of the data"
    )
    normalised: bool = parameter(True, "divide each model's weights by their norm over all parameters")


@MERGE.add(
    "fisher-weights",
    formula="w = sum_i F_i w_i / sum_i F_i, F_i = E[(dl / dw)^2] at w_i",
    source="Matena and Raffel 2022, eq. 4",
    needs="gradients",
    title="Fisher-weighted averaging",
    options=Fisher,
)
def fisher_weights(setting: Setting, options: Fisher) -> Rule:
    """The diagonal of each model's Fisher information, on the data that merges are chosen on."""
    generator = torch.Generator().manual_seed(setting.models.seed)

    def squares(on: Subject) -> dict[str, Tensor]:
        return squared_gradients(setting, on, options, generator)

    return weighed(setting, squares, options.normalised)


def weighed(setting: Setting, measure: Callable[[Subject], dict[str, Tensor]], normalised: bool) -> Rule:
    """The mean by these weights. Those of every model are held, as many numbers as the models have."""
    found = [measure(setting.holding(which)) for which in range(len(setting.models.parents))]
    sizes = [sum(float(v.double().square().sum()) for v in each.values()) ** 0.5 for each in found]
    shares = [1 / (size + FLOOR) if normalised else 1.0 for size in sizes]
    whole = sum(shares)

    def rule(parts: Parts, strength: float) -> Tensor:
        kept = [each.get(parts.name) for each in found]
        weights = torch.stack(
            [
                share / whole * (torch.zeros_like(parts.base) + (FLOOR if w is None else w + FLOOR))
                for share, w in zip(shares, kept, strict=True)
            ]
        )
        return (weights * parts.parents).sum(0) / weights.sum(0)

    return rule


def squared_gradients(
    setting: Setting, on: Subject, options: Fisher, generator: torch.Generator
) -> dict[str, Tensor]:
    """Mean over examples of the squared gradient of each one's loss, summed over its items."""
    learned = learnable(setting, on)
    total = {name: torch.zeros(value.shape) for name, value in learned.items()}
    count = 0
    batches = on.batches(setting.split, 1, options.examples)
    examples = min(options.examples, on.size(setting.split))
    for batch in setting.progress.track(batches, "Fisher", examples):
        items = on.task.items(batch)
        if items == 0:
            continue
        with torch.enable_grad(), learning(learned.values()):
            loss = on.loss(batch) if options.labels == "given" else drawn_loss(on, batch, generator)
            found = torch.autograd.grad(items * loss, list(learned.values()), allow_unused=True)
        count += 1
        for name, gradient in zip(learned, found, strict=True):
            if gradient is not None:
                total[name] += gradient.cpu().square()
    return {name: value / max(count, 1) for name, value in total.items()}


def learnable(setting: Setting, on: Subject) -> dict[str, nn.Parameter]:
    held = own_tensors(on.model)
    return {n: v for n in setting.models.names if isinstance(v := held[n], nn.Parameter)}


def drawn_loss(on: Subject, batch: Batch, generator: torch.Generator) -> Tensor:
    """Mean loss with targets drawn from the model's answers: classes, or numbers around what it says with
    variance one.
    """
    rows = on.task.flat(on.task.output(on.model, batch), batch)[0]
    if on.task.loss_kind == "cross_entropy":
        chances = rows.detach().float().softmax(-1).cpu()
        classes = torch.multinomial(chances, 1, generator=generator).squeeze(1).to(rows.device)
        return nn.functional.cross_entropy(rows.float(), classes)
    if on.task.loss_kind == "squared_error":
        noise = torch.randn(rows.shape, generator=generator).to(rows.device)
        return (noise * rows).sum() / len(rows)
    return on.loss(batch)


class Curvature(Options):
    examples: int = parameter(64, "examples for each model", ge=1, unit="examples")
    probes: int = parameter(32, "random vectors for each diagonal", ge=1, le=10_000)
    normalised: bool = parameter(True, "divide each model's weights by their norm over all parameters")


@MERGE.add(
    "hessian-weights",
    formula="w = sum_i H_i w_i / sum_i H_i, H_i = max(diag of the loss's Hessian at w_i, 0), by Hutchinson",
    source="Daheim et al. 2024; the diagonal as Bekas, Kokiopoulou and Saad 2007",
    needs="gradients",
    title="Hessian-weighted averaging",
    options=Curvature,
)
def hessian_weights(setting: Setting, options: Curvature) -> Rule:
    """The positive part of the diagonal of each model's Hessian, from random signs."""

    def diagonal(on: Subject) -> dict[str, Tensor]:
        return hessian_diagonal(on, setting.split, options, setting.models.seed, setting.progress)

    return weighed(setting, diagonal, options.normalised)


def hessian_diagonal(
    on: Subject, split: str, options: Curvature, seed: int, progress: Progress
) -> dict[str, Tensor]:
    """E[v * Hv] over vectors of random signs, below zero cut off, by parameter."""
    from workbench.curvature.operators.curvature_operator import curvature_operator

    generator = torch.Generator().manual_seed(seed)
    names = {id(value): name for name, value in own_tensors(on.model).items()}
    with curvature_operator(on, "hessian", "all", split, options.examples, seed=seed) as operator:
        total = torch.zeros(operator.size)
        for _ in progress.track(range(options.probes), "Hessian's diagonal"):
            signs = torch.randint(0, 2, (operator.size,), generator=generator).float() * 2 - 1
            total += signs * operator.matvec(signs).float().cpu()
        parts = operator.parts(total / options.probes)
        places = operator.places
    return {
        names[id(place.parameter)]: part.clamp_min(0)
        for place, part in zip(places, parts, strict=True)
        if id(place.parameter) in names
    }
