"""Model Stock: the mean of a few fine-tuned models, drawn back to the base by the angle between them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from workbench.arithmetic.merging.merging import MERGE, Setting
from workbench.arithmetic.models import Parts, Rule
from workbench.axis import Options


@MERGE.add(
    "model-stock",
    formula="w = t mean_i w_i + (1 - t) w_base, t = n cos / (1 + (n - 1) cos) in each tensor",
    source="Jang, Yun and Han 2024, eq. 3",
    title="Model Stock",
)
def model_stock(setting: Setting, options: Options) -> Rule:
    """The point nearest to the centre of fine-tuned weights, tensor by tensor."""

    def rule(parts: Parts, strength: float) -> Tensor:
        share = share_of_mean(parts.differences)
        return share * parts.parents.mean(0) + (1 - share) * parts.base

    return rule


def share_of_mean(differences: Tensor) -> float:
    """t from the mean cosine of all pairs of differences (models, ...); 0 where nothing has changed."""
    flat = differences.flatten(1)
    sizes = flat.norm(dim=1)
    cosines = [
        float((flat[i] @ flat[j]) / (sizes[i] * sizes[j]).clamp_min(1e-30))
        for i, j in itertools.combinations(range(len(flat)), 2)
    ]
    cosine = min(max(sum(cosines) / len(cosines), -1.0), 1.0)
    rest = 1 + (len(flat) - 1) * cosine
    return len(flat) * cosine / rest if abs(rest) > torch.finfo(torch.float32).eps else 0.0
