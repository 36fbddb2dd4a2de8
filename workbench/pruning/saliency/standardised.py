"""FLAP's score of heads and neurons (An et al. 2024, eq. 5 to 7; `prune_flap` of the authors' code).

Input channel j of the matrix that consumes a group is worth var(x_j) ||W_:j||^2, squared again for heads. The
channels of one matrix are brought to mean 0 and standard deviation 1, so that matrices compare, and a unit is
worth the mean of its channels. A constant is added to all of them, so that none is negative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.axis import Options
from workbench.pruning.axes import SALIENCY
from workbench.pruning.calibration import Calibration
from workbench.subjects.structure.units import Group, Member


def channel_scores(group: Group, member: Member, calibration: Calibration) -> Tensor:
    """(experts, channels) z-scores of a consumer's input channels, taken over all its channels."""
    energy = member.layer.weight.detach().square().sum(-2).reshape(group.experts, -1)
    scores = (calibration.variance(member.layer) * energy).double().cpu()
    if group.kind == "heads":
        scores = scores.square()
    return (scores - scores.mean()) / scores.std().clamp_min(1e-30)


@SALIENCY.add(
    "standardised-fluctuation",
    formula="mean over a unit's channels of z(var(x_j) ||w_:j||^2), squared inside z for heads",
    source="An et al. 2024 (FLAP)",
    needs="inputs",
    traits=("heads", "neurons", "standardised"),
)
def standardised_fluctuation(
    calibration: Calibration, groups: Sequence[Group], options: Options
) -> dict[str, Tensor]:
    found = {}
    for group in groups:
        parts = [
            channel_scores(group, member, calibration)[:, member.index].mean(-1) for member in group.consumers
        ]
        found[group.name] = torch.stack(parts).mean(0)
    lowest = min(float(scores.min()) for scores in found.values())
    return {name: scores - lowest for name, scores in found.items()}
