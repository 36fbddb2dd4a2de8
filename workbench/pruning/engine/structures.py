"""Pruning by heads and neurons: scores of units, how many each group keeps,
and what the consumers do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.axis import Choice
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.pruning.axes import scores_weights
from workbench.pruning.calibration import Calibration
from workbench.pruning.pattern import Structures, cheapest
from workbench.pruning.saliency.depth import Stack, measure_stacks
from workbench.pruning.solvers import ziplm
from workbench.subjects import Layer, Subject
from workbench.subjects.structure.depth import stacks
from workbench.subjects.structure.units import Group, Member, discover

EXPERT_STEP = 8  # grouped matrix products of experts want widths in steps of 16 bytes


@dataclass
class Scored:
    """A group with its units in order of removal and the cost of every number of removals."""

    group: Group
    order: Tensor  # (experts, units): units, first to go first
    cost: Tensor  # (units + 1,): summed over experts, after 0, 1, ... removals

    @property
    def step(self) -> int:
        return EXPERT_STEP if self.group.experts > 1 else 1

    def most(self) -> int:
        """The largest number of units that can go: one step stays."""
        return max((self.group.units - 1) // self.step * self.step, 0)

    def kept(self, count: int) -> Tensor:
        """(experts, units): True for the units left after `count` removals."""
        mask = torch.ones(self.group.experts, self.group.units, dtype=torch.bool)
        return mask.scatter(1, self.order[:, :count], False)


@dataclass
class Asked:
    """What is known when the units of heads and neurons are shared out.

    scored : the groups, with the cost of every number of removals;  facts : what the result reports besides
    """

    on: Subject
    scored: Sequence[Scored]
    sparsity: float
    saliency: Choice
    calibration: Calibration
    kinds: tuple[str, ...]
    progress: Progress
    facts: dict[str, float]


def groups_of(on: Subject, layers: Sequence[Layer], pattern: Structures) -> list[Group]:
    """The groups whose matrices are all among the chosen layers."""
    names = {layer.name for layer in layers}
    found = [g for g in discover(on.model, pattern.kinds) if all(m.layer.name in names for m in g.members)]
    if not found:
        raise BadInput(
            f"layers: no whole group of {' or '.join(pattern.kinds)} is inside the chosen layers; use blocks"
        )
    return found


def score(group: Group, saliency: Choice, calibration: Calibration, pattern: Structures) -> Scored:
    """Order and costs of one group's units."""
    if saliency.has("one after the other"):
        return removal_order(group, saliency.options.damp, calibration)
    if not scores_weights(saliency):
        groups = groups_of(calibration.subject, calibration.layers, pattern)
        every = ("units", repr(saliency), saliency.value, pattern.kinds, calibration.examples)
        units = calibration.remember(every, lambda: saliency(calibration, groups))[group.name]
    else:
        members = group.consumers if saliency.has("consumer side") else group.members
        scores = {m.layer.name: saliency(m.layer, calibration, pattern).float() for m in members}
        units = group.unit_scores(scores, members)
    if not bool(torch.isfinite(units).all()):
        raise BadInput(
            f"layers: {group.name} has NaN or infinite saliencies; "
            "its weights or its calibration inputs hold NaN or infinity"
        )
    units = units.masked_fill(~group.alive(), -1)
    values, order = units.sort(dim=1)
    costs = values.clamp_min(0).sum(0).cumsum(0)
    return Scored(group, order, torch.cat([costs.new_zeros(1), costs]))


def removal_order(group: Group, damp: float, calibration: Calibration) -> Scored:
    """Units in the order in which their removal costs least, the consumer refitted after each (ZipLM)."""
    member = consumer(group)
    weight, gram = member.layer.weight.detach(), calibration.gram(member.layer)
    matrices = weight if weight.ndim == 3 else weight[None]
    pairs = calibration.remember(
        ("removal order", group.name, calibration.examples, damp),
        lambda: [ziplm.removal_order(w, g, member.index, damp) for w, g in zip(matrices, gram, strict=True)],
    )
    order, errors = torch.stack([o for o, _ in pairs]).cpu(), sum(e for _, e in pairs)
    assert isinstance(errors, Tensor)
    return Scored(group, order, torch.cat([errors.new_zeros(1), errors]).cpu())


def consumer(group: Group) -> Member:
    if len(group.consumers) != 1:
        raise BadInput(
            f"saliency: obs needs one consumer for each group and {group.name} ties several together; "
            "use magnitude, wanda or gradient"
        )
    return group.consumers[0]


def uniform(scored: Sequence[Scored], sparsity: float) -> list[int]:
    """The same share of units everywhere."""
    return [min(round(sparsity * s.group.units / s.step) * s.step, s.most()) for s in scored]


