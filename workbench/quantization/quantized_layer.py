"""One quantized layer: what is measured of it, how its values and grid are put in place, and its errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.progress import Progress
from workbench.quantization.activations.activations import InputRanges, input_ranges
from workbench.quantization.number.fake_quant import FakeQuant
from workbench.quantization.number.grid import Grid
from workbench.quantization.rounding.adapters import Adapter, Term
from workbench.quantization.transform.coordinates import Transform
from workbench.statistics import InputMoments, second_moments
from workbench.subjects import Layer, Subject
from workbench.subjects.changes import Mask


def stacked(parts: Sequence[tuple[Tensor, Grid]]) -> tuple[Tensor, Grid]:
    """A layer's matrices as one: unchanged when there is one, stacked for experts."""
    if len(parts) == 1:
        return parts[0]
    zeros = [g.zero for _, g in parts if g.zero is not None]
    transform = parts[0][1].transform
    if transform is not None:
        own = [g.transform.tensors for _, g in parts if g.transform is not None]
        each = {name: torch.stack([tensors[name] for tensors in own]) for name in own[0] if name != "signs"}
        transform = Transform.of(transform.tensors | each, transform.block, transform.orthogonal)
    grid = Grid(
        parts[0][1].format,
        torch.stack([g.scale for _, g in parts]),
        torch.stack(zeros) if zeros else None,
        parts[0][1].group,
        transform,
    )
    return torch.stack([v for v, _ in parts]), grid


def ranges_for(
    on: Subject, layers: Sequence[Layer], examples: int, progress: Progress
) -> dict[str, InputRanges]:
    key = ("input ranges", examples, tuple(layer.name for layer in layers))
    return on.memo(key, lambda: input_ranges(on, layers, examples=examples, progress=progress))


def moments_for(
    on: Subject, layers: Sequence[Layer], examples: int, progress: Progress
) -> dict[str, InputMoments]:
    """Input second moments, kept with the subject: a sweep over formats and roundings measures them once."""
    key = ("input moments", examples, tuple(layer.name for layer in layers))
    return on.memo(key, lambda: second_moments(on, layers, "calibration", examples, progress=progress))


def mask_of(layer: Layer) -> Tensor | None:
    """True where the weight is kept, when the layer is pruned."""
    masks = [c.mask for c in layer.changes if isinstance(c, Mask)]
    return masks[0] if masks else None


def effective(values: Tensor, term: Term | None) -> Tensor:
    return values if term is None else values + term[0] @ term[1]


@torch.no_grad()
def put(layer: Layer, values: Tensor, grid: Grid, term: Term | None = None) -> None:
    """Write values and keep them on their grid, with a low-rank term beside them.
    What was added before is part of `values` now.
    """
    layer.attach(FakeQuant.of(grid))
    layer.restack(c for c in layer.changes if c.order >= FakeQuant.order and not isinstance(c, Adapter))
    layer.write(values.to(layer.original.dtype))
    if term is not None:
        layer.attach(Adapter(*term))


def layer_row(
    layer: Layer, weight: Tensor, delta: Tensor, grid: Grid, moments: InputMoments, term: Term | None = None
) -> dict[str, Any]:
    """Errors of one layer as shares of energy, and its size."""
    assert moments.gram is not None
    gram = moments.gram if weight.ndim == 3 else moments.gram[0]
    weight_error = float(delta.square().sum() / weight.square().sum().clamp_min(1e-30))
    output_error = float(((delta @ gram) * delta).sum() / ((weight @ gram) * weight).sum().clamp_min(1e-30))
    mask = mask_of(layer)
    packed = grid.bytes(tuple(weight.shape), None if mask is None else int(mask.sum()))
    packed += 0 if term is None else 2 * (term[0].numel() + term[1].numel())  # kept in 16 bits
    return {
        "layer": layer.name,
        "weights": weight.numel(),
        "bits": packed * 8 / weight.numel(),
        "bytes": packed,
        "weight_error": weight_error,
        "output_error": output_error,
        "sqnr": -10 * math.log10(max(weight_error, 1e-30)),
    }
