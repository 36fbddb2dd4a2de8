"""How the scale of each group of layers is found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workbench.axis import Axis, Choice, Options, parameter
from workbench.progress import Progress
from workbench.quantization.activations.activations import input_ranges
from workbench.quantization.equalization.scale_groups import ScaleGroup
from workbench.quantization.number.grid import fit
from workbench.quantization.number.number_format import NUMBER_FORMAT
from workbench.quantization.rotation.fold import matrix_of
from workbench.statistics.inputs import kept_positions
from workbench.statistics.walk import Walk
from workbench.subjects import Layer, Subject
from workbench.subjects.tasks import first_tensor

#: `entry(on, groups, examples, progress, options)` yields a `Scaled` for each group it scales.
EQUALIZATION = Axis(
    "equalization",
    "input scales folded into the module before: from the extremes of inputs and weights, or searched",
    found_in="workbench.quantization.equalization",
)
LEAST = 1e-5


@dataclass(frozen=True)
class Scaled:
    """A group's scale (in,), and the size (in,) of its inputs that it was found from.

    exponent, error, error_unscaled : of a search, the power taken and the relative squared error of the
        inspected module's outputs with rounded weights, with the scale and without
    """

    group: ScaleGroup
    scale: Tensor
    size: Tensor
    exponent: float | None = None
    error: float | None = None
    error_unscaled: float | None = None


class Smoothing(Options):
    alpha: float = parameter(0.5, "how far outliers move from activations to weights", ge=0, le=1, step=0.05)


@EQUALIZATION.add(
    "smoothquant",
    formula="s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), w over all layers that read the norm",
    source="Xiao et al. 2023, SmoothQuant, eq. 4",
    needs="inputs",
    title="SmoothQuant",
    options=Smoothing,
)
def smoothquant(
    on: Subject, groups: Sequence[ScaleGroup], examples: int, progress: Progress, options: Smoothing
) -> Iterator[Scaled]:
    """One scale a norm, as the authors do: layers that read no norm keep their inputs."""
    groups = [group for group in groups if group.norm]
    layers = {layer.name: layer for layer in on.layers("*")}
    ranges = input_ranges(on, [layers[g.readers[0]] for g in groups], examples=examples, progress=progress)
    for group in groups:
        size = ranges[group.readers[0]].largest[0]
        weights = torch.stack([layers[name].weight.detach().float().abs().amax(0) for name in group.readers])
        weight = weights.amax(0).clamp_min(LEAST)
        scale = size.clamp_min(LEAST).pow(options.alpha) / weight.pow(1 - options.alpha)
        yield Scaled(group, scale.clamp_min(LEAST), size)


class Search(Options):
    format: Choice = NUMBER_FORMAT.choice("uint4", "format that the weights will be rounded to")
    granularity: Literal["auto", "tensor", "channel", "group"] = parameter("group", "what will share a scale")
    group_size: int = parameter(128, "weights of a group (in one row)", ge=1, le=4096, unit="weights")
    ratios: int = parameter(20, "powers tried: 0, 1 / ratios, ... below 1", ge=2, le=100)


@EQUALIZATION.add(
    "awq",
    formula="s = mean|x|^a, the a with the least error of attention's or the feed-forward network's outputs",
    source="Lin et al. 2023, AWQ, section 3.2",
    needs="inputs",
    title="AWQ",
    options=Search,
)
def awq(
    on: Subject, groups: Sequence[ScaleGroup], examples: int, progress: Progress, options: Search
) -> Iterator[Scaled]:
    """The authors' search, block by block on the dense model's inputs: weights rounded to the nearest with
    s = mean|x|^a / sqrt(max s min s), read back divided by s.
    """
    layers = {layer.name: layer for layer in on.layers("*")}
    walk = Walk(
        on, [layers[name] for g in groups for name in g.readers], examples, gram=False, progress=progress
    )
    for visit in walk:
        for group in groups:
            if group.block == visit.block:
                yield searched(walk, visit.block, group, [layers[name] for name in group.readers], options)


@torch.no_grad()
def searched(walk: Walk, block: str, group: ScaleGroup, readers: Sequence[Layer], options: Search) -> Scaled:
    total = torch.zeros(readers[0].shape[-1], device=readers[0].original.device)
    tokens = 0

    def add(layer: Layer, expert: int, rows: Tensor) -> None:
        nonlocal tokens
        total.add_(rows.float().abs().sum(0))
        tokens += len(rows)

    walk.observe(block, readers[:1], add)
    size = total / max(tokens, 1)
    dense = list(answers(walk, group.inspected))
    energy = sum(float(answer.square().sum()) for answer in dense)
    weights = [matrix_of(layer.module).detach().clone() for layer in readers]

    def error_of(scale: Tensor) -> float:
        for layer, weight in zip(readers, weights, strict=True):
            moved = weight.float() * scale
            grid = fit(moved, options.format(), options.granularity, options.group_size, "minmax")
            matrix_of(layer.module).copy_(grid.round(moved) / scale)
        pairs = zip(answers(walk, group.inspected), dense, strict=False)
        return sum(float((mine - theirs).square().sum()) for mine, theirs in pairs) / max(energy, 1e-30)

    try:
        found = [
            (error_of(scale), power, scale)
            for power, scale in powers(size, options.ratios)
            if not walk.progress.stopped
        ]
    finally:
        for layer, weight in zip(readers, weights, strict=True):
            matrix_of(layer.module).copy_(weight)
    unscaled = next(iter(found), (float("nan"), 0.0, torch.ones_like(size)))
    error, power, scale = min(found, key=lambda tried: tried[0], default=unscaled)
    return Scaled(group, scale, size, power, error, unscaled[0])


def powers(size: Tensor, count: int) -> Iterator[tuple[float, Tensor]]:
    """(a, s) for a = 0, 1 / count, ...; s is 1 for a = 0."""
    for step in range(count):
        scale = size.pow(step / count).clamp_min(1e-4)
        yield step / count, scale / (scale.max() * scale.min()).sqrt()


def answers(walk: Walk, module: str) -> Iterator[Tensor]:
    """What a module of the block that is visited gives for each batch, in float32, padding left out."""
    for index, batch in enumerate(walk.batches()):
        if walk.progress.stopped:
            return
        given = first_tensor(walk.replay(batch, module, walk.answers[index])).float()
        keep = kept_positions(walk.on, batch)
        yield given[keep] if isinstance(keep, Tensor) and given.shape[:2] == keep.shape else given
