"""The linear model of damage: each layer's slope in the square of its relative error, found by noise."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from contextlib import closing

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from workbench.axis import Options, parameter
from workbench.measures.suffix import Suffix
from workbench.quantization.allocation.swapped import DISK, distance, groups_of, through
from workbench.quantization.allocation.width_cost import WIDTH_COST, Candidates, WidthCost
from workbench.subjects import Layer
from workbench.unfinished.finished_parts import FinishedParts, Record


class Noise(Options):
    levels: int = parameter(3, "sizes of the noise, their squares evenly spaced", ge=1, le=64)
    largest: float = parameter(
        0.2, "largest noise, as a share of the norm of the weight", gt=0, le=1, scale="log"
    )
    draws: int = parameter(1, "draws of each size", ge=1, le=100)


@WIDTH_COST.add(
    "linearity",
    formula="alpha_l t_l^2, t_l = |d| / |w|, alpha_l = sum_j t_j^2 D_j / sum_j t_j^4 of noise",
    source="Malinovskii et al. 2024, HIGGS, the linearity theorem",
    needs="inputs",
    options=Noise,
    traits="measured distance",
)
def linearity(given: Candidates, options: Noise) -> WidthCost:
    """E[D(w + noise)] = D(w) + sum_l alpha_l t_l^2 to second order, D the divergence from the dense model
    (theirs: perplexity, or the divergence on texts that the model makes), whatever makes an error of relative
    size t_l without a preferred direction. Each layer's alpha is the least-squares slope through the origin
    over noise of several sizes in that layer alone; it costs one run of what follows the layer a size.
    """
    records = noised(given, options)
    known = [records.get(layer.name) for layer in given.layers]
    found = [
        slope(record["squares"], record["distances"]) if record else (0.0, float("nan")) for record in known
    ]
    alpha, error = (
        pd.Series(np.repeat([pair[k] for pair in found], len(given.widths)), dtype=float) for k in (0, 1)
    )
    squares = given.table["weight_error"]
    return WidthCost((alpha.clip(lower=0) * squares).to_numpy(), {"alpha": alpha, "alpha_error": error})


def slope(squares: Sequence[float], distances: Sequence[float]) -> tuple[float, float]:
    """(alpha, its standard error): least squares of distances = alpha x squares; NaN for one point."""
    x, y = np.asarray(squares, dtype=float), np.asarray(distances, dtype=float)
    alpha = float((x * y).sum() / (x * x).sum())
    if len(x) < 2:
        return alpha, float("nan")
    spread = float(np.square(y - alpha * x).sum() / (len(x) - 1))
    return alpha, float(np.sqrt(spread / (x * x).sum()))


def noised(given: Candidates, options: Noise) -> dict[str, Record]:
    """Layer -> the squared relative sizes of the noise, and the distances of the model with it; layers that a
    stop left out are missing.
    """
    suffix = Suffix(given.on, "calibration", given.examples, given.progress, DISK)
    groups = groups_of(given.on, given.layers)
    found: dict[str, Record] = {}
    with closing(FinishedParts("linearity")) as finished:
        for group in through(suffix, list(groups)):
            for layer in (given.layers[row] for row in groups[group]):
                measure = functools.partial(measured, suffix, layer, options, given.seed)
                record = finished.get(layer.name, measure)
                if record is None:
                    return found
                found[layer.name] = record
                given.progress.show("noise in each layer", len(found), len(given.layers))
    return found


def measured(suffix: Suffix, layer: Layer, options: Noise, seed: int) -> Record | None:
    """One layer's noise of every size, and what each does."""
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(layer.name.encode()))
    squares = sizes(options)
    distances = []
    for square in squares:
        noise = torch.randn(tuple(layer.shape), generator=generator)
        weight = layer.weight.detach()
        scale = float(square) ** 0.5 * float(weight.float().norm()) / float(noise.norm())
        record = distance(suffix, [layer], [(noise * scale).to(weight.device)])
        if record is None:
            return None
        distances.append(record["distance"])
    return {"squares": squares.tolist(), "distances": distances}


def sizes(options: Noise) -> NDArray[np.float64]:
    """(levels x draws,) squares of the noise's relative size."""
    even = options.largest**2 * np.arange(1, options.levels + 1) / options.levels
    return np.repeat(even, options.draws)
