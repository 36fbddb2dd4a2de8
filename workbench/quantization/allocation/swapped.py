"""Predicted damage corrected by measured damage: the blocks that matter are put into the dense model,
rounded, and its divergence is measured behind them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from workbench.curvature.operators.weights import place_of, with_weights
from workbench.measures.suffix import Suffix
from workbench.progress import Progress
from workbench.subjects import Layer, Subject
from workbench.unfinished.finished_parts import FinishedParts, Record

Deltas = Mapping[str, Sequence[Tensor]]
DISK = 2048.0  # megabytes of dense distributions kept while it runs


def groups_of(on: Subject, layers: Sequence[Layer]) -> dict[str, list[int]]:
    """Block -> rows of its layers; a layer outside of the blocks is a group of its own."""
    blocks = [name for name, _ in on.blocks()]
    found: dict[str, list[int]] = {}
    for row, layer in enumerate(layers):
        home = next((block for block in blocks if layer.name.startswith(f"{block}.")), layer.name)
        found.setdefault(home, []).append(row)
    return found


@dataclass(frozen=True)
class Correction:
    """cost : (layers, widths), corrected;  table : one row a measured block and width"""

    cost: NDArray[np.float64]
    table: pd.DataFrame


def corrected(
    on: Subject,
    layers: Sequence[Layer],
    widths: Sequence[int],
    deltas: Deltas,
    cost: NDArray[np.float64],
    weights: NDArray[np.float64],
    swaps: int,
    examples: int,
    progress: Progress,
) -> Correction:
    """The costs with the divergence of whole blocks as measured: those of the `swaps` blocks with the largest
    predicted share are scaled to it, all others by the ratio of measured to predicted of these, width by
    width. What a sensitivity leaves out (how a block's layers act together, and all that is beyond second
    order) is then in the sum.
    """
    known = np.clip(cost, 0.0, None)
    groups = groups_of(on, layers)
    predicted = {name: known[rows].sum(0) for name, rows in groups.items()}
    total = np.maximum(sum(predicted.values()), np.finfo(float).tiny)
    shares = {name: float((found / total).mean()) for name, found in predicted.items()}
    chosen = sorted(shares, key=lambda name: -shares[name])[:swaps]
    measured = swapped_in(on, layers, {n: groups[n] for n in chosen}, len(widths), deltas, examples, progress)
    made = known * ratio(predicted, measured)
    rows = []
    for name, found in measured.items():
        made[groups[name]] = scaled(known[groups[name]], found, weights[groups[name]])
        rows += [
            {
                "block": name,
                "width": width,
                "share": shares[name],
                "predicted": predicted[name][k],
                "measured": found[k],
            }
            for k, width in enumerate(widths)
        ]
    return Correction(made, pd.DataFrame(rows, columns=["block", "width", "share", "predicted", "measured"]))


def ratio(
    predicted: Mapping[str, NDArray[np.float64]], measured: Mapping[str, NDArray[np.float64]]
) -> NDArray[np.float64]:
    """(widths,) measured over predicted, of all measured blocks together; 1 where nothing was predicted."""
    if not measured:
        return np.ones(1)
    above = sum(measured.values())
    below = sum(predicted[name] for name in measured)
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), 1.0)


def scaled(
    cost: NDArray[np.float64], measured: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """A block's costs (layers, widths) that sum to what was measured at each width: in proportion to the
    predicted ones, or to the layers' weights where all of these are zero.
    """
    total = cost.sum(0)
    shares = np.where(total > 0, cost / np.where(total > 0, total, 1.0), (weights / weights.sum())[:, None])
    return shares * np.maximum(measured, 0.0)


def swapped_in(
    on: Subject,
    layers: Sequence[Layer],
    groups: Mapping[str, Sequence[int]],
    widths: int,
    deltas: Deltas,
    examples: int,
    progress: Progress,
) -> dict[str, NDArray[np.float64]]:
    """Block -> (widths,) mean distance of the dense model with that block alone rounded; one walk, from what
    the block before put out. Blocks that a stop left out are missing.
    """
    suffix = Suffix(on, "calibration", examples, progress, DISK)
    found: dict[str, NDArray[np.float64]] = {}
    with closing(FinishedParts("allocation-swaps")) as finished:
        for group in through(suffix, list(groups)):
            mine = [layers[row] for row in groups[group]]
            values = []
            for k in range(widths):
                moved = [deltas[layer.name][k] for layer in mine]
                measure = functools.partial(distance, suffix, mine, moved)
                record = finished.get(f"{group}:{k}", measure)
                if record is None:
                    return found
                values.append(record["distance"])
            found[group] = np.array(values)
            progress.show("blocks swapped in", len(found), len(groups))
    return found


def through(suffix: Suffix, wanted: Sequence[str]) -> Iterator[str]:
    """Blocks, and layers outside of them, one after another; when one is given out the walk stands before it.
    It ends early when somebody asks to stop.
    """
    left = set(wanted)
    for stop in [*(name for name in wanted if name not in suffix.order), *suffix.order]:
        if not left or suffix.progress.stopped:
            return
        if stop in left:
            left.discard(stop)
            yield stop
        if left and stop in suffix.order:
            suffix.advance(stop)


def distance(suffix: Suffix, layers: Sequence[Layer], deltas: Sequence[Tensor]) -> Record | None:
    """The mean distance of the dense model with changes of these layers; None when that was stopped."""
    values = [changed(layer, delta) for layer, delta in zip(layers, deltas, strict=True)]
    with with_weights(suffix.on.model, [place_of(layer) for layer in layers], values):
        found = suffix.ask({})
    return None if found is None else {"distance": float(found.mean())}


def changed(layer: Layer, delta: Tensor) -> Tensor:
    """The weight as its module keeps it, with this change."""
    value: Tensor = getattr(layer.module, layer.tensor).detach()
    return value + (delta.mT if layer.transposed else delta).to(value.dtype)
