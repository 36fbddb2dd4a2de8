"""A difference in a number format of the bench."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from workbench.arithmetic.difference.difference import DIFFERENCE, Matrix, Stored
from workbench.axis import Choice, Options, parameter
from workbench.errors import BadInput
from workbench.quantization.number.grid import Grid, fit, group_of
from workbench.quantization.number.number_format import NUMBER_FORMAT
from workbench.quantization.number.packing import packed_matrix, unpacked_matrix


class Rounding(Options):
    format: Choice = NUMBER_FORMAT.choice("int4", "format that the differences are rounded to")
    granularity: Literal["auto", "tensor", "channel", "group", "block"] = parameter(
        "auto", "what shares a scale: auto is the format's own block, or a group"
    )
    group_size: int = parameter(64, "weights of a group (in one row)", ge=1, le=65536, unit="weights")


@DIFFERENCE.add(
    "number-format",
    formula="w = w_base + Q(d), Q the nearest value on a number format's grid",
    source="baseline",
    title="Difference in a number format",
    options=Rounding,
)
class InFormat:
    def __init__(self, options: Rounding) -> None:
        self.options = options
        self.format = options.format()
        if self.format.scale == "none":
            raise BadInput(
                f"method.format: {self.format.name} has no scale, and differences are small; choose one "
                "with a scale, as int4, nf4 or mxfp4"
            )

    def pack(self, matrix: Matrix) -> Stored:
        options = self.options
        grid = fit(matrix.difference, self.format, options.granularity, options.group_size)
        return packed_matrix(grid.round(matrix.difference), grid)

    def unpack(self, stored: Stored, base: Tensor) -> Tensor:
        options = self.options
        group = group_of(self.format, options.granularity, options.group_size, base.shape[1])
        grid = Grid(self.format, stored["scale"].float(), None, group)
        return base + unpacked_matrix(stored, grid, tuple(base.shape))
