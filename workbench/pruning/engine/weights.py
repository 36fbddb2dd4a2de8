"""One pruning event on single weights: scores, allocation, masks and new weights of some layers are made
first; then they are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.axis import Choice
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.pruning.axes import scores_weights
from workbench.pruning.calibration import Calibration, rows_of
from workbench.pruning.compensation import bias_shift
from workbench.pruning.pattern import NM, Tiles, make_mask, yield_to
from workbench.pruning.solvers import icbs, obs
from workbench.subjects import Layer, Mask

if TYPE_CHECKING:
    from workbench.pruning.plan import PrunePlan


def prune_once(
    layers: Sequence[Layer],
    calibration: Calibration,
    pattern: Tiles | NM,
    sparsity: float,
    saliency: Choice,
    compensation: Choice,
    allocation: Choice,
    progress: Progress,
    refinement: Any = None,
    fixed: Mapping[str, float] | None = None,
) -> None:
    """Prune to `sparsity` in all; what is gone already stays gone and counts.
    Stopped before the end, nothing is written.

    refinement : options of iCBS, for a mask that it improves
    fixed : sparsity of each layer, where these are some of the layers that it was shared out to
    """
    gone = {layer.name: removed(layer) for layer in layers}
    sweeping = saliency.has("swept") and compensation.has("swept") and pattern.stepwise
    scores: dict[str, Tensor] = {}
    if not sweeping or allocation.has("across layers"):
        for layer in progress.track(layers, f"saliency {saliency}"):
            score = calibration.scores(saliency, pattern, layer)
            check_finite(layer, score)
            scores[layer.name] = yield_to(score, gone[layer.name], pattern)
        if progress.stopped:
            return
    shares = dict(fixed) if fixed is not None else uniform(layers, sparsity)
    if fixed is None and pattern.fixed is None:
        shares = allocation.value.shares(layers, scores, pattern, sparsity, allocation.options)
    made: dict[str, tuple[Tensor, Tensor]] = {}
    shifts: dict[str, Tensor] = {}
    for layer in progress.track(layers, f"compensation {compensation}"):
        if sweeping:
            made[layer.name] = swept(
                layer,
                calibration.gram(layer),
                pattern,
                shares[layer.name],
                gone[layer.name],
                compensation.options.damp,
            )
            continue
        score = scores.pop(layer.name)
        mask = make_mask(score, pattern, shares[layer.name], allocation.value.within) & ~gone[layer.name]
        if refinement is not None:
            mask = refined(layer, mask, score, calibration, refinement)
        made[layer.name] = (compensation(layer, mask, calibration), mask)
        if compensation.has("bias"):
            weight = layer.weight.detach()
            shifts[layer.name] = bias_shift(layer, weight * mask - weight, calibration)
    if progress.stopped:
        return
    for layer in layers:
        write(layer, *made.pop(layer.name), compensation.has("nothing"), shifts.get(layer.name))


def uniform(layers: Sequence[Layer], sparsity: float) -> dict[str, float]:
    return {layer.name: sparsity for layer in layers}


def refined(layer: Layer, mask: Tensor, score: Tensor, calibration: Calibration, options: Any) -> Tensor:
    """iCBS: exchange weights near the boundary as long as the predicted loss falls."""
    found, *_ = icbs.refine(
        rows_of(layer.weight.detach()),
        rows_of(mask),
        rows_of(score),
        calibration.factors(layer, options),
        calibration.absolute_damp(options, options.damp),
        block=options.block,
        candidates=options.candidates,
        rounds=options.rounds,
        restarts=options.restarts,
        slope=options.slope,
        seed=calibration.seed,
    )
    return found.reshape(mask.shape)


def write(layer: Layer, weight: Tensor, mask: Tensor, unchanged: bool, shift: Tensor | None) -> None:
    """Put a layer's new weight and mask, and what its bias gains, in place."""
    old = layer.weight.detach()
    if shift is not None:
        layer.shift_bias(shift)
    elif not unchanged:
        # Written as a difference, so that low-rank terms and number formats on the same weight keep their
        # meaning.
        stored = layer.original.detach()
        layer.write((stored.mT if layer.transposed else stored) + (weight - old * mask))
    layer.attach(Mask(mask.contiguous()))


def swept(
    layer: Layer, gram: Tensor, pattern: Tiles | NM, sparsity: float, gone: Tensor, damp: float
) -> tuple[Tensor, Tensor]:
    """SparseGPT proper: the mask is chosen while the error is being passed on."""
    weight = layer.weight.detach().float()
    options: dict[str, Any] = {"sparsity": sparsity, "pattern": pattern if isinstance(pattern, NM) else None}
    if weight.ndim == 2:
        return obs.sweep(weight, gram[0], damp, removed=gone, **options)
    parts = [obs.sweep(w, g, damp, removed=r, **options) for w, g, r in zip(weight, gram, gone, strict=True)]
    return torch.stack([w for w, _ in parts]), torch.stack([m for _, m in parts])


def removed(layer: Layer) -> Tensor:
    """Weights that an earlier pruning has taken: they stay removed."""
    for change in layer.changes:
        if isinstance(change, Mask):
            return ~change.mask
    return torch.zeros(layer.shape, dtype=torch.bool, device=layer.original.device)


def check_finite(layer: Layer, score: Tensor) -> None:
    if not bool(torch.isfinite(score).all()):
        raise BadInput(
            f"layers: {layer.name} has NaN or infinite saliencies; "
            "its weights or its calibration inputs hold NaN or infinity"
        )


def check_weights(prune: PrunePlan, pattern: Tiles | NM, on: Any) -> None:
    """`BadInput` for a combination that makes no sense for single weights, before anything is computed."""
    layers = on.layers(prune.layers)
    if not scores_weights(prune.saliency):
        raise BadInput(
            f"saliency: {prune.saliency} scores whole structures and dimensions, not single weights; "
            "choose another, or such a pattern"
        )
    if prune.allocation.has("structures") and not prune.allocation.has("weights"):
        raise BadInput(
            f"allocation: {prune.allocation} shares heads and neurons among the blocks; "
            "choose layer, row or global"
        )
    if pattern.fixed is not None and not prune.sparsity_schedule.has("at once"):
        raise BadInput(
            "sparsity_schedule: an N:M pattern has one sparsity, not reached gradually; use one-shot"
        )
    if prune.method.has("refines") and pattern != Tiles(1, 1):
        raise BadInput(f"pattern: {prune.method} exchanges single weights, so it needs pattern unstructured")
    if prune.saliency.has("not across layers") and prune.compares_layers_by_itself():
        raise BadInput(
            f"allocation: {prune.allocation} compares scores across layers and {prune.saliency} scores "
            "do not compare; use layer, row or a loss-like saliency"
        )
    if prune.compensation.has("bias"):
        for layer in layers:
            if layer.bias is None or len(layer.shape) != 2:
                raise BadInput(
                    f"compensation: bias needs a bias in every layer and {layer.name} has none; "
                    "use obs, least-squares or none"
                )
