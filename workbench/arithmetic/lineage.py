"""What a merge is made of: models, fingerprints, weights; and what of the parents' zeros is left."""

from __future__ import annotations

from typing import Any

import pandas as pd

from workbench.arithmetic.merging.merging import streamed
from workbench.arithmetic.models import Models, Rule


def lineage(models: Models, rule: Rule) -> pd.DataFrame:
    """A row a model: kind, name, fingerprint, and its weight where a merge is a weighted mean (else NaN)."""
    weights = getattr(rule, "weights", None)
    rows = [{"kind": "base", "model": models.base.name, "fingerprint": models.base.fingerprint}]
    rows += [{"kind": "parent", "model": p.name, "fingerprint": p.fingerprint} for p in models.parents]
    known = [float("nan")] * len(rows) if weights is None else [0.0, *weights]
    return pd.DataFrame(rows).assign(weight=known)


def zeros_lost(models: Models, rule: Rule, strength: float, keep_zeros: bool) -> dict[str, Any]:
    """Zeros of matrices that every sparse parent has, and how many of them the merge has values in. A parent
    with less than a hundredth of zeros is no sparse one; nothing where none is.
    """
    zeros = [0] * len(models.parents)
    numbers = common = lost = 0
    for name, value in streamed(models, rule, strength, keep_zeros):
        if value.ndim < 2:
            continue
        empty = models.parts(name).parents == 0
        zeros = [count + int(each.sum()) for count, each in zip(zeros, empty, strict=True)]
        numbers += value.numel()
        common += int(empty.any(0).sum())
        lost += int((empty.any(0) & (value != 0)).sum())
    if not numbers or max(zeros) < numbers / 100:
        return {}
    return {"zeros_of_parents": common, "zeros_lost": lost}
