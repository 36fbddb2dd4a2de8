"""Roundings: how a weight (out, in) is put on a grid.
One `Problem` in, values on a grid out, whatever the method.

Every method here minimises (or ignores) the layer's reconstruction error ||(Q - W) X||_F^2 = tr((Q - W) G
(Q - W)^T), which needs nothing of the calibration data but the second moment G = X X^T.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from workbench.quantization.number.formats import Format
from workbench.quantization.number.grid import Grid, fit
from workbench.quantization.number.split_grid import Salient
from workbench.quantization.rounding.feedback import Factors
from workbench.quantization.transform.coordinates import Transform


@dataclass
class Problem:
    """One matrix to round.

    weight : (out, in) float32, zeros where pruned;
        gram : (in, in) second moment of the inputs the quantized layer will see
    mask : True where a weight is kept, or None;  generator : the source of every random choice
    largest : (in,) largest magnitude of each input in calibration, for transforms that ask for it
    salient : weights that stay on a wider grid, or None;  layer : its name in the model
    rows, activation : (tokens, in) sampled inputs and the format they will be rounded to per token,
        for transforms that minimise both errors
    """

    weight: Tensor
    gram: Tensor
    format: Format
    granularity: str = "auto"
    group_size: int = 64
    rule: str = "auto"
    mask: Tensor | None = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    factors: Factors = field(default_factory=Factors)
    largest: Tensor | None = None
    rows: Tensor | None = None
    activation: Format | None = None
    salient: Salient | None = None
    layer: str = ""

    def moved(self, transform: Transform) -> Problem:
        """The same problem in a transform's coordinates."""
        return replace(
            self,
            weight=transform.weight(self.weight),
            gram=transform.gram(self.gram),
            largest=None,
            rows=None,
        )

    def grid(self) -> Grid:
        """The format's grid on this weight; clipping searches weigh each column's error by its inputs'
        energy.
        """
        if self.salient is not None:
            return self.salient.grid(
                self.weight, self.gram, self.format, self.granularity, self.group_size, self.rule
            )
        return fit(
            self.weight,
            self.format,
            self.granularity,
            self.group_size,
            self.rule,
            self.gram.diagonal() if self.rule == "mse" else None,
        )

    def masked(self, values: Tensor) -> Tensor:
        return values if self.mask is None else values * self.mask

    def error(self, values: Tensor) -> float:
        """Relative reconstruction error tr((Q-W) G (Q-W)^T) / tr(W G W^T)."""
        gap = values - self.weight
        size = float(((self.weight @ self.gram) * self.weight).sum())
        return float(((gap @ self.gram) * gap).sum()) / max(size, 1e-30)
