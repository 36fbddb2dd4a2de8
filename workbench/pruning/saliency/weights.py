"""Saliencies: what removing one weight is thought to cost.
Larger stays; every score is >= 0 and adds up over a unit.

Scores of a unit (a block, a row, a head) are the sums of its weights' scores, so each saliency works with
every pattern whose units it can be summed over; magnitude and Wanda are summed as they are (an L1 norm).

Traits: "loss-like" scores are predicted losses, so they compare across layers as they are; "not across
layers" ones do not compare at all. "consumer side" ones say what a unit is worth where its output is
consumed, the others are summed over all its weights. "follows weights": cheap enough for every step of
training. "one after the other": units are removed one by one, each removal seen by the next. "swept": with a
swept compensation the mask is chosen while the error is passed on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.axis import Options
from workbench.pruning.axes import SALIENCY, BlockFisher, Damped, Gradients
from workbench.pruning.calibration import Calibration, rows_of
from workbench.pruning.pattern import NM, Pattern, Tiles
from workbench.pruning.solvers import fisher, obs
from workbench.subjects import Layer


@SALIENCY.add("random", formula="u ~ U(0, 1)", source="baseline", traits="not across layers")
def random(layer: Layer, calibration: Calibration, pattern: Pattern, options: Options) -> Tensor:
    import zlib

    generator = torch.Generator().manual_seed(calibration.seed * 1_000_003 + zlib.crc32(layer.name.encode()))
    return torch.rand(layer.shape, generator=generator).to(layer.original.device)


@SALIENCY.add("magnitude", formula="|w|", source="Han et al. 2015", traits="follows weights")
def magnitude(layer: Layer, calibration: Calibration, pattern: Pattern, options: Options) -> Tensor:
    return layer.weight.detach().abs()


@SALIENCY.add(
    "wanda",
    formula="|w| * rms(x)",
    source="Sun et al. 2023",
    needs="inputs",
    traits=("consumer side", "not across layers", "follows weights"),
)
def wanda(layer: Layer, calibration: Calibration, pattern: Pattern, options: Options) -> Tensor:
    norm = calibration.norm(layer)
    return layer.weight.detach().abs() * (norm[:, None, :] if len(layer.shape) == 3 else norm)


@SALIENCY.add(
    "fluctuation",
    formula="w^2 * var(x)",
    source="An et al. 2024 (FLAP)",
    needs="inputs",
    traits=("consumer side", "not across layers"),
)
def fluctuation(layer: Layer, calibration: Calibration, pattern: Pattern, options: Options) -> Tensor:
    variance = calibration.variance(layer)
    return layer.weight.detach().square() * (variance[:, None, :] if len(layer.shape) == 3 else variance)


def mean_gradient(layer: Layer, calibration: Calibration, options: Gradients) -> Tensor:
    return calibration.factors(layer, options).mean().reshape(layer.shape)


@SALIENCY.add(
    "gradient",
    formula="|g w|",
    source="Lee et al. 2019 (SNIP)",
    needs="gradients",
    options=Gradients,
    traits="loss-like",
)
def snip(layer: Layer, calibration: Calibration, pattern: Pattern, options: Gradients) -> Tensor:
    return (mean_gradient(layer, calibration, options) * layer.weight.detach()).abs()


def fisher_diagonal(layer: Layer, calibration: Calibration, options: Gradients) -> Tensor:
    gradients = calibration.factors(layer, options)
    weight = rows_of(layer.weight.detach())
    parts = [
        gradients.rows(a, b).square().mean(0)
        for a, b in fisher.chunks(len(weight), weight.shape[-1], gradients.examples)
    ]
    return torch.cat(parts).reshape(layer.shape)


@SALIENCY.add(
    "obd",
    formula="w^2 E[g^2] / 2",
    source="LeCun et al. 1990, empirical Fisher diagonal",
    needs="gradients",
    options=Gradients,
    traits="loss-like",
)
def obd(layer: Layer, calibration: Calibration, pattern: Pattern, options: Gradients) -> Tensor:
    return layer.weight.detach().square() * fisher_diagonal(layer, calibration, options) / 2


@SALIENCY.add(
    "taylor2",
    formula="|g w - w^2 E[g^2] / 2|",
    source="Ma et al. 2023 (LLM-Pruner)",
    needs="gradients",
    options=Gradients,
    traits="loss-like",
)
def taylor2(layer: Layer, calibration: Calibration, pattern: Pattern, options: Gradients) -> Tensor:
    weight = layer.weight.detach()
    return (
        mean_gradient(layer, calibration, options) * weight
        - weight.square() * fisher_diagonal(layer, calibration, options) / 2
    ).abs()


@SALIENCY.add(
    "obs",
    formula="w^2 / (2 [H^-1]_jj), H = E[x x^T]",
    source="Hassibi and Stork 1993, on a layer's outputs",
    needs="inputs",
    options=Damped,
    traits=("consumer side", "not across layers", "one after the other", "swept"),
)
def output_obs(layer: Layer, calibration: Calibration, pattern: Pattern, options: Damped) -> Tensor:
    weight, gram = layer.weight.detach(), calibration.gram(layer)
    if len(layer.shape) == 2:
        return obs.static_saliency(weight, gram[0], options.damp)
    return torch.stack([obs.static_saliency(w, g, options.damp) for w, g in zip(weight, gram, strict=True)])


@SALIENCY.add(
    "fisher",
    formula="w^2 / (2 [F^-1]_qq), F block-diagonal",
    source="Kurtic et al. 2022 (oBERT)",
    needs="gradients",
    options=BlockFisher,
    traits="loss-like",
)
def block_fisher(layer: Layer, calibration: Calibration, pattern: Pattern, options: BlockFisher) -> Tensor:
    return fisher_scores(layer, calibration, pattern, options, greedy=False)


@SALIENCY.add(
    "fisher-greedy",
    formula="w^2 / (2 [F^-1]_qq), updated after every removal",
    source="Kurtic et al. 2022, Frantar and Alistarh 2022",
    needs="gradients",
    options=BlockFisher,
    traits="loss-like",
)
def greedy_fisher(layer: Layer, calibration: Calibration, pattern: Pattern, options: BlockFisher) -> Tensor:
    return fisher_scores(layer, calibration, pattern, options, greedy=True)


def fisher_scores(
    layer: Layer, calibration: Calibration, pattern: Pattern, options: BlockFisher, greedy: bool
) -> Tensor:
    weight, gradients = rows_of(layer.weight.detach()), calibration.factors(layer, options)
    damp = calibration.absolute_damp(options, options.damp)
    if isinstance(pattern, NM) and pattern.along == -1 and pattern.of <= 8:
        return fisher.nm_scores(weight, gradients, damp, options.block, pattern).reshape(layer.shape)
    if isinstance(pattern, Tiles) and joint(pattern, weight.shape[-1], options.block) and not greedy:
        return fisher.tile_scores(weight, gradients, damp, options.block, pattern).reshape(layer.shape)
    return fisher.saliency(weight, gradients, damp, options.block, greedy).reshape(layer.shape)


def joint(tiles: Tiles, inputs: int, block: int) -> bool:
    """Whether the rows of a tile lie inside blocks of the Fisher matrix, so that its cost is a joint one."""
    return 1 < tiles.columns <= block and inputs % tiles.columns == 0
