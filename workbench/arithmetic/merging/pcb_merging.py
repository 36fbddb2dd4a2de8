"""PCB-Merging: parameters compete within a model and between models; the balanced ones are merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.arithmetic.merging.merging import MERGE, Setting
from workbench.arithmetic.models import Models, Parts, Rule
from workbench.arithmetic.order_statistics import ranked_rows
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
    known = ranges_of(models, count)

    def balances() -> Iterator[Tensor]:
        return (balance(parts.differences, known) for parts in models.each())

    least = min(int(count * (1 - options.density)), count - 1)
    ends = ranked_rows(balances, [least, count - 1])
    known = [Range(r.low, r.high, none, whole) for r, (none, whole) in zip(known, ends, strict=True)]

    def rule(parts: Parts, scale: float) -> Tensor:
        weights = weights_of(balance(parts.differences, known), known)
        sums = (clamped(parts.differences, known) * weights).sum(0)
        return parts.base + scale * sums / weights.sum(0).clamp_min(1e-12)

    return rule


def ranges_of(models: Models, count: int) -> list[Range]:
    """The authors' clamp of |d|: at the sorted places int(n share) and int(n (1 - share) - 1)."""

    def magnitudes() -> Iterator[Tensor]:
        return (parts.differences.abs() for parts in models.each())

    ends = ranked_rows(magnitudes, [int(count * CLAMPED), max(int(count * (1 - CLAMPED) - 1), 0)])
    for parent, (low, high) in zip(models.parents, ends, strict=True):
        if not high > low:
            raise BadInput(
                f"parents: {parent.name} differs from {models.base.name} by one size everywhere; "
                "there is nothing to balance"
            )
    return [Range(low, high) for low, high in ends]


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