def across(scored: Sequence[Scored], sparsity: float, saliency: Choice) -> list[int]:
    """One threshold over all groups: on the units' scores per weight where they are predicted losses, on the
    mean score of a unit where they are standardised already, on z-scores within each group otherwise.
    """
    values, weights, owner = [], [], []
    for number, s in enumerate(scored):
        marginal = s.cost.diff().cummax(0).values
        marginal = marginal.unfold(0, s.step, s.step).sum(-1)
        each = s.group.weights_per_unit() * s.group.experts * s.step
        per_weight = marginal / each
        if saliency.has("standardised"):
            per_weight = marginal / (s.group.experts * s.step)
        elif not saliency.has("loss-like"):
            per_weight = (marginal - marginal.mean()) / marginal.std(unbiased=False).clamp_min(1e-12)
        limit = s.most() // s.step
        per_weight[limit:] = torch.inf
        values.append(per_weight.double())
        weights.append(torch.full_like(per_weight, float(each)))
        owner.append(torch.full_like(per_weight, number, dtype=torch.long))
    drop = cheapest(torch.cat(values), torch.cat(weights).float(), sparsity) & torch.cat(values).isfinite()
    counts = torch.bincount(torch.cat(owner)[drop], minlength=len(scored))
    return [int(c) * s.step for c, s in zip(counts, scored, strict=True)]


def block_importance(calibration: Calibration) -> dict[str, float]:
    """Path of each block -> how much it changes its input (1 - cosine),
    centred and divided by the largest deviation (Wang et al. 2025).
    """
    key = ("stacks", calibration.examples)
    found: list[Stack] = calibration.remember(
        key,
        lambda: measure_stacks(
            calibration.subject, calibration.split, calibration.examples, progress=calibration.progress
        ),
    )
    names = [name for paths in stacks(calibration.subject.model).values() for name in paths]
    values = torch.cat([s.influence for s in found])
    values = values - values.mean()
    return dict(zip(names, (values / values.abs().max().clamp_min(1e-12)).tolist(), strict=True))


def adaptive(
    scored: Sequence[Scored], sparsity: float, amplitude: float, calibration: Calibration
) -> list[int]:
    """Sparsity of a block = sparsity - amplitude x its importance, in [0, 0.99]
    (Wang et al. 2025, Adapt-Pruner).

    What an earlier event has taken stays taken. A common shift makes up for what the bounds cut off, so that
    the weights removed are the asked share of all.
    """
    importance = block_importance(calibration)
    own = torch.tensor(
        [
            next((v for block, v in importance.items() if s.group.name.startswith(block + ".")), 0.0)
            for s in scored
        ]
    )
    weights = torch.tensor(
        [float(s.group.weights_per_unit() * s.group.experts * s.group.units) for s in scored]
    )
    gone = torch.tensor([float((~s.group.alive()).float().mean()) for s in scored])
    low, high = -1.0, 1.0
    for _ in range(50):
        shift = (low + high) / 2
        shares = (sparsity - amplitude * own + shift).clamp(0, 0.99).maximum(gone)
        low, high = (
            (shift, high) if float((shares * weights).sum() / weights.sum()) < sparsity else (low, shift)
        )
    return [
        min(round(float(share) * s.group.units / s.step) * s.step, s.most())
        for share, s in zip(shares, scored, strict=True)
    ]


def compensate(group: Group, kept: Tensor, compensation: Choice, calibration: Calibration) -> None:
    """Change the consumers (or their biases) for the units about to go."""
    if compensation.has("nothing") and not compensation.has("bias"):
        return
    for member in group.consumers:
        layer = member.layer
        weight, moments = layer.weight.detach(), calibration.gram(layer)
        matrices = weight if weight.ndim == 3 else weight[None]
        columns = torch.ones(group.experts, weight.shape[-1], dtype=torch.bool, device=weight.device)
        for e in range(group.experts):
            columns[e, member.index[~kept[e]].flatten().to(weight.device)] = False
        if compensation.has("bias"):
            if layer.bias is None or weight.ndim == 3:
                raise BadInput(
                    f"compensation: bias needs a bias and {layer.name} has none; use least-squares or none"
                )
            with torch.no_grad():
                mean = calibration.mean(layer)[0]
                layer.bias.add_((weight * ~columns[0]).to(mean.dtype) @ mean)
            continue
        new = torch.stack(
            [
                ziplm.refit(w, g, c, compensation.options.damp)
                for w, g, c in zip(matrices, moments, columns, strict=True)
            ]
        )
        stored = layer.original.detach()
        layer.write(
            (stored.mT if layer.transposed else stored) + (new if weight.ndim == 3 else new[0]) - weight
        )


def prune_structures(
    scored: Sequence[Scored],
    counts: Sequence[int],
    compensation: Choice,
    calibration: Calibration,
    progress: Progress,
) -> dict[str, Tensor]:
    """Mask the first `counts` units of every group; returns group name -> kept (experts, units)."""
    found = {s.group.name: s.kept(min(count, s.most())) for s, count in zip(scored, counts, strict=True)}
    for s in progress.track(scored, f"compensation {compensation}"):
        compensate(s.group, found[s.group.name], compensation, calibration)
    for s in scored:
        s.group.mask(found[s.group.name])
    return found
