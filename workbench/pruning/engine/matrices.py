"""Pruning of single weights inside matrices: tiles and N:M patterns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.pruning.axes import PATTERN
from workbench.pruning.engine.masked import Masked
from workbench.pruning.engine.visited import Visited
from workbench.pruning.engine.weights import check_weights, prune_once
from workbench.pruning.pattern import NM, Form, Tiles

if TYPE_CHECKING:
    from workbench.pruning.plan import PrunePlan


class Matrices(Masked):
    """Masks of single weights, of tiles and of N:M groups."""

    pattern: Tiles | NM

    def check(self, on: Any) -> None:
        check_weights(self.prune, self.pattern, on)

    def prune_to(self, sparsity: float) -> None:
        prune = self.prune
        prune_once(
            self.layers,
            self.calibration,
            self.pattern,
            sparsity,
            prune.saliency,
            prune.compensation,
            prune.allocation,
            self.progress,
            prune.method.options if prune.method.has("refines") else None,
        )


def chosen(prune: PrunePlan, pattern: Tiles | NM) -> Masked:
    """Block after block where that is all that a pruning needs."""
    return Visited(prune, pattern) if prune.walks else Matrices(prune, pattern)


class NMOptions(Options):
    keep: int = parameter(2, "weights that stay in a group", ge=1)
    of: int = parameter(4, "weights in a group", ge=2)
    along: str = parameter(
        "inputs", "groups run along the inputs or the outputs", pattern="^(inputs|outputs)$"
    )


class TileOptions(Options):
    rows: int = parameter(16, "outputs in a block", ge=1)
    columns: int = parameter(16, "inputs in a block", ge=1)


def n_m(options: NMOptions) -> NM:
    if options.keep >= options.of:
        raise BadInput(
            f"pattern: {options.keep}:{options.of} removes nothing; N:M needs 0 < N < M, such as 2:4"
        )
    return NM(options.keep, options.of, -1 if options.along == "inputs" else -2)


def n_m_text(options: NMOptions) -> str:
    return f"{options.keep}:{options.of}{' outputs' if options.along == 'outputs' else ''}"


def block_text(options: TileOptions) -> str:
    return f"block {options.rows}x{options.columns}"


PATTERN.add("unstructured", formula="every weight by itself", source="Han et al. 2015")(
    Form(lambda options: Tiles(1, 1), chosen)
)
PATTERN.add(
    "n:m",
    formula="N non-zeros in every M consecutive weights",
    source="Mishra et al. 2021",
    options=NMOptions,
    spelled=n_m_text,
)(Form(n_m, chosen))
PATTERN.add(
    "block",
    formula="rectangles of R outputs by C inputs",
    source="Gray et al. 2017",
    options=TileOptions,
    spelled=block_text,
)(Form(lambda options: Tiles(options.rows, options.columns), Matrices))
PATTERN.add("row", formula="one output's weights", source="Wen et al. 2016")(
    Form(lambda options: Tiles(1, 0), chosen)
)
PATTERN.add("column", formula="one input's weights", source="Wen et al. 2016")(
    Form(lambda options: Tiles(0, 1), chosen)
)
