"""Where the gates of block movement pruning sit, and what they leave to be removed (Lagunas et al. 2021).

`hybrid RxC` has a gate for every R by C block of the attention's matrices and one for every feed-forward
neuron, shared by the neuron's rows and its column; any other layer gets blocks as well. A neuron whose gate
is shut, or a head of whose output columns none is left, is then taken out of the matrices:
the outputs are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.pruning.axes import PATTERN
from workbench.pruning.pattern import Form, Hybrid, Tiles, parse
from workbench.pruning.sparse_training.trained_masks import Gates, selection_of
from workbench.subjects import Layer, Subject
from workbench.subjects.structure.removal import remove, safe


class Block(Options):
    rows: int = parameter(16, "outputs in a block", ge=1)
    columns: int = parameter(16, "inputs in a block", ge=1)


def hybrid_text(options: Block) -> str:
    return f"hybrid {options.rows}x{options.columns}"


PATTERN.add(
    "hybrid",
    formula="blocks of R outputs by C inputs in attention, whole neurons elsewhere",
    source="Lagunas et al. 2021",
    options=Block,
    spelled=hybrid_text,
    home="train-sparse.pattern",
    beside={"method": "block-movement"},
)(Form(lambda options: Hybrid(Tiles(options.rows, options.columns))))


def hybrid_tiles(pattern: str) -> Tiles | None:
    """The block of 'hybrid RxC'; None for another pattern."""
    form = parse(pattern)
    return form.tiles if isinstance(form, Hybrid) else None


def gate_pattern(pattern: str) -> Tiles:
    """The tiles that get a score each; `BadInput` for patterns that have none of their own."""
    form = parse(pattern)
    if not isinstance(form, (Hybrid, Tiles)):
        raise BadInput(
            f"pattern: gates are trained for tiles or as a hybrid and {pattern!r} is neither; "
            "use block 16x16, row, column or hybrid 16x16"
        )
    return form.tiles


def unit_count(size: int, tile: int) -> int:
    return -(-size // (tile or size))


def attach_gates(
    on: Subject, layers: Sequence[Layer], pattern: str, threshold: float, start: float = 0.0
) -> None:
    """Put gates, all open at score `start`, on every layer."""
    tiles = gate_pattern(pattern)
    paired: dict[str, tuple[nn.Parameter, bool]] = {}
    if hybrid_tiles(pattern) is not None:
        chosen = {layer.name for layer in layers}
        for group in safe(on.model, "neurons"):
            if group.experts > 1 or any(
                m.index.shape[1] != 1 or m.layer.name not in chosen for m in group.members
            ):
                continue
            score = nn.Parameter(
                torch.full((group.units, 1), start, device=group.members[0].layer.original.device)
            )
            paired |= {m.layer.name: (score, m.axis == -1) for m in group.members}
    for layer in layers:
        if layer.name in paired:
            score, turned = paired[layer.name]
            layer.attach(Gates(score, 0 if turned else 1, 1 if turned else 0, threshold, turned))
        else:
            *stack, out, width = layer.shape
            shape = (*stack, unit_count(out, tiles.rows), unit_count(width, tiles.columns))
            layer.attach(
                Gates(
                    torch.full(shape, start, device=layer.original.device),
                    tiles.rows,
                    tiles.columns,
                    threshold,
                )
            )


def open_share(layers: Sequence[Layer]) -> Tensor:
    """Mean of sigmoid(S) over all gated weights: the penalty, between 0 and 1."""
    gates = [
        (selection, layer.shape) for layer in layers if isinstance(selection := selection_of(layer), Gates)
    ]
    total = sum((g.expected(shape) for g, shape in gates), torch.zeros((), device=layers[0].original.device))
    return total / sum(layer.original.numel() for layer in layers)


def remove_dead(on: Subject) -> dict[str, Tensor]:
    """Take out the heads and neurons that no column of their consumers reads;
    group name -> kept (1, units).
    """
    kept: dict[str, Tensor] = {}
    for kind in ("heads", "neurons"):
        for group in safe(on.model, kind):
            alive = group.alive()
            if group.experts > 1 or bool(alive.all()):
                continue
            if not bool(alive.any()):  # a module keeps one unit: the removal cannot leave an empty matrix
                alive[:, 0] = True
            kept[group.name] = alive
    if kept:
        remove(on.model, kept)
    return kept
