"""Which channels, layers or experts stay: scores of whole units of a dimension, from weights, activations,
depth or routing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import BadInput
from workbench.pruning.calibration import Calibration
from workbench.pruning.engine.structures import UNIT_SALIENCIES
from workbench.pruning.pattern import Dimension
from workbench.pruning.saliency import depth
from workbench.pruning.saliency.activations import channel_activations
from workbench.pruning.saliency.expert_routing import routing
from workbench.pruning.saliency.weights import SALIENCIES
from workbench.subjects import Layer
from workbench.subjects.structure.dimensions import (
    channel_axes,
    channels,
    expert_count,
    expert_modules,
    smallest_units,
    stacks,
)
from workbench.subjects.structure.removal import parameter_name
from workbench.subjects.structure.units import discover

#: Saliencies of whole units; every saliency of single weights is summed over a unit's weights besides.
SPECIAL = {
    "channels": ("activation", "learned"),
    "layers": depth.DEPTH,
    "experts": ("tcess", "usage", "heapr"),
}


def check_saliency(kind: str, saliency: str) -> None:
    """`BadInput` when a saliency says nothing about a dimension."""
    if saliency not in SALIENCIES and saliency not in SPECIAL[kind]:
        raise BadInput(
            f"saliency: {saliency} does not score {kind}; choose {', '.join((*SPECIAL[kind], *SALIENCIES))}"
        )


def weight_scores(layer: Layer, saliency: str, calibration: Calibration) -> Tensor:
    """The layer's scores, in the orientation in which its module keeps the weight;
    `BadInput` when they are not finite.
    """
    pattern = Dimension("channels")
    score = calibration.scores(
        saliency, pattern, layer, lambda a: SALIENCIES[saliency].score(a, calibration, pattern).float()
    )
    if not bool(torch.isfinite(score).all()):
        raise BadInput(
            f"layers: {layer.name} has NaN or infinite saliencies; "
            "its weights or its calibration inputs hold NaN or infinity"
        )
    return (score.mT if layer.transposed else score).cpu()


def channel_scores(saliency: str, calibration: Calibration) -> Tensor:
    """(hidden,): norm outputs, or the scores of all weights of the blocks that read or write a channel."""
    model = calibration.subject.model
    if saliency == "activation":
        return channel_activations(
            calibration.subject,
            channels(model),
            calibration.split,
            calibration.examples,
            calibration.progress,
        )
    axes, total = channel_axes(model)[0], torch.zeros(channels(model))
    for layer in calibration.progress.track(calibration.layers, f"channels by {saliency}"):
        score = weight_scores(layer, saliency, calibration)
        for axis in axes.get(parameter_name(model, layer.original), ()):
            total += score.sum([a for a in range(score.ndim) if a != axis])
    return total


def kept_layers(saliency: str, left: int, calibration: Calibration) -> Tensor:
    """(blocks,): True for those that stay; every list of blocks keeps at least one."""
    on, lists = calibration.subject, list(stacks(calibration.subject.model).values())
    names = [name for paths in lists for name in paths]
    remove = len(names) - left
    if saliency in ("angular", "block-influence"):
        found = depth.measure_stacks(
            on, calibration.split, calibration.examples, progress=calibration.progress
        )
        return torch.cat(
            depth.runs(found, remove)
            if saliency == "angular"
            else depth.weakest([s.influence for s in found], remove)
        )
    if saliency == "deepest":
        return torch.cat(depth.weakest(depth.deepest([len(paths) for paths in lists]), remove))
    if saliency == "loss":
        scores = depth.losses_without(on, calibration.split, calibration.examples, calibration.progress)
    else:
        scores = torch.zeros(len(names))
        for layer in calibration.progress.track(calibration.layers, f"layers by {saliency}"):
            scores[next(i for i, name in enumerate(names) if layer.name.startswith(name + "."))] += float(
                weight_scores(layer, saliency, calibration).sum()
            )
    return torch.cat(depth.weakest(list(scores.split([len(paths) for paths in lists])), remove))


def expert_scores(saliency: str, calibration: Calibration) -> Tensor:
    """(layers with experts, experts)."""
    on = calibration.subject
    paths, size = expert_modules(on.model), expert_count(on.model)[1]
    if saliency in ("tcess", "usage"):
        return getattr(
            routing(on, calibration.split, calibration.examples, progress=calibration.progress), saliency
        )
    total = torch.zeros(len(paths), size)
    if saliency == "heapr":
        groups = [g for g in discover(on.model, ("neurons",)) if g.experts == size]
        found = UNIT_SALIENCIES["heapr"].score(calibration, groups)
        for g in groups:
            total[next(i for i, path in enumerate(paths) if g.name.startswith(path + "."))] += found[
                g.name
            ].sum(-1)
        return total
    for layer in calibration.progress.track(calibration.layers, f"experts by {saliency}"):
        owner = next((i for i, path in enumerate(paths) if layer.name.startswith(path + ".")), None)
        if owner is not None and len(layer.shape) == 3:
            total[owner] += weight_scores(layer, saliency, calibration).sum((-1, -2))
    return total


def keep(kind: str, saliency: str, left: int, calibration: Calibration) -> Tensor:
    """What stays, as `dimensions.shrink` takes it: (hidden,), (blocks,) or (layers with experts, experts)."""
    if kind == "layers":
        return kept_layers(saliency, left, calibration)
    return smallest_units(
        channel_scores(saliency, calibration) if kind == "channels" else expert_scores(saliency, calibration),
        left,
    )
