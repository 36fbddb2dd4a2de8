"""Compensations: what the surviving weights (or the bias) do about the removed ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workbench.errors import BadInput
from workbench.pruning.calibration import Calibration, rows_of
from workbench.pruning.solvers import fisher, obs
from workbench.subjects import Layer

Compensation = Callable[[Layer, Tensor, Calibration], Tensor]  # layer, mask -> new weight (..., out, in)


def none(layer: Layer, mask: Tensor, calibration: Calibration) -> Tensor:
    return layer.weight.detach() * mask


def per_matrix(
    layer: Layer, mask: Tensor, calibration: Calibration, solve: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """`solve(weight, gram, mask)` on the matrix, or on each expert's."""
    weight, gram = layer.weight.detach(), calibration.gram(layer)
    if weight.ndim == 2:
        return solve(weight, gram[0], mask)
    return torch.stack([solve(w, g, m) for w, g, m in zip(weight, gram, mask, strict=True)])


def output_obs(layer: Layer, mask: Tensor, calibration: Calibration) -> Tensor:
    """SparseGPT's column sweep for a mask that is given."""
    return per_matrix(
        layer, mask, calibration, lambda w, g, m: obs.sweep(w * 1.0, g, calibration.damp, mask=m)[0]
    )


def least_squares(layer: Layer, mask: Tensor, calibration: Calibration) -> Tensor:
    return per_matrix(layer, mask, calibration, lambda w, g, m: obs.least_squares(w, g, m, calibration.damp))


def block_fisher(layer: Layer, mask: Tensor, calibration: Calibration) -> Tensor:
    weight = layer.weight.detach()
    found = fisher.update(
        rows_of(weight),
        rows_of(mask),
        calibration.factors(layer),
        calibration.absolute_damp(),
        calibration.block,
    )
    return found.reshape(weight.shape)


COMPENSATIONS: dict[str, Compensation] = {
    "none": none,
    "bias": none,
    "obs": output_obs,
    "least-squares": least_squares,
    "fisher": block_fisher,
}


def bias_shift(layer: Layer, delta: Tensor, calibration: Calibration) -> Tensor:
    """What the bias must gain so that the layer's mean output stays: -delta E[x] (An et al. 2024, FLAP)."""
    if layer.bias is None or delta.ndim != 2:
        raise BadInput(
            f"compensation: bias needs a bias and {layer.name} has none; use obs, least-squares or none"
        )
    return -(delta @ calibration.mean(layer)[0])
