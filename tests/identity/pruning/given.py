"""What pairs of pruning are given: networks, and what an entry of an axis reads of a layer and of data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.identity.pairs import Draw
from workbench.pruning.axes import SALIENCY
from workbench.statistics import gradient_factors
from workbench.subjects import Subject


def flat(parts: Sequence[Tensor]) -> Tensor:
    """All numbers of several tensors, one after the other."""
    return torch.cat([part.detach().flatten() for part in parts])


@contextmanager
def doubles() -> Iterator[None]:
    """Numbers that code makes by itself are in double precision while entered."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def layer_of(weight: Tensor) -> Any:
    """What an entry of an axis reads of a layer."""
    return SimpleNamespace(weight=weight, shape=tuple(weight.shape), name="layer")


def measured_as(gradients: Any = None, damp: float = 0.0, gram: Tensor | None = None) -> Any:
    """A calibration that has measured these."""
    return SimpleNamespace(
        factors=lambda layer, options: gradients[layer.name] if isinstance(gradients, dict) else gradients,
        absolute_damp=lambda options, share: damp,
        gram=lambda layer: None if gram is None else gram[None],
    )


def network(
    draw: Draw, widths: Sequence[int], linear: type[nn.Linear] = nn.Linear
) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Linear layers of seeded weights with a tanh between them, 40 inputs and their classes."""
    parts: list[nn.Module] = []
    for number, (width, out) in enumerate(pairwise(widths)):
        layer = linear(width, out)
        layer.weight.data, layer.bias.data = draw.normal(out, width) / width**0.5, draw.normal(out)
        parts += [nn.Tanh(), layer] if number else [layer]
    inputs = draw.normal(40, widths[0])
    return nn.Sequential(*parts), inputs, draw.normal(40, widths[-1]).argmax(-1)


def subject_of(net: nn.Module, inputs: Tensor, labels: Tensor) -> Subject:
    import workbench

    every = {"inputs": inputs, "labels": labels}
    return workbench.subject(net, data=dict.fromkeys(("train", "calibration", "validation", "test"), every))


def scores_of(saliency: str, on: Subject) -> Tensor:
    """An entry's scores of all layers, from gradients in float32 (calibration itself keeps bfloat16)."""
    layers = on.layers("*")
    found = gradient_factors(on, layers, "train", 40, 16, torch.float32)
    entry, calibration = SALIENCY.chosen(saliency), measured_as(found)
    return torch.cat([entry(layer, calibration, None).flatten() for layer in layers])
