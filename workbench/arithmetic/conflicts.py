"""Where differences of several models from one base fight: signs, angles and sizes, tensor by tensor."""

from __future__ import annotations

import itertools
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from workbench.arithmetic.models import Models, Parts
from workbench.arithmetic.sources import block_of
from workbench.errors import BadInput
from workbench.progress import Progress

#: Mean size of a difference up to which the source says that random drops do little harm.
DARE_LIMIT = 0.005


def conflict_table(models: Models, progress: Progress) -> pd.DataFrame:
    """A row a tensor. `BadInput` for a difference that is not finite, and for models that are the base.

    tensor, block, role : its name, the block it lies in and its name there
    numbers : how many
    conflict : share of the entries where two models move in opposite directions
    cosine : mean over pairs of models; NaN for one model, or where nothing moves
    norm, base_norm : root of the mean over models of |d|^2, and |w_base|
    mean_size : mean of |d| over entries and models
    cancelled : 1 - |mean_i d_i|^2 / mean_i |d_i|^2, what the mean of all loses of the differences' energy
    """
    rows = []
    for parts in models.each(progress, "compare"):
        check_finite(parts, models)
        rows.append(conflicts(parts))
    table = pd.DataFrame(rows)
    if len(table) == len(models.names) and not table["norm"].any():
        raise BadInput(
            f"parents: {models.parents[0].name} has the weights of {models.base.name}; give models that were "
            "trained further"
        )
    return table


def check_finite(parts: Parts, models: Models) -> None:
    if bool(torch.isfinite(parts.base).all()) and bool(torch.isfinite(parts.parents).all()):
        return
    sources = zip((models.base, *models.parents), (parts.base, *parts.parents), strict=True)
    wrong = next(source.name for source, value in sources if not bool(torch.isfinite(value).all()))
    raise BadInput(f"parents: {parts.name} of {wrong} holds nan or inf; repair the checkpoint")


def conflicts(parts: Parts) -> dict[str, Any]:
    differences = parts.differences.flatten(1).double()
    block = block_of(parts.name)
    energies = differences.square().sum(1)
    mean = float(energies.mean())
    return {
        "tensor": parts.name,
        "block": block or "outside",
        "role": parts.name.removeprefix(f"{block}."),
        "numbers": parts.base.numel(),
        "conflict": float(opposed(differences).double().mean()) if differences.numel() else 0.0,
        "cosine": mean_cosine(differences),
        "norm": mean**0.5,
        "base_norm": float(parts.base.double().norm()),
        "mean_size": float(differences.abs().mean()) if differences.numel() else 0.0,
        "cancelled": 1 - float(differences.mean(0).square().sum()) / mean if mean else 0.0,
    }


def opposed(differences: Tensor) -> Tensor:
    """(models, n) -> (n,) True where one model goes up and another down."""
    return (differences > 0).any(0) & (differences < 0).any(0)


def mean_cosine(differences: Tensor) -> float:
    """Over all pairs of rows (models, n) that are not zero; NaN for none."""
    sizes = differences.norm(dim=1)
    found = [
        float(differences[i] @ differences[j] / (sizes[i] * sizes[j]))
        for i, j in itertools.combinations(range(len(differences)), 2)
        if sizes[i] and sizes[j]
    ]
    return sum(found) / len(found) if found else float("nan")


def whole_model(table: pd.DataFrame) -> dict[str, float]:
    """The facts of a conflict table: over all entries."""
    count = table["numbers"].sum()
    return {
        "conflict": float((table["conflict"] * table["numbers"]).sum() / count),
        "mean_difference": float((table["mean_size"] * table["numbers"]).sum() / count),
        "relative_norm": float(
            (table["norm"].pow(2).sum() / max(table["base_norm"].pow(2).sum(), 1e-30)) ** 0.5
        ),
    }
