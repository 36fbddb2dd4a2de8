"""The change that keeps a weight on its grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import Grid
from workbench.quantization.number.split_grid import SplitGrid
from workbench.quantization.transform.coordinates import Transform
from workbench.subjects.changes import Change


class FakeQuant(Change):
    """Rounds a weight to the nearest value of a stored grid.

    Values that are already on the grid stay as they are, so roundings other than nearest (GPTQ, AdaRound,
    ...) write their choice into the weight underneath and this keeps it there. In training the gradient
    passes straight through, and is zero where the weight lies outside the grid's range (Bengio et al. 2013).
    """

    order = 50
    scale: Tensor
    zero: Tensor | None
    smooth: Tensor | None
    signs: Tensor | None
    left: Tensor | None
    right: Tensor | None
    mask: Tensor | None
    wide_scale: Tensor | None
    wide_zero: Tensor | None

    def __init__(
        self,
        scale: Tensor,
        zero: Tensor | None = None,
        smooth: Tensor | None = None,
        signs: Tensor | None = None,
        left: Tensor | None = None,
        right: Tensor | None = None,
        mask: Tensor | None = None,
        wide_scale: Tensor | None = None,
        wide_zero: Tensor | None = None,
        *,
        format: str,
        group: int,
        block: int = 0,
        orthogonal: bool = False,
        wide_format: str = "",
        wide_group: int = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("scale", scale.float())  # (..., out or 1, groups)
        self.register_buffer("zero", None if zero is None else zero.float())
        for name, tensor in (("smooth", smooth), ("signs", signs), ("left", left), ("right", right)):
            self.register_buffer(name, tensor)  # the transform in whose coordinates the grid lies
        for name, tensor in (("mask", mask), ("wide_scale", wide_scale), ("wide_zero", wide_zero)):
            self.register_buffer(name, tensor)  # the grid of salient weights
        self.format, self.group, self.block, self.orthogonal = format, group, block, orthogonal
        self.wide_format, self.wide_group = wide_format, wide_group

    @classmethod
    def of(cls, grid: Grid) -> FakeQuant:
        transform = grid.transform or Transform()
        wide: dict[str, Any] = (
            {}
            if not isinstance(grid, SplitGrid)
            else {
                "mask": grid.mask,
                "wide_scale": grid.wide.scale,
                "wide_zero": grid.wide.zero,
                "wide_format": grid.wide.format.name,
                "wide_group": grid.wide.group,
            }
        )
        return cls(
            grid.scale,
            grid.zero,
            **transform.tensors,
            **wide,
            format=grid.format.name,
            group=grid.group,
            block=transform.block,
            orthogonal=transform.orthogonal,
        )

    @property
    def grid(self) -> Grid:
        transform = Transform.of(dict(self.named_buffers()), self.block, self.orthogonal)
        if self.mask is None:
            return Grid(named(self.format), self.scale, self.zero, self.group, transform)
        assert self.wide_scale is not None
        wide = Grid(named(self.wide_format), self.wide_scale, self.wide_zero, self.wide_group)
        return SplitGrid(
            named(self.format), self.scale, self.zero, self.group, transform, mask=self.mask, wide=wide
        )

    def change(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            rounded = self.grid.round(weight)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return rounded
        grid = self.grid
        moved = weight if grid.transform is None else grid.transform.weight(weight)
        low, high = (bound.to(weight.dtype) for bound in grid.bounds(weight.shape[-1]))
        inside = torch.minimum(torch.maximum(moved, low), high)
        if grid.transform is not None:
            inside = grid.transform.weight_back(inside)
        return inside + (rounded - inside).detach()

    def stored_bytes(self, shape: tuple[int, ...], kept: int | None) -> float | None:
        return self.grid.bytes(shape, kept)

    def config(self) -> dict[str, Any]:
        wide = {} if self.mask is None else {"wide_format": self.wide_format, "wide_group": self.wide_group}
        return {
            "format": self.format,
            "group": self.group,
            "block": self.block,
            "orthogonal": self.orthogonal,
        } | wide
