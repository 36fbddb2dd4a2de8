"""The numbers a pruning reports: per-layer errors, bytes,
and the predicted loss change beside the measured one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from torch import Tensor

from workbench.progress import Progress
from workbench.pruning.pattern import Pattern
from workbench.subjects import Layer, Subject


def packed_bytes(weights: int, nonzero: int, pattern: Pattern, size: int = 4) -> int:
    """Bytes of the non-zeros, `size` each, and of what says where they are:
    a bitmap, indices inside M, or a bitmap of tiles.
    """
    return int(nonzero * size + pattern.index_bytes(weights, nonzero))


def layer_table(
    layers: Sequence[Layer], before: dict[str, Tensor], gram: Callable[[Layer], Tensor] | None
) -> pd.DataFrame:
    """One row a layer: size, sparsity, relative error of the weight and of its outputs on the calibration
    inputs.

    gram : a layer's second moment of inputs (experts, in, in), asked for one layer at a time;
        None leaves the outputs' error open.
    """
    rows = []
    for layer in layers:
        old, new = before[layer.name].float(), layer.weight.detach().float()
        delta = new - old
        norm = float(old.square().sum())
        pairs = [(delta, old)] if old.ndim == 2 else list(zip(delta, old, strict=True))
        share = math.nan
        if gram is not None:
            moments = gram(layer)
            lost = sum(float(((d @ g) * d).sum()) for (d, _), g in zip(pairs, moments, strict=True))
            whole = sum(float(((w @ g) * w).sum()) for (_, w), g in zip(pairs, moments, strict=True))
            share = lost / whole if whole > 0 else 0.0
        rows.append(
            {
                "layer": layer.name,
                "weights": old.numel(),
                "sparsity": float((new == 0).float().mean()),
                "relative_error": float(delta.square().sum()) / norm if norm else 0.0,
                "relative_output_error": share,
            }
        )
    return pd.DataFrame(rows)


def add_prediction(
    table: pd.DataFrame,
    facts: dict[str, Any],
    dense: Subject,
    deltas: dict[str, Tensor],
    split: str,
    examples: int,
    progress: Progress,
) -> None:
    """Second-order prediction beside the measurement, on the same batches;
    both go into the table and the facts.
    """
    from workbench.curvature.estimators.quadratic import measured_change, predicted_change

    prediction = predicted_change(dense, deltas, split=split, examples=examples, progress=progress)
    table["predicted_change"] = [sum(prediction.by_layer[name]) for name in table["layer"]]
    facts["predicted_change"] = float(prediction.total)
    facts["measured_change"] = float(
        measured_change(dense, deltas, split=split, examples=examples, progress=progress)
    )
