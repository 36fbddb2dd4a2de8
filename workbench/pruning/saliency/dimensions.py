"""Which channels, layers or experts stay: scores of whole units of a dimension, from weights, activations,
depth or routing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench.axis import Choice
from workbench.errors import BadInput
from workbench.pruning.axes import SALIENCY, scores_weights
from workbench.pruning.calibration import Calibration
from workbench.pruning.pattern import Dimension
from workbench.pruning.saliency import depth
from workbench.subjects import Layer
from workbench.subjects.structure.channels import channel_axes, channels
from workbench.subjects.structure.depth import stacks
from workbench.subjects.structure.dimensions import smallest_units
from workbench.subjects.structure.experts import expert_count, expert_modules
from workbench.subjects.structure.removal import parameter_name


def check_saliency(kind: str, saliency: Choice) -> None:
    """`BadInput` when a saliency says nothing about a dimension."""
    accepted = [name for name in SALIENCY if kind in SALIENCY[name].traits]
    summed = [name for name in SALIENCY if scores_weights(SALIENCY.chosen(name))]
    summed = [name for name in summed if SALIENCY[name].needs != "training"]
    if saliency.name not in (*accepted, *summed):
        raise BadInput(
            f"saliency: {saliency} does not score {kind}; choose {', '.join((*accepted, *summed))}"
        )


def weight_scores(layer: Layer, saliency: Choice, calibration: Calibration) -> Tensor:
    """The layer's scores, in the orientation in which its module keeps the weight;
    `BadInput` when they are not finite.
    """
    score = calibration.scores(saliency, Dimension("channels"), layer)
    if not bool(torch.isfinite(score).all()):
        raise BadInput(
            f"layers: {layer.name} has NaN or infinite saliencies; "
            "its weights or its calibration inputs hold NaN or infinity"
        )
    return (score.mT if layer.transposed else score).cpu()


def channel_scores(saliency: Choice, calibration: Calibration) -> Tensor:
    """(hidden,): the scores of all weights of the blocks that read or write a channel."""
    model = calibration.subject.model
    axes, total = channel_axes(model)[0], torch.zeros(channels(model))
    for layer in calibration.progress.track(calibration.layers, f"channels by {saliency}"):
        score = weight_scores(layer, saliency, calibration)
        for axis in axes.get(parameter_name(model, layer.original), ()):
            total += score.sum([a for a in range(score.ndim) if a != axis])
    return total


def layer_scores(saliency: Choice, calibration: Calibration) -> list[Tensor]:
    """(L,) for each stack of blocks: the scores of all weights of a block."""
    lists = list(stacks(calibration.subject.model).values())
    names = [name for paths in lists for name in paths]
    scores = torch.zeros(len(names))
    for layer in calibration.progress.track(calibration.layers, f"layers by {saliency}"):
        scores[next(i for i, name in enumerate(names) if layer.name.startswith(name + "."))] += float(
            weight_scores(layer, saliency, calibration).sum()
        )
    return list(scores.split([len(paths) for paths in lists]))


def expert_scores(saliency: Choice, calibration: Calibration) -> Tensor:
    """(layers with experts, experts): the scores of all weights of an expert."""
    model = calibration.subject.model
    paths, size = expert_modules(model), expert_count(model)[1]
    total = torch.zeros(len(paths), size)
    for layer in calibration.progress.track(calibration.layers, f"experts by {saliency}"):
        owner = next((i for i, path in enumerate(paths) if layer.name.startswith(path + ".")), None)
        if owner is not None and len(layer.shape) == 3:
            total[owner] += weight_scores(layer, saliency, calibration).sum((-1, -2))
    return total


SUMMED: dict[str, Callable[[Choice, Calibration], Any]] = {
    "channels": channel_scores,
    "layers": layer_scores,
    "experts": expert_scores,
}


def keep(kind: str, saliency: Choice, left: int, calibration: Calibration) -> Tensor:
    """What stays, as `dimensions.shrink` takes it: (hidden,), (blocks,) or (layers with experts, experts)."""
    scores = SUMMED[kind](saliency, calibration) if scores_weights(saliency) else saliency(calibration, [])
    if kind != "layers":
        return smallest_units(scores, left)
    remove = sum(len(paths) for paths in stacks(calibration.subject.model).values()) - left
    return torch.cat(depth.runs(scores, remove) if saliency.has("runs") else depth.weakest(scores, remove))
