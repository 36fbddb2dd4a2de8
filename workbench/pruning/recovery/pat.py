"""Pruning-aware tuning (Liu et al. 2024, PAT): hidden channels are chosen and the model adapted to their loss
in one training run.

Every module that writes to the residual stream gets a hybrid sparsification module,

    y = s * (I + U V) (W x + b),      U V of low rank, s one scale a channel,

which is a change of W and b and is merged into them at the end. One mask over the channels is shared by
the whole model, m = sigmoid(T M) + c, where the temperature T = 1 / (1 - log t / log n) grows and the shift
c = max(1/2 - t / n, 0) vanishes over the n steps. To the task's loss are added 10 |kept - target| / target
(straight through the threshold at 0), the mean of (M - 1/2)^2 over the channels kept and of
(M + 1/2)^2 over the others, and the identity loss mean (V V^T - I)^2.

Where this departs from the authors: the mask also restricts the norms (`workbench.subjects.structure.norms`),
so that the masked model computes what the smaller one will, with LayerNorm too; and in the last fifth
of the run, where they freeze the soft mask, the channels of the largest M are kept exactly, so that what is
trained is what is cut. (Where a configuration ties the heads' size to the hidden size, as BERT's and GPT-2's
do, the heads lose their last principal axes on top of that, and the run has not seen it.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench.progress import Progress
from workbench.pruning.recovery.recovery import SETTINGS
from workbench.pruning.recovery.trainable import set_trainable
from workbench.pruning.sparse_training.side_terms import add_low_rank
from workbench.subjects import Batch, Layer, Subject, bake
from workbench.subjects.structure.channels import channels
from workbench.subjects.structure.dimensions import smallest_units
from workbench.subjects.structure.norms import restrict
from workbench.subjects.structure.units import discover
from workbench.training.data_order import WholeBatches
from workbench.training.loop import Training
from workbench.training.schedule.rise_and_fall import RiseAndFallLR

SOFT = 0.8  # share of the run with a soft mask
MASK_RATE = 20.0  # the mask's learning rate over that of the rest: it has a few hundred steps to separate


class ChannelTransform(nn.Module):
    """s * (I + U V), the identity at the start: columns (channels, n) -> (channels, n)."""

    def __init__(self, size: int, rank: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Parameter((torch.randn(rank, size, generator=generator) / size**0.5).to(device))
        self.up = nn.Parameter(torch.zeros(size, rank, device=device))
        self.scale = nn.Parameter(torch.ones(size, device=device))

    def forward(self, columns: Tensor) -> Tensor:
        return self.scale[:, None] * (columns + self.up @ (self.down @ columns))

    def identity_loss(self) -> Tensor:
        return (self.down @ self.down.T - torch.eye(len(self.down), device=self.down.device)).square().mean()


class Along(nn.Module):
    """A transform of a weight or bias along its axis of channels, as a parametrization."""

    def __init__(self, transform: ChannelTransform, axis: int) -> None:
        super().__init__()
        self.transform, self.axis = transform, axis

    def forward(self, value: Tensor) -> Tensor:
        moved = value.movedim(self.axis, 0)
        return self.transform(moved.reshape(len(moved), -1)).reshape(moved.shape).movedim(0, self.axis)


class ChannelMask(nn.Module):
    """The trained mask; `value` is what the norms use at the step set last."""

    def __init__(self, size: int, left: int, steps: int, device: torch.device) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(size, device=device))
        self.left, self.steps = left, max(steps, 2)
        self.set(0)

    def set(self, step: int) -> None:
        self.step = step
        self.value = (
            self.kept().float()
            if self.hard
            else torch.sigmoid(self.temperature * self.logits) + max(0.5 - step / self.steps, 0.0)
        )

    @property
    def hard(self) -> bool:
        return self.step >= SOFT * self.steps

    @property
    def temperature(self) -> float:
        return 1 / (1 - math.log(max(self.step, 1)) / math.log(self.steps) + 1e-6)

    def kept(self) -> Tensor:
        return smallest_units(self.logits.detach(), self.left)

    def loss(self) -> Tensor:
        if self.hard:
            return self.logits.new_zeros(())
        above = self.logits > 0
        count = (self.logits >= 0).float() + self.logits - self.logits.detach()  # straight through
        centres = torch.where(above, 0.5, -0.5)
        sides = [
            (self.logits - centres)[side].square().mean() for side in (above, ~above) if bool(side.any())
        ]
        return 10 * (count.sum() - self.left).abs() / self.left + sum(sides, self.logits.new_zeros(()))


@dataclass
class Tuned:
    """What a checkpoint holds besides the model: the mask is not a part of it."""

    mask: ChannelMask
    curve: list[dict[str, float]]

    def state_dict(self) -> dict[str, Any]:
        return {"logits": self.mask.logits, "curve": self.curve}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mask.logits.copy_(state_dict["logits"])
        self.curve[:] = state_dict["curve"]


def writers(on: Subject) -> list[Layer]:
    """The layers that write to the residual stream: attention and feed-forward outputs."""
    return [member.layer for group in discover(on.model) for member in group.consumers]


def learn_channels(
    on: Subject,
    left: int,
    kind: str,
    steps: int,
    lr: float,
    batch_size: int,
    rank: int,
    seed: int,
    progress: Progress,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Tensor, list[dict[str, float]]]:
    """Train, in place, and merge; returns (kept (hidden,), curve).
    The model computes its outputs over the kept channels once they are cut.

    `kind` low-rank trains the modules, biases, norms and an adapter on every matrix of the blocks (the
    authors' `find_all_linear_names`); finetune all weights but the embeddings in the adapters' place.
    settings : of the run, where they differ from recovery's.
    """
    bake(on.model)
    size, device = channels(on.model), on.device
    generator = torch.Generator().manual_seed(seed)
    was = {name: p.requires_grad for name, p in on.model.named_parameters()}
    if kind == "low-rank":
        add_low_rank(on.layers("blocks"), rank, beside=False, generator=generator)
    parameters = list(set_trainable(on, "adapters" if kind == "low-rank" else "all"))
    transforms = []
    for layer in writers(on):
        transform = ChannelTransform(size, min(rank, size), generator, device)
        transforms.append(transform)
        axis = len(layer.shape) - 2 + (1 if layer.transposed else 0)
        parametrize.register_parametrization(layer.module, layer.tensor, Along(transform, axis), unsafe=True)
        if layer.bias is not None:
            parametrize.register_parametrization(layer.module, "bias", Along(transform, 0), unsafe=True)
    mask = ChannelMask(size, left, steps, device)
    known = {id(p) for p in parameters}
    parameters += [p for t in transforms for p in t.parameters() if id(p) not in known]
    curve: list[dict[str, float]] = []
    task_losses: list[float] = []

    def loss(subject: Subject, batch: Batch) -> Tensor:
        mask.set(run.step)
        task = subject.loss(batch)
        task_losses.append(float(task.detach()))
        identity = torch.stack([t.identity_loss() for t in transforms]).mean()
        return task + mask.loss() + identity

    def keep_row(state: Training) -> None:
        kept = float((mask.logits >= 0).sum())
        curve.append({"step": float(state.step), "loss": task_losses[-1], "kept": kept})

    given: dict[str, Any] = {
        "steps": steps,
        "batch_size": min(batch_size, on.size("train")),
        "learning_rate": lr,
        "schedule": lambda optimizer, total: RiseAndFallLR(optimizer, total, 0.05, total - total // 20),
        "order": WholeBatches(seed),
        "own_generator": False,
        "evaluate_split": "",
        "clipped": lambda: parameters,
        "loss": loss,
        "callbacks": [keep_row],
        "begun": lambda run: run.learn([mask.logits], MASK_RATE),
        "keeps": [Tuned(mask, curve)],
        "progress": progress,
        "label": "pruning-aware tuning",
    }
    run = Training.start(on, **(SETTINGS | given | dict(settings or {})))
    with restrict(on.model, lambda: mask.value):
        run.advance()
    bake(on.model)
    for name, parameter in on.model.named_parameters():
        parameter.requires_grad_(was.get(name, True))
    on.model.eval()
    return mask.kept().cpu(), curve
