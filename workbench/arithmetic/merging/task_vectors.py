"""Task arithmetic: sums of what each model has added to the base, some of it left out first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from workbench.arithmetic.merging.merging import MERGE, Setting
from workbench.arithmetic.models import Models, Parts, Rule
from workbench.arithmetic.order_statistics import ranked_rows
from workbench.axis import Options, parameter


@MERGE.add(
    "task-arithmetic",
    formula="w = w_base + lambda sum_i d_i, d_i = w_i - w_base",
    source="Ilharco et al. 2023, section 2",
    title="Task arithmetic",
    traits=("strength", "one"),
)
def task_arithmetic(setting: Setting, options: Options) -> Rule:
    """The base and a multiple of the sum of the differences."""
    return lambda parts, scale: parts.base + scale * parts.differences.sum(0)


class Trim(Options):
    density: float = parameter(0.2, "share of the largest differences that is kept", gt=0, le=1)
    over: Literal["model", "tensor"] = parameter(
        "model", "what the share is of: all of a model's numbers (the authors), or each tensor's (mergekit)"
    )


@MERGE.add(
    "ties",
    formula="w = w_base + lambda mean of the trimmed d_i whose sign is that of their sum",
    source="Yadav et al. 2023, algorithm 1",
    title="TIES-Merging",
    options=Trim,
    traits=("strength", "density"),
)
def ties(setting: Setting, options: Trim) -> Rule:
    """Trim each difference to its largest entries, elect a sign, average those that have it."""
    known = [] if options.over == "tensor" else cuts(setting.models, options.density)

    def rule(parts: Parts, scale: float) -> Tensor:
        least = known or [cut_of(d, options.density) for d in parts.differences]
        kept = [trimmed(d, smallest) for d, smallest in zip(parts.differences, least, strict=True)]
        return parts.base + scale * disjoint_mean(torch.stack(kept))

    return rule


def left_of(count: int, density: float) -> int:
    """The place of the least number that is kept of so many: the authors keep those from the (count -
    int(density count))-th on, counted from one.
    """
    return max(count - int(density * count) - 1, 0)


def cuts(models: Models, density: float) -> list[float]:
    """The least magnitude that is kept of each model's differences."""

    def magnitudes() -> Iterator[Tensor]:
        return (parts.differences.abs() for parts in models.each())

    if density >= 1:
        return [0.0] * len(models.parents)
    return [found[0] for found in ranked_rows(magnitudes, [left_of(models.numbers, density)])]


def cut_of(difference: Tensor, density: float) -> float:
    """The same of one tensor, of which int(density n) entries are kept, at least one."""
    count = difference.numel()
    kept = max(int(density * count), 1)
    if kept >= count:
        return 0.0
    return float(difference.abs().flatten().kthvalue(count - kept + 1).values)


def trimmed(difference: Tensor, least: float) -> Tensor:
    return torch.where(difference.abs() >= least, difference, 0.0)


def disjoint_mean(differences: Tensor) -> Tensor:
    """(models, ...) -> the mean of the entries whose sign is the elected one, zeros not counted."""
    elected = torch.where(differences.sum(0) >= 0, 1.0, -1.0)
    kept = torch.where(differences.sign() == elected, differences, 0.0)
    return kept.sum(0) / (kept != 0).sum(0).clamp_min(1)


class Drop(Options):
    density: float = parameter(0.1, "share of the differences that is kept", gt=0, le=1)
    rescale: bool = parameter(True, "divide what is kept by this share, so that the mean stays")
    then: Literal["task-arithmetic", "ties"] = parameter(
        "task-arithmetic",
        "what is done with the differences that are left: their sum, or TIES without trimming",
    )


@MERGE.add(
    "dare",
    formula="w = w_base + lambda sum_i m_i d_i / (1 - p), m_i 0 with probability p = 1 - density",
    source="Yu et al. 2024, eq. 1",
    title="DARE",
    options=Drop,
    traits=("strength", "density", "one"),
)
def dare(setting: Setting, options: Drop) -> Rule:
    """Drop differences at random and rescale the others, then merge."""

    def rule(parts: Parts, scale: float) -> Tensor:
        generator = parts.generator()
        kept = torch.stack(
            [dropped(d, 1 - options.density, options.rescale, generator) for d in parts.differences]
        )
        return parts.base + scale * (
            kept.sum(0) if options.then == "task-arithmetic" else disjoint_mean(kept)
        )

    return rule


def dropped(difference: Tensor, rate: float, rescale: bool, generator: torch.Generator) -> Tensor:
    """Zeros with probability `rate`; what stays is divided by 1 - rate."""
    gone = torch.bernoulli(torch.full_like(difference, rate), generator=generator)
    left = difference * (1 - gone)
    return left / (1 - rate) if rescale and rate < 1 else left
