"""Averages: of all models, along the line from the base, on the sphere, of a sequence of checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.arithmetic.merging.merging import MERGE, Setting
from workbench.arithmetic.models import Parts, Rule
from workbench.axis import Options, parameter

#: Cosine from which two tensors count as one direction, as in mergekit.
PARALLEL = 0.9995


@MERGE.add(
    "uniform",
    formula="w = mean_i w_i",
    source="Wortsman et al. 2022, Model soups, table 1; Choshen et al. 2022 (Fusing)",
)
def uniform(setting: Setting, options: Options) -> Rule:
    """The mean of the models."""
    return lambda parts, strength: parts.parents.mean(0)


@MERGE.add(
    "wise-ft",
    formula="w = (1 - alpha) w_base + alpha w_1",
    source="Wortsman et al. 2022, Robust fine-tuning, eq. 1",
    title="WiSE-FT",
    traits=("strength", "share", "one"),
)
def wise_ft(setting: Setting, options: Options) -> Rule:
    """The line from the base to the fine-tuned model, or to the mean of several."""
    return lambda parts, alpha: (1 - alpha) * parts.base + alpha * parts.parents.mean(0)


@MERGE.add(
    "slerp",
    formula="w = sin((1 - t) a) / sin(a) w_1 + sin(t a) / sin(a) w_2, a the angle of each pair of tensors",
    source="Shoemake 1985; mergekit",
    title="SLERP",
    traits=("strength", "share", "one", "pair"),
    beside={"fine_tunes": 2},
)
def slerp(setting: Setting, options: Options) -> Rule:
    """The great circle from the first of two models (of one: from the base) to the other, by tensor."""

    def rule(parts: Parts, t: float) -> Tensor:
        first, last = (parts.base, *parts.parents)[-2:]
        return on_the_sphere(first, last, t)

    return rule


def on_the_sphere(first: Tensor, last: Tensor, t: float) -> Tensor:
    """Interpolate along the arc; along the line where the two are parallel to 0.9995."""
    sizes = first.double().norm().clamp_min(1e-30) * last.double().norm().clamp_min(1e-30)
    cosine = float((first.double() * last.double()).sum() / sizes)
    if abs(cosine) > PARALLEL:
        return (1 - t) * first + t * last
    angle = torch.acos(torch.tensor(cosine, dtype=torch.float64))
    one, other = torch.sin((1 - t) * angle) / angle.sin(), torch.sin(t * angle) / angle.sin()
    return (one * first.double() + other * last.double()).float()


class Momentum(Options):
    decay: float = parameter(0.9, "share of the slow weights that stays at each checkpoint", ge=0, lt=1)


@MERGE.add(
    "momentum-interpolation",
    formula="s <- tau s + (1 - tau) w_i over the models in order, from s = w_base",
    source="Stojanovski, Roth and Akata 2022, eq. 2",
    title="Momentum weight interpolation",
    options=Momentum,
    traits="one",
)
def momentum_interpolation(setting: Setting, options: Momentum) -> Rule:
    """Slow weights that follow a sequence of checkpoints, in the order in which they are named."""

    def rule(parts: Parts, strength: float) -> Tensor:
        slow = parts.base
        for fast in parts.parents:
            slow = options.decay * slow + (1 - options.decay) * fast
        return slow

    return rule
