"""What a packing learns on: the fine-tune's outputs on calibration batches, and gradients of the matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workbench.arithmetic.difference.difference import Packing, Stored
from workbench.arithmetic.matrices import Place
from workbench.progress import Progress
from workbench.statistics.gradients import learning
from workbench.subjects import Batch, Subject
from workbench.subjects.tasks import first_tensor


@dataclass
class Course:
    """The model with its stored differences, and the fine-tuned one to answer like.

    base, tuned : the matrix (out, in) of either, by name
    stored : what is stored of each matrix; whoever changes it calls `write`
    """

    host: Subject
    teacher: Subject
    places: dict[str, Place]
    base: Callable[[str], Tensor]
    tuned: Callable[[str], Tensor]
    packing: Packing
    stored: dict[str, Stored]
    calibration_examples: int
    validation_examples: int
    progress: Progress

    def batches(self, size: int, steps: int, label: str) -> Iterator[Batch]:
        """So many calibration batches, again and again in the same order."""

        def endless() -> Iterator[Batch]:
            done = 0
            while done < steps:
                for batch in self.host.batches("calibration", size, self.calibration_examples):
                    if done < steps:
                        yield batch
                        done += 1

        return self.progress.track(endless(), label, steps)

    def write(self, names: Sequence[str]) -> None:
        """Put the values of these matrices, as stored now, into the model."""
        for name in names:
            self.places[name].write(self.packing.unpack(self.stored[name], self.base(name)))

    def gradients(self, batch: Batch, of: Literal["outputs", "loss"] = "outputs") -> dict[str, Tensor]:
        """Gradient (out, in) of each matrix: of the mean squared distance of the outputs to the fine-tune's,
        or of the task's loss.
        """
        held = list({id(p.parameter): p.parameter for p in self.places.values()}.values())
        with torch.enable_grad(), learning(held):  # type: ignore[arg-type]
            if of == "loss":
                loss = self.host.loss(batch)
            else:
                loss = torch.nn.functional.mse_loss(self.answer(self.host, batch), self.goal(batch))
            found = torch.autograd.grad(loss, held, allow_unused=True)
        known = {id(p): g for p, g in zip(held, found, strict=True)}
        return {name: place.part(known[id(place.parameter)]) for name, place in self.places.items()}

    def answer(self, on: Subject, batch: Batch) -> Tensor:
        return first_tensor(on.task.output(on.model, batch)).float()

    def goal(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.answer(self.teacher, batch)

    def validation_loss(self) -> float:
        return self.host.evaluate("validation", limit=self.validation_examples)["loss"]
