"""Pruning of single weights inside matrices: tiles and N:M patterns.

An event makes scores, allocation, masks and new weights of all layers first; then they are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.axis import Choice, Options, parameter
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.pruning.axes import PATTERN, scores_weights
from workbench.pruning.calibration import Calibration, rows_of
from workbench.pruning.compensation import bias_shift
from workbench.pruning.engine.masked import Masked
from workbench.pruning.pattern import NM, Form, Tiles, make_mask, yield_to
from workbench.pruning.solvers import icbs, obs
from workbench.subjects import Layer, Mask


class Matrices(Masked):
    """Masks of single weights, of tiles and of N:M groups."""

    pattern: Tiles | NM

    def check(self, on: Any) -> None:
        prune, layers = self.prune, on.layers(self.prune.layers)
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
        if self.pattern.fixed is not None and not prune.schedule.has("at once"):
            raise BadInput(
                "schedule: an N:M pattern has one sparsity, so it cannot be reached gradually; use one-shot"
            )
        if prune.method.has("refines") and self.pattern != Tiles(1, 1):
            raise BadInput(
                f"pattern: {prune.method} exchanges single weights, so it needs pattern unstructured"
            )
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

    def prune_to(self, sparsity: float) -> None:
        prune = self.prune
        prune_once(
            self.layers,
            self.calibration,
            self.pattern,
            sparsity,
            prune.saliency,
            prune.compensation,
            prune.allocation,
            self.progress,
            prune.method.options if prune.method.has("refines") else None,
        )


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
) -> None:
    """Prune to `sparsity` in all; what is gone already stays gone and counts.
    Stopped before the end, nothing is written. `refinement`: options of iCBS, for a mask that it improves.
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
    shares = uniform(layers, sparsity)
    if pattern.fixed is None:
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
        bias = layer.bias
        assert bias is not None
        with torch.no_grad():
            bias.add_(shift)
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


class NMOptions(Options):
    keep: int = parameter(2, "weights that stay in a group", ge=1)
    of: int = parameter(4, "weights in a group", ge=2)
    along: str = parameter(
        "inputs", "groups run along the inputs or the outputs", pattern="^(inputs|outputs)$"
    )


class TileOptions(Options):
    rows: int = parameter(16, "outputs in a block", ge=1)
    columns: int = parameter(16, "inputs in a block", ge=1)


def n_m(options: NMOptions) -> NM:
    if options.keep >= options.of:
        raise BadInput(
            f"pattern: {options.keep}:{options.of} removes nothing; N:M needs 0 < N < M, such as 2:4"
        )
    return NM(options.keep, options.of, -1 if options.along == "inputs" else -2)


def n_m_text(options: NMOptions) -> str:
    return f"{options.keep}:{options.of}{' outputs' if options.along == 'outputs' else ''}"


def block_text(options: TileOptions) -> str:
    return f"block {options.rows}x{options.columns}"


PATTERN.add("unstructured", formula="every weight by itself", source="Han et al. 2015")(
    Form(lambda options: Tiles(1, 1), Matrices)
)
PATTERN.add(
    "n:m",
    formula="N non-zeros in every M consecutive weights",
    source="Mishra et al. 2021",
    options=NMOptions,
    spelled=n_m_text,
)(Form(n_m, Matrices))
PATTERN.add(
    "block",
    formula="rectangles of R outputs by C inputs",
    source="Gray et al. 2017",
    options=TileOptions,
    spelled=block_text,
)(Form(lambda options: Tiles(options.rows, options.columns), Matrices))
PATTERN.add("row", formula="one output's weights", source="Wen et al. 2016")(
    Form(lambda options: Tiles(1, 0), Matrices)
)
PATTERN.add("column", formula="one input's weights", source="Wen et al. 2016")(
    Form(lambda options: Tiles(0, 1), Matrices)
)
