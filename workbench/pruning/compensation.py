"""Compensations: what the surviving weights (or the bias) do about the removed ones.

Traits: "weights", "structures": what they have a form for. "nothing": weights stay as they are. "bias": the
bias takes what is lost. "swept": see `workbench.pruning.saliency.weights`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workbench.axis import Options
from workbench.errors import BadInput
from workbench.pruning.axes import COMPENSATION, BlockFisher, Damped
from workbench.pruning.calibration import Calibration, rows_of
from workbench.pruning.solvers import fisher, obs
from workbench.subjects import Layer


@COMPENSATION.add("none", formula="w M", source="baseline", traits=("weights", "structures", "nothing"))
def none(layer: Layer, mask: Tensor, calibration: Calibration, options: Options) -> Tensor:
    return layer.weight.detach() * mask


@COMPENSATION.add(
    "bias",
    formula="b -= (w M - w) E[x]",
    source="An et al. 2024 (FLAP)",
    needs="inputs",
    traits=("weights", "structures", "nothing", "bias"),
)
def bias(layer: Layer, mask: Tensor, calibration: Calibration, options: Options) -> Tensor:
    """The weights stay as they are; see `bias_shift`."""
    return layer.weight.detach() * mask


def per_matrix(
    layer: Layer, mask: Tensor, calibration: Calibration, solve: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """`solve(weight, gram, mask)` on the matrix, or on each expert's, in the second moment's type."""
    gram = calibration.gram(layer)
    weight = layer.weight.detach().to(gram.dtype)
    if weight.ndim == 2:
        return solve(weight, gram[0], mask).to(layer.weight.dtype)
    solved = [solve(w, g, m) for w, g, m in zip(weight, gram, mask, strict=True)]
    return torch.stack(solved).to(layer.weight.dtype)


@COMPENSATION.add(
    "obs",
    formula="dw = -w_q / [H^-1]_qq H^-1_:,q, column by column",
    source="Frantar and Alistarh 2023 (SparseGPT)",
    needs="inputs",
    options=Damped,
    traits=("weights", "swept"),
)
def output_obs(layer: Layer, mask: Tensor, calibration: Calibration, options: Damped) -> Tensor:
    """SparseGPT's column sweep for a mask that is given."""
    return per_matrix(
        layer, mask, calibration, lambda w, g, m: obs.sweep(w * 1.0, g, options.damp, mask=m)[0]
    )


@COMPENSATION.add(
    "least-squares",
    formula="argmin_v ||(w - v) X|| over v with the mask's zeros",
    source="Kurtic, Frantar and Alistarh 2023 (ZipLM)",
    needs="inputs",
    options=Damped,
    traits=("weights", "structures"),
)
def least_squares(layer: Layer, mask: Tensor, calibration: Calibration, options: Damped) -> Tensor:
    return per_matrix(layer, mask, calibration, lambda w, g, m: obs.least_squares(w, g, m, options.damp))


@COMPENSATION.add(
    "fisher",
    formula="dw = -F^-1 E (E^T F^-1 E)^-1 w_Q, F block-diagonal",
    source="Kurtic et al. 2022 (oBERT)",
    needs="gradients",
    options=BlockFisher,
    traits="weights",
)
def block_fisher(layer: Layer, mask: Tensor, calibration: Calibration, options: BlockFisher) -> Tensor:
    weight = layer.weight.detach()
    found = fisher.update(
        rows_of(weight),
        rows_of(mask),
        calibration.factors(layer, options),
        calibration.absolute_damp(options, options.damp),
        options.block,
    )
    return found.reshape(weight.shape)


def bias_shift(layer: Layer, delta: Tensor, calibration: Calibration) -> Tensor:
    """What the bias must gain so that the layer's mean output stays: -delta E[x] (An et al. 2024, FLAP)."""
    if layer.bias is None or delta.ndim != 2:
        raise BadInput(
            f"compensation: bias needs a bias and {layer.name} has none; use obs, least-squares or none"
        )
    mean = calibration.mean(layer)[0]
    return -(delta.to(mean.dtype) @ mean).to(delta.dtype)
