"""One pruning event: scores, allocation, masks and new weights of all layers first, then they are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.pruning.allocation.shares import allocate
from workbench.pruning.calibration import Calibration, rows_of
from workbench.pruning.compensation import COMPENSATIONS, bias_shift
from workbench.pruning.pattern import NM, Pattern, Tiles, make_mask, yield_to
from workbench.pruning.saliency.weights import SALIENCIES
from workbench.pruning.solvers import icbs, obs
from workbench.subjects import Layer, Mask


def prune_once(
    layers: Sequence[Layer],
    calibration: Calibration,
    pattern: Tiles | NM,
    sparsity: float,
    saliency: str,
    compensation: str,
    allocation: str,
    progress: Progress,
    movement: dict[str, Tensor] | None = None,
    refine: bool = False,
) -> None:
    """Prune to `sparsity` in all; what is gone already stays gone and counts.
    Stopped before the end, nothing is written.
    """
    gone = {layer.name: removed(layer) for layer in layers}
    sweeping = saliency == "obs" and compensation == "obs" and on_the_way(pattern)
    scores: dict[str, Tensor] = {}
    if saliency == "movement":
        lowest = min(float(s.min()) for s in (movement or {}).values())
        scores = {
            layer.name: yield_to((movement or {})[layer.name] - lowest, gone[layer.name], pattern)
            for layer in layers
        }
    elif not sweeping or allocation == "global":
        for layer in progress.track(layers, f"saliency {saliency}"):
            score = calibration.scores(
                saliency,
                pattern,
                layer,
                lambda a: SALIENCIES[saliency].score(a, calibration, pattern).float(),
            )
            check_finite(layer, score)
            scores[layer.name] = yield_to(score, gone[layer.name], pattern)
        if progress.stopped:
            return
    within = {"row": "row", "global": "stack"}.get(allocation, "matrix")
    shares = allocate(allocation, layers, scores, pattern, sparsity)
    made: dict[str, tuple[Tensor, Tensor]] = {}
    shifts: dict[str, Tensor] = {}
    for layer in progress.track(layers, f"compensation {compensation}"):
        if sweeping:
            made[layer.name] = swept(layer, calibration, pattern, shares[layer.name], gone[layer.name])
            continue
        score = scores.pop(layer.name)
        mask = make_mask(score, pattern, shares[layer.name], within) & ~gone[layer.name]
        if refine:
            mask = refined(layer, mask, score, calibration)
        made[layer.name] = (COMPENSATIONS[compensation](layer, mask, calibration), mask)
        if compensation == "bias":
            weight = layer.weight.detach()
            shifts[layer.name] = bias_shift(layer, weight * mask - weight, calibration)
    if progress.stopped:
        return
    for layer in layers:
        write(layer, *made.pop(layer.name), compensation, shifts.get(layer.name))


def refined(layer: Layer, mask: Tensor, score: Tensor, calibration: Calibration) -> Tensor:
    """iCBS: exchange weights near the boundary as long as the predicted loss falls."""
    found, *_ = icbs.refine(
        rows_of(layer.weight.detach()),
        rows_of(mask),
        rows_of(score),
        calibration.factors(layer),
        calibration.absolute_damp(),
        seed=calibration.seed,
    )
    return found.reshape(mask.shape)


def write(layer: Layer, weight: Tensor, mask: Tensor, compensation: str, shift: Tensor | None) -> None:
    """Put a layer's new weight and mask, and what its bias gains, in place."""
    old = layer.weight.detach()
    if shift is not None:
        bias = layer.bias
        assert bias is not None
        with torch.no_grad():
            bias.add_(shift)
    elif compensation != "none":
        # Written as a difference, so that low-rank terms and number formats on the same weight keep their
        # meaning.
        stored = layer.original.detach()
        layer.write((stored.mT if layer.transposed else stored) + (weight - old * mask))
    layer.attach(Mask(mask.contiguous()))


def on_the_way(pattern: Pattern) -> bool:
    """True for the patterns that SparseGPT's sweep can choose column by column."""
    return pattern.along == -1 if isinstance(pattern, NM) else isinstance(pattern, Tiles) and pattern.single


def swept(
    layer: Layer, calibration: Calibration, pattern: Pattern, sparsity: float, gone: Tensor
) -> tuple[Tensor, Tensor]:
    """SparseGPT proper: the mask is chosen while the error is being passed on."""
    weight, gram = layer.weight.detach().float(), calibration.gram(layer)
    options: dict[str, Any] = {"sparsity": sparsity, "pattern": pattern if isinstance(pattern, NM) else None}
    if weight.ndim == 2:
        return obs.sweep(weight, gram[0], calibration.damp, removed=gone, **options)
    parts = [
        obs.sweep(w, g, calibration.damp, removed=r, **options)
        for w, g, r in zip(weight, gram, gone, strict=True)
    ]
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


def zero_share(layers: Sequence[Layer]) -> float:
    return sum(int((layer.weight == 0).sum()) for layer in layers) / sum(
        layer.original.numel() for layer in layers
    )
