"""Sparsity patterns: which weights must be zero together,
and how a matrix of scores becomes a mask that obeys that.

A pattern divides a matrix (out, in) into *units*. Scores of a unit's members are reduced to one,
and the units with the smallest scores go. Ragged edges are units of their own, so any shape works.

unstructured        every weight by itself
N:M [outputs]       exactly N non-zeros in every M consecutive weights along the inputs (or the outputs)
block RxC           rectangles of R outputs by C inputs
row, column         one output's weights; one input's weights
heads, neurons, heads+neurons
                    coupled structures that span several matrices (see `workbench.subjects.structure.units`)
channels, layers, experts
                    dimensions of the architecture, cut for the whole model at once
                    (see `workbench.subjects.structure.dimensions`)
hybrid RxC          blocks in attention and whole neurons elsewhere, for trained gates only
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.axis import Choice
from workbench.kernels.sparse.threshold import kth_smallest
from workbench.pruning.axes import PATTERN


@dataclass(frozen=True)
class Tiles:
    """Rectangles of `rows` outputs by `columns` inputs; 0 stands for the whole dimension."""

    rows: int
    columns: int

    fixed: ClassVar[float | None] = None
    kinds: ClassVar[tuple[str, ...]] = ()

    @property
    def tiles(self) -> Tiles:
        return self

    @property
    def stepwise(self) -> bool:
        """Whether SparseGPT's sweep can choose it column by column."""
        return self.single

    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return self.rows or shape[-2], self.columns or shape[-1]

    @property
    def single(self) -> bool:
        return (self.rows, self.columns) == (1, 1)

    def index_bytes(self, weights: int, nonzero: int) -> float:
        """Of a bitmap of the tiles."""
        return weights / (self.rows * self.columns or 1) / 8


@dataclass(frozen=True)
class NM:
    """`keep` non-zeros in every `of` consecutive weights along the inputs (`along` = -1) or the outputs
    (-2).
    """

    keep: int
    of: int
    along: int = -1

    kinds: ClassVar[tuple[str, ...]] = ()
    single: ClassVar[bool] = True

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.of

    @property
    def fixed(self) -> float | None:
        """The sparsity that the pattern has, whatever is asked for."""
        return self.sparsity

    @property
    def tiles(self) -> Tiles:
        return Tiles(1, 1)

    @property
    def stepwise(self) -> bool:
        return self.along == -1

    def index_bytes(self, weights: int, nonzero: int) -> float:
        """Of the places inside M of what stays."""
        return math.ceil(math.log2(self.of)) * nonzero / 8


@dataclass(frozen=True)
class Structures:
    """Coupled structures, removed together across the matrices they span."""

    kinds: tuple[str, ...]

    fixed: ClassVar[float | None] = None

    def index_bytes(self, weights: int, nonzero: int) -> float:
        return weights / 8


@dataclass(frozen=True)
class Dimension:
    """A dimension of the architecture: hidden channels, layers or experts."""

    kind: str

    fixed: ClassVar[float | None] = None

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.kind,)

    def index_bytes(self, weights: int, nonzero: int) -> float:
        return 0.0


@dataclass(frozen=True)
class Hybrid:
    """Tiles in attention and whole neurons elsewhere, for gates that are trained (Lagunas et al. 2021)."""

    tiles: Tiles

    fixed: ClassVar[float | None] = None
    kinds: ClassVar[tuple[str, ...]] = ()

    def index_bytes(self, weights: int, nonzero: int) -> float:
        return self.tiles.index_bytes(weights, nonzero)


Pattern = Tiles | NM | Structures | Dimension | Hybrid


@dataclass(frozen=True)
class Form:
    """What an entry of the axis holds.

    func : options -> the pattern;  engine : (settings of `prune`, the pattern) -> what prunes by it, see
    `workbench.pruning.prune.Engine`; None for a pattern that is only trained for.
    """

    func: Callable[[Any], Pattern]
    engine: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        """A form is at home where its engine registers it: a result's key follows that file."""
        object.__setattr__(self, "__module__", self.func.__module__)

    def __call__(self, options: Any) -> Pattern:
        return self.func(options)


@functools.lru_cache(256)
def parse(text: str) -> Pattern:
    """The pattern called `text`; `BadInput` with the accepted forms otherwise."""
    made: Pattern = (text if isinstance(text, Choice) else PATTERN.chosen(text))()
    return made


def reduce(scores: Tensor, tiles: Tiles) -> Tensor:
    """Sum of scores in every tile: (..., out, in) -> (..., ceil(out / rows), ceil(in / columns))."""
    if tiles.single:
        return scores
    rows, columns = tiles.size(tuple(scores.shape))
    padded = F.pad(scores, (0, -scores.shape[-1] % columns, 0, -scores.shape[-2] % rows))
    split = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # (..., R, rows, C, columns)
    return split.sum((-3, -1))


