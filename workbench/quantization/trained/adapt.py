"""Fixed-point words that grow and shrink in training (Kummer et al. 2021, AdaPT)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from workbench.axis import Options, parameter
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import Grid, fit
from workbench.quantization.trained.settings import TRAINED_ROUNDING, TrainedSettings
from workbench.quantization.trained.trained_rounding import Course, TrainedRounding

NARROWEST, WIDEST = 2, 16  # bits of a word
MOST = 24  # fraction bits


def lost(weight: Tensor, rounded: Tensor, bins: int) -> float:
    """Kullback-Leibler divergence of a weight's histogram from the rounded one's, nats; both over the
    weight's range, one count added to every bin.
    """
    low, high = float(weight.min()), float(weight.max())
    counts = [torch.histc(w.clamp(low, high), bins, low, high) + 1 for w in (weight, rounded)]
    first, second = (c / c.sum() for c in counts)
    return float((first * (first / second).log()).sum())


def fraction_of(weight: Tensor, bits: int) -> int:
    """Fraction bits that leave room for the largest magnitude in a word."""
    whole = math.ceil(math.log2(max(float(weight.abs().max()), 2.0**-MOST)))
    return min(max(bits - 1 - whole, 0), MOST)


def pushed_down(weight: Tensor, bins: int, tolerance: float) -> int:
    """The fewest bits whose histogram keeps within the tolerance of the weight's."""
    for bits in range(NARROWEST, WIDEST):
        word = named(f"fixed{bits}.{fraction_of(weight, bits)}").element
        if lost(weight, word.round(weight), bins) <= tolerance:
            return bits
    return WIDEST


def pushed_up(diversity: float, fraction: int) -> int:
    """Bits to add, of the diversity sum |g_k| / |sum g_k| of gradients that count alike: one, or with
    l = log(diversity) - 1 > 0 the smaller of ceil(1 / l^2) and what ceil(32 l^2) exceeds the fraction by.
    """
    place = math.log(diversity) - 1 if 0 < diversity < math.inf else 0.0
    if place <= 0:
        return 1
    square = place * place
    return min(max(math.ceil(1 / square), 1), max(min(math.ceil(32 * square), 32) - fraction, 0))


class LookBack(Options):
    look_back: int = parameter(25, "steps between two changes of the words", ge=1, le=10000, unit="steps")
    resolution: int = parameter(100, "bins of the histograms", ge=2, le=10000)
    tolerance: float = parameter(
        0.01, "divergence of the rounded weights' histogram that counts as none", gt=0, le=10, unit="nats"
    )


@TRAINED_ROUNDING.add(
    "adapt",
    formula="least b with KL(hist w || hist Q_b(w)) ~ 0, then bits by sum |g| / |sum g|",
    source="Kummer et al. 2021, AdaPT",
    needs="training",
    title="AdaPT",
    options=LookBack,
)
class AdaptiveWord(TrainedRounding):
    """Each layer's fixed-point word is chosen anew every `look_back` steps: the fewest bits that keep the
    weight's histogram (PushDown), and on top of them bits that grow with the diversity of the gradients seen
    since, each counted with norm 1 (PushUp). In training weights are rounded at random, straight through.

    The authors' code also adapts the look-back, the bins and which of two rules for the added bits counts,
    rounds gradients, adds a sparsifying loss and keeps eight bits more for sums.
    """

    total: Tensor
    seen: Tensor
    bits: Tensor
    fraction: Tensor

    def __init__(
        self, total: Tensor, *, bits: int = WIDEST, bins: int = 100, tolerance: float = 0.01
    ) -> None:
        super().__init__()
        self.bins, self.tolerance, self.drawn, self.due = bins, tolerance, 0, False
        self.register_buffer("total", total)  # sum of the gradients, each over its norm
        self.register_buffer("seen", torch.zeros((), device=total.device))
        self.register_buffer("bits", torch.tensor(bits))
        self.register_buffer("fraction", torch.tensor(0))

    @classmethod
    def begin(cls, weight: Tensor, group: int, settings: TrainedSettings) -> AdaptiveWord:
        options = settings.method.options
        made = cls(torch.zeros_like(weight), bins=options.resolution, tolerance=options.tolerance)
        made.choose(weight)
        return made

    @torch.no_grad()
    def choose(self, weight: Tensor) -> None:
        """The next word, of the weight and the gradients since the last one."""
        bits = pushed_down(weight, self.bins, self.tolerance)
        size = float(self.total.norm())
        diversity = float(self.seen) / size if size > 0 else math.inf
        bits = min(bits + pushed_up(diversity, fraction_of(weight, bits)), WIDEST)
        self.bits.fill_(bits)
        self.fraction.fill_(fraction_of(weight, bits))
        self.total.zero_()
        self.seen.zero_()
        self.due = False

    def prepare(self, course: Course) -> None:
        self.drawn = int(torch.randint(2**31, (), generator=course.generator))
        self.due = int(self.seen) >= course.settings.method.options.look_back

    def add(self, gradient: Tensor) -> None:
        size = gradient.norm()
        if float(size) > 0:
            self.total += gradient / size
            self.seen += 1

    def change(self, weight: Tensor) -> Tensor:
        if not self.training:
            return self.final(weight.float())[0].to(weight.dtype)
        if self.due:
            self.choose(weight.detach())
        random = torch.Generator().manual_seed(self.drawn)
        values = weight + (self.grid(weight).round(weight.detach(), random) - weight).detach()
        if values.requires_grad:
            values.register_hook(self.add)
        return values

    @property
    def width(self) -> Tensor:
        return self.bits.float()

    def grid(self, weight: Tensor) -> Grid:
        return fit(weight, named(f"fixed{int(self.bits)}.{int(self.fraction)}"), "tensor")

    def final(self, weight: Tensor) -> tuple[Tensor, Grid]:
        grid = self.grid(weight)
        return grid.round(weight), grid

    def config(self) -> dict[str, Any]:
        return {"bits": int(self.bits), "bins": self.bins, "tolerance": self.tolerance}
