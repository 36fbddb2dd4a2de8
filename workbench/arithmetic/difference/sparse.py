"""Few entries of a difference: the largest by sign, random ones, or those that a mask has learned to need."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from workbench.arithmetic.difference.course import Course
from workbench.arithmetic.difference.difference import DIFFERENCE, Matrix, Stored
from workbench.arithmetic.difference.sparse_code import places_coded, places_read
from workbench.arithmetic.merging.task_vectors import dropped
from workbench.arithmetic.order_statistics import ranked
from workbench.axis import Options, parameter
from workbench.quantization.number.packing import pack, unpack

#: () -> the differences of all matrices, one after another.
Differences = Callable[[], Iterable[Tensor]]


def least_kept(differences: Differences, density: float) -> float:
    """The least magnitude among the int(density n) largest of all entries, at least one."""
    count = sum(each.numel() for each in differences())
    kept = max(int(density * count), 1)
    return ranked(lambda: (each.abs() for each in differences()), [count - kept])[0] if kept < count else 0.0


def deviation(differences: Differences) -> float:
    """Standard deviation of all entries, in float64."""
    count, total, squares = 0, 0.0, 0.0
    for each in differences():
        count += each.numel()
        total += float(each.double().sum())
        squares += float(each.double().square().sum())
    return float(max(squares / count - (total / count) ** 2, 0.0) ** 0.5)


class Signs(Options):
    density: float = parameter(0.2, "share of the largest differences whose sign is kept", gt=0, le=1)
    strength: float = parameter(1.0, "multiple of the differences' standard deviation", gt=0, le=100)


@DIFFERENCE.add(
    "compeft",
    formula="w = w_base + a std(d) sign(d) where |d| is among the largest",
    source="Yadav et al. 2023, ComPEFT, algorithm 1",
    title="ComPEFT",
    options=Signs,
    traits=("strength", "density", "surveyed"),
)
class TopSigns:
    """The largest are those of all matrices together, and so is the deviation."""

    def __init__(self, options: Signs) -> None:
        self.options = options
        self.least, self.scale = 0.0, 0.0

    def survey(self, differences: Differences) -> None:
        self.least = least_kept(differences, self.options.density)
        self.scale = self.options.strength * deviation(differences)

    def pack(self, matrix: Matrix) -> Stored:
        difference = matrix.difference
        kept = (difference.abs() >= self.least) & (difference != 0)
        signs = pack((difference > 0).flatten()[kept.flatten()], 1)
        return places_coded(kept) | {"signs": signs, "scale": torch.tensor([self.scale])}

    def unpack(self, stored: Stored, base: Tensor) -> Tensor:
        places = places_read(stored)
        signs = unpack(stored["signs"], 1, len(places)).float() * 2 - 1
        return added(base, places, stored["scale"] * signs)


def added(base: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """The base with values added at some of its places."""
    flat = base.flatten().clone()
    flat[places] += values
    return flat.reshape(base.shape)


class Random(Options):
    density: float = parameter(0.1, "share of the differences that is kept", gt=0, le=1)


@DIFFERENCE.add(
    "random-drop",
    formula="w = w_base + m d / density, m 1 with probability density",
    source="Yu et al. 2024, DARE, eq. 1",
    title="DARE, one difference stored",
    options=Random,
    traits="density",
)
class RandomDrop:
    def __init__(self, options: Random) -> None:
        self.options = options

    def pack(self, matrix: Matrix) -> Stored:
        """What is left, in 16 bits each."""
        generator = torch.Generator().manual_seed(matrix.seed)
        left = dropped(matrix.difference, 1 - self.options.density, True, generator)
        kept = left != 0
        return places_coded(kept) | {"values": left[kept].to(torch.float16)}

    def unpack(self, stored: Stored, base: Tensor) -> Tensor:
        return added(base, places_read(stored), stored["values"].float())


class Grafted(Options):
    density: float = parameter(
        0.01, "share of the entries that the mask begins with: the most moved", gt=0, le=1
    )
    steps: int = parameter(20, "steps that learn the mask; 0 keeps the most moved entries", ge=0, le=100_000)
    learning_rate: float = parameter(1e7, "of plain descent on the mask's logits", gt=0, scale="log")
    bias: float = parameter(10.0, "the mask is sigmoid(S - bias), turned over where it begins as one", ge=0)
    batch_size: int = parameter(16, "calibration examples a step", ge=1, le=1024)


@DIFFERENCE.add(
    "graft",
    formula="w = w_tuned where m, else w_base; m = round(m0 + (1 - 2 m0) sigmoid(S - bias)), S by descent",
    source="Panigrahi et al. 2023, eqs. 2 to 4; the authors' code",
    needs="gradients",
    title="Grafting: skill localization",
    options=Grafted,
    traits=("learned", "density", "surveyed"),
)
class Graft:
    """The fine-tune's own values, float32, at the places of the mask: what is grafted is not rounded."""

    def __init__(self, options: Grafted) -> None:
        self.options = options
        self.least = 0.0

    def survey(self, differences: Differences) -> None:
        self.least = least_kept(differences, self.options.density)

    def pack(self, matrix: Matrix) -> Stored:
        moved = matrix.tuned != matrix.base
        return grafted((matrix.difference.abs() >= self.least) & moved, matrix.tuned)

    def unpack(self, stored: Stored, base: Tensor) -> Tensor:
        flat = base.flatten().clone()
        flat[places_read(stored)] = stored["values"]
        return flat.reshape(base.shape)

    def learn(self, course: Course) -> None:
        """Descend the task's loss over the mask's logits; the best mask on validation is kept."""
        options, names = self.options, list(course.stored)
        if not options.steps:
            return
        tuned = {name: course.tuned(name) for name in names}
        begun = {name: mask_of(course.stored[name], course.base(name)) for name in names}
        logits = {name: torch.zeros(begun[name].shape) for name in names}
        best = course.validation_loss()
        for batch in course.batches(options.batch_size, options.steps, "learn the mask"):
            for name in names:
                d = tuned[name] - course.base(name)
                course.places[name].write(course.base(name) + self.soft(begun[name], logits[name]) * d)
            gradients = course.gradients(batch, "loss")
            trial: dict[str, Stored] = {}
            for name in names:
                slope = torch.sigmoid(logits[name] - options.bias)
                along = gradients[name] * (tuned[name] - course.base(name))
                turn = torch.where(begun[name], -1.0, 1.0)
                logits[name] -= options.learning_rate * turn * along * slope * (1 - slope)
                kept = (self.soft(begun[name], logits[name]) > 0.5) & (tuned[name] != course.base(name))
                trial[name] = grafted(kept, tuned[name])
            before = dict(course.stored)
            course.stored.update(trial)
            course.write(names)
            loss = course.validation_loss()
            if loss < best:
                best = loss
            else:
                course.stored.update(before)
        course.write(names)

    def soft(self, begun: Tensor, logits: Tensor) -> Tensor:
        share = torch.sigmoid(logits - self.options.bias)
        return torch.where(begun, 1 - share, share)


def grafted(kept: Tensor, tuned: Tensor) -> Stored:
    return places_coded(kept) | {"values": tuned[kept].clone()}


def mask_of(stored: Stored, base: Tensor) -> Tensor:
    """True where an entry is stored."""
    flat = torch.zeros(base.numel(), dtype=torch.bool)
    flat[places_read(stored)] = True
    return flat.reshape(base.shape)
