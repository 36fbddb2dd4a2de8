"""BitDelta: the sign of every entry and one scale a matrix, distilled into the fine-tune's answers."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.arithmetic.difference.course import Course
from workbench.arithmetic.difference.difference import DIFFERENCE, Matrix, Stored
from workbench.axis import Options, parameter
from workbench.quantization.number.packing import pack, unpack


class OneBit(Options):
    steps: int = parameter(
        100, "steps that distil the scales; 0 keeps the least-squares ones", ge=0, le=100_000
    )
    learning_rate: float = parameter(1e-4, "of AdamW on the scales, a cosine to 0", gt=0, le=1, scale="log")
    batch_size: int = parameter(4, "calibration examples a step", ge=1, le=1024)


@DIFFERENCE.add(
    "bitdelta",
    formula="w = w_base + a sign(d), a = mean |d|, then min_a |z_tuned - z(a)|^2",
    source="Liu et al. 2024, BitDelta, eqs. 1 to 4",
    needs="inputs",
    title="BitDelta",
    options=OneBit,
    traits="learned",
)
class BitDelta:
    def __init__(self, options: OneBit) -> None:
        self.options = options

    def pack(self, matrix: Matrix) -> Stored:
        difference = matrix.difference
        return {"signs": pack(difference >= 0, 1), "scale": difference.abs().mean().reshape(1)}

    def unpack(self, stored: Stored, base: Tensor) -> Tensor:
        return base + stored["scale"] * signs_of(stored, base)

    def learn(self, course: Course) -> None:
        """The scales of all matrices, by the squared distance of outputs on calibration batches. The slope
        of a scale is the gradient of its matrix along the signs.
        """
        steps = self.options.steps
        names = list(course.stored)
        if not steps or not names:
            return
        scales = torch.stack([course.stored[name]["scale"][0] for name in names]).requires_grad_(True)
        optimizer = torch.optim.AdamW([scales], lr=self.options.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for batch in course.batches(self.options.batch_size, steps, "distil the scales"):
            gradients = course.gradients(batch)
            scales.grad = torch.stack(
                [(gradients[name] * signs_of(course.stored[name], course.base(name))).sum() for name in names]
            )
            optimizer.step()
            schedule.step()
            for name, scale in zip(names, scales.detach(), strict=True):
                course.stored[name]["scale"] = scale.reshape(1).clone()
            course.write(names)


def signs_of(stored: Stored, base: Tensor) -> Tensor:
    """+1 and -1 in the shape of the matrix."""
    return unpack(stored["signs"], 1, base.numel()).reshape(base.shape).float() * 2 - 1