def expand(units: Tensor, tiles: Tiles, shape: tuple[int, ...]) -> Tensor:
    """Give every weight its tile's value: the inverse of `reduce` for booleans and counts."""
    rows, columns = tiles.size(shape)
    return units.repeat_interleave(rows, -2)[..., : shape[-2], :].repeat_interleave(columns, -1)[
        ..., : shape[-1]
    ]


def sizes(tiles: Tiles, shape: tuple[int, ...]) -> Tensor:
    """Number of weights in each tile, as floats."""
    return reduce(torch.ones(shape), tiles)


def smallest(scores: Tensor, count: int) -> Tensor:
    """True for exactly `count` smallest scores of the last dimension; among equals the first ones.

    scores (..., n) -> bool (..., n). Selection, not sorting: linear time.
    """
    n = scores.shape[-1]
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    cut = kth_smallest(scores, count)
    below = scores < cut
    missing = count - below.sum(-1, keepdim=True)
    ties = scores == cut
    return below | (ties & (ties.cumsum(-1) <= missing))


def nm_mask(scores: Tensor, pattern: NM) -> Tensor:
    """Keep the `keep` largest of every `of` consecutive scores; a tail of r < M keeps ceil(r N / M)."""
    turned = scores if pattern.along == -1 else scores.mT
    width = turned.shape[-1]
    whole = width // pattern.of * pattern.of
    parts = []
    if whole:
        groups = turned[..., :whole].unflatten(-1, (-1, pattern.of))
        parts.append(~smallest(groups, pattern.of - pattern.keep).flatten(-2))
    if tail := width - whole:
        parts.append(~smallest(turned[..., whole:], tail - math.ceil(tail * pattern.keep / pattern.of)))
    mask = torch.cat(parts, -1)
    return mask if pattern.along == -1 else mask.mT


def tile_mask(scores: Tensor, tiles: Tiles, sparsity: float, within: str = "matrix") -> Tensor:
    """Remove the tiles of the smallest mean score until round(sparsity x weights) are zero,
    to within half a tile.

    `within` is the comparison group: a "row" of tiles (Wanda's; a pattern of whole rows has one tile there,
    so it is compared over the matrix), a "matrix" (each expert by itself) or the "stack" of all experts.
    """
    shape = tuple(scores.shape)
    start = {"row": -1, "matrix": -2, "stack": 0}[within if tiles.columns or within != "row" else "matrix"]
    if tiles.single:
        flat = scores.flatten(start)
        return ~smallest(flat, round(sparsity * flat.shape[-1])).reshape(shape)
    weights = sizes(tiles, shape).to(scores.device)
    means = reduce(scores, tiles) / weights
    drop = cheapest(means.flatten(start), weights.flatten(start), sparsity)
    return ~expand(drop.reshape(means.shape), tiles, shape)


def cheapest(scores: Tensor, weights: Tensor, sparsity: float) -> Tensor:
    """True for the units with the smallest scores whose weights add up nearest to sparsity x all weights.

    scores, weights (..., units) -> bool (..., units).
    """
    order = scores.argsort(dim=-1, stable=True)
    removed = weights.gather(-1, order).double().cumsum(-1)
    before = removed - weights.gather(-1, order).double()
    goal = sparsity * removed[..., -1:]
    take = (goal - before) > (removed - goal)  # closer with this unit than without it
    return torch.zeros_like(take).scatter(-1, order, take)


def make_mask(scores: Tensor, pattern: Tiles | NM, sparsity: float, within: str = "matrix") -> Tensor:
    """Scores (..., out, in) -> mask of the same shape, True where the weight stays."""
    return (
        nm_mask(scores, pattern) if isinstance(pattern, NM) else tile_mask(scores, pattern, sparsity, within)
    )


def yield_to(scores: Tensor, gone: Tensor, pattern: Tiles | NM) -> Tensor:
    """Scores in which weights that are `gone` already are the first to go again,
    so a second pruning adds to the first.
    """
    if pattern.single:
        return scores.masked_fill(gone, -1)
    tiles = pattern.tiles
    empty = expand(reduce((~gone).float(), tiles) == 0, tiles, tuple(scores.shape))
    return scores.masked_fill(gone, 0).masked_fill(empty, -1)


def obeys(mask: Tensor, pattern: Tiles | NM) -> bool:
    """True when the mask has the pattern: no tile is partly zero; no N:M group holds more than N."""
    shape = tuple(mask.shape)
    if isinstance(pattern, Tiles):
        kept = reduce(mask.float(), pattern).cpu()
        return bool(((kept == 0) | (kept == sizes(pattern, shape))).all())
    turned = mask if pattern.along == -1 else mask.mT
    padded = F.pad(turned.float(), (0, -turned.shape[-1] % pattern.of)).unflatten(-1, (-1, pattern.of))
    return bool((padded.sum(-1) <= pattern.keep).all())
