"""Salient weights kept on a wider grid than the rest: whole input features (a one-dimensional mask)
or single weights (a mask entry each).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.axis import Axis, Choice, Options, parameter
from workbench.quantization.number.formats import Format, named
from workbench.quantization.number.grid import Grid, fit

#: `entry(weight, gram, options)` scores the weights (out, in), or the input features (1, in), that stay wide;
#: None where none do.
SALIENT = Axis(
    "salient",
    "weights that matter most to their row's output, kept on a wider grid",
    found_in="workbench.quantization.number",
    home="quantize.salient",
)


class Wide(Options):
    share: float = parameter(0.1, "share of each row's weights", gt=0, le=0.5, step=0.05)
    bits: int = parameter(4, "width of the salient weights", ge=2, le=8, unit="bits")


@SALIENT.add("none", formula="no weight", source="one grid for all")
def none(weight: Tensor, gram: Tensor, options: Options) -> None:
    """One grid for every weight."""


@SALIENT.add("columns", formula="G_jj", source="Zhao et al. 2025, PTQ1.61", needs="inputs", options=Wide)
def columns(weight: Tensor, gram: Tensor, options: Wide) -> Tensor:
    """Whole input features, those with the most energy."""
    return gram.diagonal().clamp_min(0)[None]


@SALIENT.add(
    "weights",
    formula="|w_ij| (G_jj)^1/2",
    source="Sun et al. 2023, Wanda's score",
    needs="inputs",
    options=Wide,
)
def weights(weight: Tensor, gram: Tensor, options: Wide) -> Tensor:
    """Single weights, whose places cost bits."""
    return weight.abs() * gram.diagonal().clamp_min(0).sqrt()


@dataclass(frozen=True)
class Salient:
    """Which weights stay wide. share : of a row, the same number in every row;
    bits : their width, with a zero point

    pattern : of `SALIENT`: "columns", the input features with the most energy (Zhao et al. 2025, PTQ1.61);
        "weights", in each row those with the largest |w_ij| (G_jj)^1/2, as Sun et al. (2023) rank them,
        where only their place costs more
    """

    share: float
    bits: int = 4
    pattern: Choice | str = "columns"

    def mask(self, weight: Tensor, gram: Tensor) -> Tensor:
        """(1, in) or (out, in), True where a weight (out, in) stays wide, for inputs of second moment
        (in, in).
        """
        score = SALIENT.chosen(self.pattern)(weight, gram)
        found = torch.zeros_like(score, dtype=torch.bool)
        chosen = score.argsort(dim=-1, descending=True, stable=True)[:, : self.count(weight.shape[-1])]
        return found.scatter_(-1, chosen, True)

    def count(self, width: int) -> int:
        """Wide weights of a row: at least one, and never all."""
        return min(max(1, round(self.share * width)), width - 1)

    def grid(
        self, weight: Tensor, gram: Tensor, format: Format, granularity: str, group_size: int, rule: str
    ) -> SplitGrid:
        """Both grids fitted on the weights they hold; groups run over those alone."""
        mask = self.mask(weight, gram)
        energy = gram.diagonal().expand_as(weight)
        parts = []
        for kept, chosen, how in (
            (mask, named("int", self.bits, False), "mse" if rule == "mse" else "minmax"),
            (~mask, format, rule),
        ):
            importance = taken(energy, kept) if how == "mse" else None
            parts.append(
                fit(
                    taken(weight, kept),
                    chosen,
                    "auto" if granularity == "block" else granularity,
                    group_size,
                    how,
                    importance,
                )
            )
        wide, rest = parts
        return SplitGrid(rest.format, rest.scale, rest.zero, rest.group, mask=mask, wide=wide)


def taken(table: Tensor, mask: Tensor) -> Tensor:
    """The entries (out, n) of a matrix (out, in) where a mask with n True a row is True, in order."""
    return table[:, mask[0]] if len(mask) == 1 else table[mask].view(len(table), -1)


@dataclass(frozen=True, kw_only=True)
class SplitGrid(Grid):
    """A grid of the weights outside `mask`, moved together, and another, `wide`, of those inside.
    Rows, not experts.

    mask : (1, in) or (out, in), the same number of True in every row;
        transform : acts on the whole weight, before the split
    """

    mask: Tensor
    wide: Grid

    @property
    def rest(self) -> Grid:
        return Grid(self.format, self.scale, self.zero, self.group)

    def joined(self, rest: Tensor, wide: Tensor) -> Tensor:
        """(out, in) from what is outside and inside the mask, each (out or 1, n)."""
        rows = max(len(rest), len(wide), len(self.mask))
        place = (
            self.mask.long().argsort(dim=-1, stable=True).argsort(dim=-1)
        )  # where each column lies when those outside come first
        both = torch.cat([rest.expand(rows, -1), wide.expand(rows, -1)], -1)
        return both.index_select(-1, place[0]) if len(place) == 1 else both.gather(-1, place)

    def round(self, weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if self.transform is not None:
            return super().round(weight, generator)  # which comes back here in the transform's coordinates
        return self.joined(
            self.rest.round(taken(weight, ~self.mask), generator),
            self.wide.round(taken(weight, self.mask), generator),
        )

    def columns(self, width: int) -> tuple[Tensor, Tensor | None]:
        inside = int(self.mask[0].sum())
        (scale, zero), (wide_scale, wide_zero) = self.rest.columns(width - inside), self.wide.columns(inside)
        none = torch.zeros(1, 1, device=scale.device)
        zeros = (
            none.expand(1, n) if z is None else z for z, n in ((zero, width - inside), (wide_zero, inside))
        )
        return self.joined(scale, wide_scale), None if zero is None and wide_zero is None else self.joined(
            *zeros
        )

    def codes(self, weight: Tensor) -> Tensor:
        moved = weight if self.transform is None else self.transform.weight(weight)
        return self.joined(
            self.rest.codes(taken(moved, ~self.mask)), self.wide.codes(taken(moved, self.mask))
        )

    def decode(self, codes: Tensor) -> Tensor:
        values = self.joined(
            self.rest.decode(taken(codes, ~self.mask)), self.wide.decode(taken(codes, self.mask))
        )
        return values if self.transform is None else self.transform.weight_back(values)

    def bounds(self, width: int) -> tuple[Tensor, Tensor]:
        inside = int(self.mask[0].sum())
        low, high = (
            self.joined(*pair)
            for pair in zip(self.rest.bounds(width - inside), self.wide.bounds(inside), strict=True)
        )
        return low, high

    def bytes(self, shape: tuple[int, ...], kept: int | None = None) -> float:
        """Both parts in full, the transform, and the mask: a bit a feature, or for single weights the index
        of each row's choice among all of its size, which takes no more bits than the choices' logarithm
        (enumerative coding, Cover 1973).
        """
        rows, width = shape
        inside = int(self.mask[0].sum())
        place = width if len(self.mask) == 1 else rows * index_bits(width, inside)
        own = self.rest.bytes((rows, width - inside)) + self.wide.bytes((rows, inside)) + place / 8
        return own + (0 if self.transform is None else self.transform.bytes)


def index_bits(width: int, inside: int) -> int:
    """Bits that number every choice of `inside` among `width` places."""
    return (math.comb(width, inside) - 1).bit_length()


def effective_bits(
    rows: int, width: int, share: float, bits: int = 4, pattern: str = "columns", column_factors: bool = False
) -> float:
    """Bits a weight of a binarised matrix with a mean and a scale a row (16 bits each), the salient share in
    `bits` with a 16-bit scale and a zero point a row, the mask, and 16 bits a feature for column factors.
    PTQ1.61's count for wide rows: 0.8 + 0.2 x 4 and next to nothing.
    """
    inside = Salient(share, bits, pattern).count(width)
    place = width / rows if pattern == "columns" else index_bits(width, inside)
    return (
        width - inside + inside * bits + 32 + 16 + bits + place + (16 * width / rows if column_factors else 0)
    ) / width
