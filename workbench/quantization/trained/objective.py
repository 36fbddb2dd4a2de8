"""What training through the rounding minimises: the task's loss, the dense subject's outputs or a mixture,
and what attention should look like.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.errors import BadInput
from workbench.quantization.activations.attention import AttentionCall, order_of, watching
from workbench.subjects import Batch, Subject
from workbench.subjects.vocabulary import Unspoken

if TYPE_CHECKING:
    from workbench.quantization.trained.settings import TrainedSettings


def teacher_loss(
    on: Subject,
    output: Tensor | Unspoken,
    target: Tensor | Unspoken,
    batch: Batch,
    temperature: float = 1.0,
) -> Tensor:
    """What a student's `output` is worth against a teacher's `target` (both as the task returns them),
    a mean over the batch's items.

    Cross-entropy tasks: -T^2 sum_c p_c(target / T) log p_c(output / T) (Hinton et al. 2015; at T = 1
    the autoregressive distillation of Ma et al. 2024, eq. 5): the teacher's entropy where the two agree.
    Squared-error tasks: half the squared distance to the target.
    """

    def softened(rows: Tensor, goals: Tensor) -> Tensor:
        wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        chances = torch.softmax(goals.to(wide.dtype) / temperature, -1)
        return F.cross_entropy(wide / temperature, chances, reduction="sum")

    if isinstance(output, Unspoken) and isinstance(target, Unspoken):
        total = output.total(lambda rows, _, goals: softened(rows, goals), target)
        return total / output.items * temperature**2
    rows, _ = on.task.flat(output, batch)
    goals, _ = on.task.flat(target, batch)
    if on.task.loss_kind == "squared_error":
        return 0.5 * (rows - goals).square().sum(-1).mean()
    return softened(rows, goals) / len(rows) * temperature**2


def information(calls: Sequence[AttentionCall]) -> Tensor:
    """-log of the mean of log(1 + var q) and log(1 + var k) over layers, heads and tokens,
    var over a head's features (Shen et al. 2024, EdgeQAT).

    Of a Gaussian, log var is twice the entropy but for a constant, so falling means queries and keys that
    carry more. The paper sums where this takes the mean:
    the gradient is the same, and the value does not depend on the batch's size. Padding is left out.
    """
    found = []
    for call in calls:
        for heads in (call.query, call.key):
            spread = torch.log1p(heads.float().var(-1)).transpose(1, 2)  # (batch, tokens, heads)
            keep = call.keep
            found.append(
                spread[keep].flatten()
                if keep is not None and keep.shape == spread.shape[:2]
                else spread.flatten()
            )
    return -torch.cat(found).mean().log()


def map_distance(calls: Sequence[AttentionCall], taught: Sequence[AttentionCall]) -> Tensor:
    """1 - cos between a head's attention map and the teacher's, each as one vector, on average over examples,
    heads and layers.

    Shen et al. (2024) name the cosine similarity; their code adds its logarithm to the loss, which drives
    the maps apart, so the distance that falls as they agree stands here in its place.
    Rows of padding are left out.
    """
    found = []
    for call, goal in zip(calls, taught, strict=True):
        first, second = call.maps.float(), goal.maps.float()
        if call.keep is not None and call.keep.shape == (len(first), first.shape[2]):
            first, second = (m * call.keep[:, None, :, None] for m in (first, second))
        found.append(1 - F.cosine_similarity(first.flatten(2), second.flatten(2), dim=-1).mean())
    return torch.stack(found).mean()


class Objective:
    """(1 - d) task + d teacher + e information + m map distance, with the settings' `distillation` d,
    `entropy` e and `attention_match` m; the teacher is the subject before training.

    `parts` holds the last step's terms as numbers, for the table.
    """

    def __init__(self, settings: TrainedSettings, on: Subject) -> None:
        self.settings, self.parts = settings, dict[str, float]()
        taught = settings.distillation or settings.attention_match
        self.teacher = on.with_model(copy.deepcopy(on.model).eval().requires_grad_(False)) if taught else None

    @staticmethod
    def check(settings: TrainedSettings, on: Subject) -> None:
        if settings.distillation and on.task.loss_kind == "other":
            raise BadInput(
                f"distillation: the loss of a {on.task.name} task is the user's own, "
                "so a teacher's output has no known place in it; set it to 0"
            )
        if settings.entropy or settings.attention_match:
            order_of(on, [])

    def __call__(self, on: Subject, batch: Batch) -> Tensor:
        wanted = self.settings
        output, calls = self.forward(on, batch)
        loss = on.task.criterion(output, batch)
        found: dict[str, Tensor] = {}
        if self.teacher is not None:
            with torch.no_grad():
                target, taught = self.forward(self.teacher, batch)
            found["task_loss"] = loss
            if wanted.distillation:
                found["teacher_loss"] = teacher_loss(on, output, target, batch, wanted.temperature)
                loss = (1 - wanted.distillation) * loss + wanted.distillation * found["teacher_loss"]
            if wanted.attention_match:
                found["map_distance"] = map_distance(calls, taught)
                loss = loss + wanted.attention_match * found["map_distance"]
        if wanted.entropy:
            found["information"] = information(calls)
            loss = loss + wanted.entropy * found["information"]
        self.parts = {name: float(value.detach()) for name, value in found.items()}
        return loss

    def forward(self, on: Subject, batch: Batch) -> tuple[Tensor | Unspoken, list[AttentionCall]]:
        if not (self.settings.entropy or self.settings.attention_match):
            return on.task.deferred(on.model, batch), []
        with watching(on.model) as seen:
            output = on.task.deferred(on.model, batch)
        return output, [call for call in seen if isinstance(call, AttentionCall)]
