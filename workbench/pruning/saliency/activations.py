"""Activation-based importance (Muralidharan et al. 2024, Minitron):
how large the activations of heads, neurons and channels are.

A unit's activation on a token is the L2 norm of what it hands on: a head's output, a neuron's activation
(its absolute value), a channel's norm output. It is averaged over the tokens of an example and its root mean
square taken over examples, the aggregation the authors found best
(mean over the sequence, L2 over the batch).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.axis import Options
from workbench.progress import Progress
from workbench.pruning.axes import SALIENCY
from workbench.pruning.calibration import Calibration
from workbench.statistics import InputCapture
from workbench.subjects import Layer, Subject
from workbench.subjects.structure.channels import channels
from workbench.subjects.structure.norms import channel_norms
from workbench.subjects.structure.units import Group


@torch.no_grad()
def unit_activations(
    on: Subject,
    groups: Sequence[Group],
    split: str = "calibration",
    examples: int = 128,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Group name -> (experts, units) importance, from what the group's consumers receive;
    several consumers (T5's tied heads) are added up.
    """
    progress = progress or Progress()
    members = {m.layer.name: (g, m) for g in groups for m in g.consumers}
    sums = {name: torch.zeros(g.experts, g.units) for name, (g, _) in members.items()}
    tokens = {name: torch.zeros(g.experts, 1) for name, (g, _) in members.items()}
    squares = {name: torch.zeros(g.experts, g.units) for name, (g, _) in members.items()}

    def add(layer: Layer, expert: int, rows: Tensor) -> None:
        index = members[layer.name][1].index.to(rows.device)
        sums[layer.name][expert] += rows[:, index].norm(dim=-1).sum(0).cpu()
        tokens[layer.name][expert] += len(rows)

    count = min(examples, on.size(split))
    with InputCapture([m.layer for _, m in members.values()], add):
        for batch in progress.track(on.batches(split, 1, examples), "activations", count):
            on.task.output(on.model, batch)
            for name in sums:
                squares[name] += (sums[name] / tokens[name].clamp_min(1)).square()
                sums[name].zero_()
                tokens[name].zero_()
    found: dict[str, Tensor] = {}
    for name, (group, _) in members.items():
        mine = (squares[name] / max(count, 1)).sqrt()
        found[group.name] = found[group.name] + mine if group.name in found else mine
    return found


@torch.no_grad()
def channel_activations(
    on: Subject, size: int, split: str = "calibration", examples: int = 128, progress: Progress | None = None
) -> Tensor:
    """(size,) importance of the channels: the same aggregation of every norm's output,
    added up over the norms.
    """
    progress = progress or Progress()
    norms = channel_norms(on.model, size)
    squares = torch.zeros(len(norms), size)
    handles = []
    for number, module in enumerate(norms):

        def keep(module: object, inputs: object, output: Tensor, number: int = number) -> None:
            squares[number] += output.detach().abs().reshape(-1, size).mean(0).square().cpu()

        handles.append(module.register_forward_hook(keep))
    count = min(examples, on.size(split))
    try:
        for batch in progress.track(on.batches(split, 1, examples), "activations", count):
            on.task.output(on.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return (squares / max(count, 1)).sqrt().sum(0)


@SALIENCY.add(
    "activation",
    formula="rms over examples of the mean over tokens of ||a||",
    source="Muralidharan et al. 2024 (Minitron)",
    needs="inputs",
    traits=("heads", "neurons", "channels"),
)
def activation(
    calibration: Calibration, groups: Sequence[Group], options: Options
) -> dict[str, Tensor] | Tensor:
    on, split, examples = calibration.subject, calibration.split, calibration.examples
    if groups:
        return unit_activations(on, groups, split, examples, calibration.progress)
    return channel_activations(on, channels(on.model), split, examples, calibration.progress)
