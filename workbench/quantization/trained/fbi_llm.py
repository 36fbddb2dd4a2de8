"""Binary weights with a learned scale and a learned offset:
two values a column (or row), wherever they are best.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from workbench.axis import Options, parameter
from workbench.quantization.activations.activations import signs
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import Grid, in_groups, stored
from workbench.quantization.trained.settings import TRAINED_ROUNDING, TrainedSettings
from workbench.quantization.trained.trained_rounding import TrainedRounding, spread

SMALLEST, LARGEST = 2.0**-24, 65504.0  # of 16-bit floats


class Shared(Options):
    shared: Literal["column", "row"] = parameter(
        "column", "a scale and an offset for every input feature (column), or for every group of a row"
    )


@TRAINED_ROUNDING.add(
    "fbi",
    formula="alpha sign(w) + beta, both learned",
    source="Ma, Sun and Shen 2024, FBI-LLM",
    needs="training",
    title="FBI-LLM",
    options=Shared,
)
class ShiftedSign(TrainedRounding):
    """FBI-LLM (Ma, Sun, Shen 2024): alpha sign(w) + beta with learned alpha and beta,
    straight through the sign for every w.

    They begin at beta = mean w and alpha = mean |w - beta| of what shares them, which is a column
    of the matrix (an input feature) as in the paper's published code, or a group in a row. The forward pass
    already uses what will be stored, the 16-bit scale |alpha| and zero point -beta / |alpha| of a grid of -1
    and 1; the gradients are those of the formula: sum g sign(w), sum g, and alpha g.
    """

    def __init__(self, alpha: Tensor, beta: Tensor, *, group: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(alpha), nn.Parameter(beta)  # (..., out or 1, groups)
        self.group = group

    @classmethod
    def begin(cls, weight: Tensor, group: int, settings: TrainedSettings) -> ShiftedSign:
        """A column of `weight` (..., out, in) shares the two when `shared` is "column",
        else `group` weights of a row do.
        """
        blocks = (
            weight.mT.unsqueeze(-3)
            if settings.method.options.shared == "column"
            else in_groups(weight, group)
        )  # (..., out or 1, groups, members)
        beta = blocks.mean(-1)
        return cls(
            (blocks - beta.unsqueeze(-1)).abs().mean(-1),
            beta,
            group=1 if settings.method.options.shared == "column" else group,
        )

    def grid(self) -> Grid:
        format = named("binary")
        scale = stored(self.alpha.detach().abs().clamp_min(SMALLEST), format)
        zero = (-self.beta.detach() / scale).clamp(-LARGEST, LARGEST).to(torch.float16).to(scale.dtype)
        return Grid(format, scale, zero, self.group)

    def change(self, weight: Tensor) -> Tensor:
        alpha, beta = (spread(t, self.group, weight.shape[-1]) for t in (self.alpha, self.beta))
        sign = weight + (signs(weight) - weight).detach()
        formula = alpha * sign + beta
        return (formula + (self.final(weight.detach())[0] - formula).detach()).to(weight.dtype)

    def final(self, weight: Tensor) -> tuple[Tensor, Grid]:
        grid = self.grid()
        scale, zero = grid.columns(weight.shape[-1])
        assert zero is not None
        flipped = signs(
            spread(self.alpha.detach(), self.group, weight.shape[-1])
        )  # a grid's scale is positive, alpha may have crossed zero
        return (signs(weight) * flipped - zero) * scale, grid

    def config(self) -> dict[str, Any]:
        return {"group": self.group}
