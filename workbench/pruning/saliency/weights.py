"""Saliencies: what removing one weight is thought to cost.
Larger stays; every score is >= 0 and adds up over a unit.

Scores of a unit (a block, a row, a head) are the sums of its weights' scores, so each saliency works with
every pattern whose units it can be summed over; magnitude and Wanda are summed as they are (an L1 norm).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.pruning.calibration import Calibration, rows_of
from workbench.pruning.pattern import NM, Pattern
from workbench.pruning.solvers import fisher, obs
from workbench.subjects import Layer


@dataclass(frozen=True)
class Saliency:
    """A scoring rule: (layer, calibration, pattern) -> scores (..., out, in);
    `needs` inputs or gradients, or nothing.
    """

    score: Callable[[Layer, Calibration, Pattern], Tensor]
    formula: str
    source: str
    needs: str = ""
    loss_like: bool = False  # scores are predicted losses, so they may be compared across layers


def random(layer: Layer, calibration: Calibration, pattern: Pattern) -> Tensor:
    import zlib

    generator = torch.Generator().manual_seed(calibration.seed * 1_000_003 + zlib.crc32(layer.name.encode()))
    return torch.rand(layer.shape, generator=generator).to(layer.original.device)


def magnitude(layer: Layer, calibration: Calibration, pattern: Pattern) -> Tensor:
    return layer.weight.detach().abs()


def wanda(layer: Layer, calibration: Calibration, pattern: Pattern) -> Tensor:
    norm = calibration.norm(layer)
    return layer.weight.detach().abs() * (norm[:, None, :] if len(layer.shape) == 3 else norm)


def fluctuation(layer: Layer, calibration: Calibration, pattern: Pattern) -> Tensor:
    variance = calibration.variance(layer)
    return layer.weight.detach().square() * (variance[:, None, :] if len(layer.shape) == 3 else variance)


def mean_gradient(layer: Layer, calibration: Calibration) -> Tensor:
    return calibration.factors(layer).mean().reshape(layer.shape)


def snip(layer: Layer, calibration: Calibration, pattern: Pattern) -> Tensor:
    return (mean_gradient(layer, calibration) * layer.weight.detach()).abs()


def fisher_diagonal(layer: Layer, calibration: Calibration) -> Tensor:
    gradients = calibration.factors(layer)
    weight = rows_of(layer.weight.detach())
    parts = [
        gradients.rows(a, b).square().mean(0)
        for a, b in fisher.chunks(len(weight), weight.shape[-1], gradients.examples)
    ]
    return torch.cat(parts).reshape(layer.shape)


def obd(layer: Layer, calibration: Calibration, pattern: Pattern) -> Tensor:
    return layer.weight.detach().square() * fisher_diagonal(layer, calibration) / 2


def taylor2(layer: Layer, calibration: Calibration, pattern: Pattern) -> Tensor:
    weight = layer.weight.detach()
    return (
        mean_gradient(layer, calibration) * weight - weight.square() * fisher_diagonal(layer, calibration) / 2
    ).abs()


def output_obs(layer: Layer, calibration: Calibration, pattern: Pattern) -> Tensor:
    weight, gram = layer.weight.detach(), calibration.gram(layer)
    if len(layer.shape) == 2:
        return obs.static_saliency(weight, gram[0], calibration.damp)
    return torch.stack(
        [obs.static_saliency(w, g, calibration.damp) for w, g in zip(weight, gram, strict=True)]
    )


def block_fisher(layer: Layer, calibration: Calibration, pattern: Pattern, greedy: bool = False) -> Tensor:
    weight, gradients, damp = (
        rows_of(layer.weight.detach()),
        calibration.factors(layer),
        calibration.absolute_damp(),
    )
    if isinstance(pattern, NM) and pattern.along == -1 and pattern.of <= 8:
        return fisher.nm_scores(weight, gradients, damp, calibration.block, pattern).reshape(layer.shape)
    return fisher.saliency(weight, gradients, damp, calibration.block, greedy).reshape(layer.shape)


def greedy_fisher(layer: Layer, calibration: Calibration, pattern: Pattern) -> Tensor:
    return block_fisher(layer, calibration, pattern, greedy=True)


SALIENCIES: dict[str, Saliency] = {
    "random": Saliency(random, "u ~ U(0, 1)", "baseline"),
    "magnitude": Saliency(magnitude, "|w|", "Han et al. 2015"),
    "wanda": Saliency(wanda, "|w| * rms(x)", "Sun et al. 2023", "inputs"),
    "fluctuation": Saliency(fluctuation, "w^2 * var(x)", "An et al. 2024 (FLAP)", "inputs"),
    "gradient": Saliency(snip, "|g w|", "Lee et al. 2019 (SNIP)", "gradients", True),
    "obd": Saliency(obd, "w^2 E[g^2] / 2", "LeCun et al. 1990, empirical Fisher diagonal", "gradients", True),
    "taylor2": Saliency(taylor2, "|g w - w^2 E[g^2] / 2|", "Ma et al. 2023 (LLM-Pruner)", "gradients", True),
    "obs": Saliency(
        output_obs,
        "w^2 / (2 [H^-1]_jj), H = E[x x^T]",
        "Hassibi and Stork 1993, on a layer's outputs",
        "inputs",
    ),
    "fisher": Saliency(
        block_fisher, "w^2 / (2 [F^-1]_qq), F block-diagonal", "Kurtic et al. 2022 (oBERT)", "gradients", True
    ),
    "fisher-greedy": Saliency(
        greedy_fisher,
        "the same, updated after every removal",
        "Kurtic et al. 2022, Frantar and Alistarh 2022",
        "gradients",
        True,
    ),
}
