"""PCB-Merging: parameters compete within a model and between models; the balanced ones are merged."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.arithmetic.merging.merging import MERGE, Setting
from workbench.arithmetic.models import Models, Parts, Rule
from workbench.arithmetic.order_statistics import ranked
from workbench.axis import Options, parameter
from workbench.errors import BadInput

#: Share of the smallest and of the largest magnitudes that is clamped before they are compared.
CLAMPED = 0.0001


class Competition(Options):
    density: float = parameter(0.1, "share of each model's parameters that keeps a weight", gt=0, le=1)


@dataclass(frozen=True)
class Range:
    """Of one model: the magnitudes between which its differences are clamped, and the balances that weigh
    nothing and one.
    """

    low: float
    high: float
    none: float = 0.0
    whole: float = 1.0


@MERGE.add(
    "pcb-merging",
    formula="w = w_base + lambda sum_i b_i d_i / sum_i b_i, b_i the top of exp(n |d_i|^2) tanh(d_i sum d)",
    source="Du et al. 2024, eqs. 2 to 6; the authors' code",
    title="PCB-Merging",
    options=Competition,
    traits=("strength", "density"),
)
def pcb_merging(setting: Setting, options: Competition) -> Rule:
    """As the authors' code does: ranges and thresholds over all of a model's parameters, which are found in
    a stream.
    """
    models = setting.models
    count = models.numbers
    known = [magnitudes_of(models, i, count) for i in range(len(models.parents))]

    def balances(which: int) -> Iterator[Tensor]:
        return (balance(parts.differences, known)[which] for parts in models.each())

    least = int(count * (1 - options.density))
    for i, found in enumerate(known):
        stream = functools.partial(balances, i)
        none, whole = ranked(stream, [min(least, count - 1), count - 1])
        known[i] = Range(found.low, found.high, none, whole)

    def rule(parts: Parts, scale: float) -> Tensor:
        weights = weights_of(balance(parts.differences, known), known)
        sums = (clamped(parts.differences, known) * weights).sum(0)
        return parts.base + scale * sums / weights.sum(0).clamp_min(1e-12)

    return rule


def magnitudes_of(models: Models, which: int, count: int) -> Range:
    """The authors' clamp of |d|: at the sorted places int(n share) and int(n (1 - share) - 1)."""

    def magnitudes() -> Iterator[Tensor]:
        return (parts.differences[which].abs() for parts in models.each())

    low, high = ranked(magnitudes, [int(count * CLAMPED), max(int(count * (1 - CLAMPED) - 1), 0)])
    if not high > low:
        raise BadInput(
            f"parents: {models.parents[which].name} differs from {models.base.name} by one size everywhere; "
            "there is nothing to balance"
        )
    return Range(low, high)


def column(known: list[Range], name: str, like: Tensor) -> Tensor:
    """One number a model, along the first axis of `like`."""
    values = torch.tensor([getattr(each, name) for each in known])
    return values.reshape([-1] + [1] * (like.ndim - 1))


def magnitude(differences: Tensor, known: list[Range]) -> Tensor:
    low, high = column(known, "low", differences), column(known, "high", differences)
    return torch.minimum(torch.maximum(differences.abs(), low), high)


def clamped(differences: Tensor, known: list[Range]) -> Tensor:
    return differences.sign() * magnitude(differences, known)


def balance(differences: Tensor, known: list[Range]) -> Tensor:
    """(models, ...) how each parameter does within its model and beside the others."""
    low, high = column(known, "low", differences), column(known, "high", differences)
    within = ((magnitude(differences, known) - low) / (high - low)) ** 2
    between = torch.tanh(differences * differences.sum(0))
    return torch.exp(len(differences) * within) * between


def weights_of(balances: Tensor, known: list[Range]) -> Tensor:
    """Balances below the threshold weigh nothing, the largest one."""
    none, whole = column(known, "none", balances), column(known, "whole", balances)
    return (torch.maximum(balances, none) - none) / (whole - none).clamp_min(1e-30)
