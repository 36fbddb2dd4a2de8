"""What training through the rounding minimises: the task's loss, the dense subject's outputs, or a mixture of the two."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.instruments import BadInput
from workbench.subjects import Batch, Subject

if TYPE_CHECKING:
    from workbench.quantization.aware import TrainQuantized


def teacher_loss(on: Subject, output: Tensor, target: Tensor, batch: Batch, temperature: float = 1.0) -> Tensor:
    """What a student's `output` is worth against a teacher's `target` (both as the task returns them), a mean over the batch's items.

    Cross-entropy tasks: -T^2 sum_c p_c(target / T) log p_c(output / T) (Hinton et al. 2015; at T = 1 the autoregressive distillation of
    Ma et al. 2024, eq. 5): the teacher's entropy where the two agree. Squared-error tasks: half the squared distance to the target.
    """
    rows, _ = on.task.flat(output, batch)
    goals, _ = on.task.flat(target, batch)
    if on.task.loss_kind == "squared_error":
        return 0.5 * (rows - goals).square().sum(-1).mean()
    wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    return F.cross_entropy(wide / temperature, torch.softmax(goals.to(wide.dtype) / temperature, -1)) * temperature**2


class Objective:
    """(1 - d) task + d teacher: `distillation` d of the settings, with the subject before training as the teacher.

    `parts` holds the last step's terms as numbers, for the table.
    """

    def __init__(self, settings: TrainQuantized, on: Subject) -> None:
        self.settings, self.parts = settings, dict[str, float]()
        self.teacher = on.with_model(copy.deepcopy(on.model).eval().requires_grad_(False)) if settings.distillation else None

    @staticmethod
    def check(settings: TrainQuantized, on: Subject) -> None:
        if settings.distillation and on.task.loss_kind == "other":
            raise BadInput(f"distillation: the loss of a {on.task.name} task is the user's own, so a teacher's output has no known place in it; set it to 0")

    def __call__(self, on: Subject, batch: Batch) -> Tensor:
        output = on.task.output(on.model, batch)
        loss, share = on.task.criterion(output, batch), self.settings.distillation
        self.parts = {}
        if self.teacher is not None:
            with torch.no_grad():
                target = self.teacher.task.output(self.teacher.model, batch)
            taught = teacher_loss(on, output, target, batch, self.settings.temperature)
            self.parts = {"task_loss": float(loss.detach()), "teacher_loss": float(taught.detach())}
            loss = (1 - share) * loss + share * taught
        return loss
