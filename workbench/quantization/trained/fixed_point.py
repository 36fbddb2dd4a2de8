"""Fixed-point weights whose binary point is trained, and weights made of a few signed powers of two
(Dai et al. 2024, QFX).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workbench.axis import parameter
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import Grid, fit
from workbench.quantization.trained.settings import TRAINED_ROUNDING, TrainedSettings
from workbench.quantization.trained.trained_rounding import TrainedRounding, Width

MOST = 24  # fraction bits


def few_powers(units: Tensor, terms: int, highest: float) -> Tensor:
    """Integers nearest to `units` among sums of at most `terms` signed powers of two that stay within
    `highest` = 2^n - 1, found term by term: what is left, to its nearest power;
    the last one is halved where the sum would leave the word.
    """
    left, found = units.clamp(-highest, highest), torch.zeros_like(units)
    for term in range(terms):
        size = left.abs()
        power = torch.exp2(torch.floor(torch.log2(size.clamp_min(0.5) / 0.75))).clamp_min(
            1.0
        )  # from 3/4 of a power on, the power is nearer than its half
        step = torch.where(size >= 0.5, left.sign() * power, torch.zeros_like(left))
        if term == terms - 1:
            step = torch.where((found + step).abs() > highest, step / 2, step)
        found, left = found + step, left - step
    return found


class Powers(Width):
    nonzero_bits: int = parameter(0, "signed powers of two that a weight may consist of (0: any)", ge=0, le=7)


@TRAINED_ROUNDING.add(
    "fixed",
    formula="clip(round(w 2^f)) 2^-f, f learned",
    source="Dai et al. 2024, QFX",
    needs="training",
    title="QFX",
    options=Powers,
)
class LearnedPoint(TrainedRounding):
    """clip(round(w 2^f), -2^(b-1), 2^(b-1) - 1) 2^-f with b bits in all and the fraction bits f of a tensor
    learned, straight through both roundings.

    With `terms` a weight keeps at most so many nonzero signed bits, so that a product is that many shifts. f
    starts where the squared error is least. Only weights are rounded here;
    the paper's fixed-point norms and its hardware library are not part of this.
    """

    rate = 30.0

    def __init__(self, place: Tensor, *, bits: int, terms: int) -> None:
        super().__init__()
        self.place = nn.Parameter(place)  # () real-valued f
        self.bits, self.terms = bits, terms

    @classmethod
    def begin(cls, weight: Tensor, group: int, settings: TrainedSettings) -> LearnedPoint:
        def error(fraction: int) -> float:
            return float(
                (
                    cls.rounded(
                        weight, fraction, settings.method.options.bits, settings.method.options.nonzero_bits
                    )
                    - weight
                )
                .square()
                .sum()
            )

        best = min(range(MOST + 1), key=error)
        return cls(
            torch.tensor(float(best), device=weight.device),
            bits=settings.method.options.bits,
            terms=settings.method.options.nonzero_bits,
        )

    @staticmethod
    def rounded(weight: Tensor, fraction: int, bits: int, terms: int) -> Tensor:
        values = named(f"fixed{bits}.{fraction}").element.round(weight)
        return (
            few_powers(values * 2.0**fraction, terms, 2.0 ** (bits - 1) - 1) * 2.0**-fraction
            if terms
            else values
        )

    @property
    def fraction(self) -> int:
        return int(self.place.detach().round().clamp(0, MOST))

    def change(self, weight: Tensor) -> Tensor:
        place = self.place + (self.fraction - self.place).detach()
        step = torch.exp2(-place)
        half = 2.0 ** (self.bits - 1)
        units = (weight / step).clamp(-half, half - 1)
        values = self.rounded(weight.detach().float(), self.fraction, self.bits, self.terms).to(weight.dtype)
        moving = (units + (values / step.detach() - units).detach()) * step
        return moving + (values - moving).detach()

    def final(self, weight: Tensor) -> tuple[Tensor, Grid]:
        grid = fit(weight, named(f"fixed{self.bits}.{self.fraction}"), "tensor")
        return self.rounded(weight, self.fraction, self.bits, self.terms), grid

    def config(self) -> dict[str, Any]:
        return {"bits": self.bits, "terms": self.terms}
