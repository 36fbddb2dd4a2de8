"""Roundings that are trained with the weights: what is learned, how it is rounded on the way,
what it pays for its width, and the grid it ends on.

`TrainQuantized` puts one on every layer, asks it for `prepare` before and `extra` after every step's loss,
and for `final` at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.quantization.activations.activations import SignInputs, signs
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import Grid, in_groups, stored
from workbench.quantization.rounding.adapters import Adapter, zero_term
from workbench.quantization.trained.settings import TRAINED_ROUNDING, TrainedSettings
from workbench.subjects import Layer, LowRank, Subject
from workbench.subjects.changes import Change

if TYPE_CHECKING:
    import pandas as pd

    from workbench.progress import Progress


@dataclass
class Course:
    """Where a training stands: the share of the quantized steps done, the source of random choices,
    and what a method keeps between steps.
    """

    settings: TrainedSettings
    generator: torch.Generator
    done: float = 0.0
    kept: dict[str, float] = field(default_factory=dict)


class TrainedRounding(Change):
    """One layer's rounding in training, at float32 at least whatever the weight's dtype.
    `rate` multiplies the learning rate of its own parameters.
    """

    order = 50
    rate: ClassVar[float] = 1.0
    group: int
    surveyed: Mapping[str, float] = {}  # what `survey` found of this layer

    @classmethod
    def check(cls, settings: TrainedSettings, on: Subject, layers: Sequence[Layer]) -> None:
        """`BadInput` for what cannot be trained this way; a dense subject is what most begin with."""
        if quantized := [layer.name for layer in layers if any(c.order == 50 for c in layer.changes)]:
            raise BadInput(f"layers: {quantized[0]} is quantized already; train the dense subject")

    @classmethod
    def before(cls, layers: Sequence[Layer], settings: TrainedSettings, generator: torch.Generator) -> None:
        """What is put on the layers before their roundings."""

    @classmethod
    def after(
        cls, on: Subject, layers: Sequence[Layer], settings: TrainedSettings, generator: torch.Generator
    ) -> None:
        """What is put on the layers, or around them, once they are rounded."""

    @classmethod
    def survey(
        cls, on: Subject, layers: Sequence[Layer], settings: TrainedSettings
    ) -> Mapping[str, Mapping[str, float]]:
        """What a method asks of the subject before quantization is switched on, by layer."""
        return {}

    @classmethod
    def begin(cls, weight: Tensor, group: int, settings: TrainedSettings) -> TrainedRounding | None:
        """The rounding of a layer whose weight (..., out, in), float32,
        is this when quantization is switched on; None where none is added.
        """
        raise TypeError(f"{cls.__name__} has no begin()")

    def forward(self, weight: Tensor) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return super().forward(wide).to(weight.dtype)

    def prepare(self, course: Course) -> None:
        """Before a step: move what follows a schedule, draw what is random."""

    @classmethod
    def extra(
        cls, roundings: Sequence[TrainedRounding], sizes: Sequence[int], loss: Tensor, course: Course
    ) -> Tensor | None:
        """What is added to the loss for all layers together (sizes: their numbers of weights), or None."""
        return None

    @property
    def width(self) -> Tensor | None:
        """The expected bits of a weight, differentiable, for roundings that choose it."""
        return None

    def final(self, weight: Tensor) -> tuple[Tensor, Grid]:
        """(values, grid) at the end of training; the values are what the last forward pass used,
        up to what became exact.
        """
        raise TypeError(f"{type(self).__name__} has no final()")

    @classmethod
    def tables(
        cls,
        roundings: Sequence[TrainedRounding],
        layers: Sequence[Layer],
        on: Subject,
        settings: TrainedSettings,
        progress: Progress,
    ) -> dict[str, pd.DataFrame]:
        """What a method reports besides the loss of the subject it ended on."""
        return {}


def average_width(roundings: Sequence[TrainedRounding], sizes: Sequence[int]) -> Tensor:
    widths = torch.stack([w for r in roundings if (w := r.width) is not None])
    shares = torch.tensor(sizes, dtype=widths.dtype, device=widths.device)
    return (widths * shares).sum() / shares.sum()


def slowed(value: Tensor, factor: float) -> Tensor:
    """The same value, its gradient times `factor`."""
    slow = value * factor
    return slow + (value - slow).detach()


def spread(scale: Tensor, group: int, width: int) -> Tensor:
    return scale.repeat_interleave(group, -1)[..., :width]


class Width(Options):
    bits: int = parameter(3, "width", ge=2, le=8, unit="bits")


@TRAINED_ROUNDING.add(
    "lsq",
    formula="s round(clip(w / s)), s learned",
    source="Esser et al. 2020, LSQ",
    needs="training",
    title="LSQ",
    options=Width,
)
class LearnedStep(TrainedRounding):
    """LSQ (Esser et al. 2020): s round(clip(w / s)) with a learned step s for every group.

    d/ds is round(w/s) - w/s inside the range and the bound outside (eq. 3), which is what the
    straight-through rounding of w / s gives; it is scaled by 1 / sqrt(weights of a group x highest)
    (section 2.2).
    """

    def __init__(self, step: Tensor, *, format: str, group: int) -> None:
        super().__init__()
        self.step = nn.Parameter(step)  # (..., out or 1, groups)
        self.format, self.group = format, group

    @classmethod
    def begin(cls, weight: Tensor, group: int, settings: TrainedSettings) -> LearnedStep:
        """The paper's start, 2 mean|w| / sqrt(highest), on each group."""
        format = named("int", settings.method.options.bits)
        start = 2 * in_groups(weight, group).abs().mean(-1) / max(format.element.highest, 1.0) ** 0.5
        return cls(start.clamp_min(1e-6), format=format.name, group=group)

    def change(self, weight: Tensor) -> Tensor:
        element = named(self.format).element
        factor = (self.group * max(element.highest, 1.0)) ** -0.5
        step = spread(slowed(self.step.abs().clamp_min(1e-8), factor), self.group, weight.shape[-1])
        units = (weight / step).clamp(element.lowest, element.highest)
        return (units + (element.round(units.detach()) - units).detach()) * step

    def grid(self) -> Grid:
        format = named(self.format)
        return Grid(format, stored(self.step.detach().abs().clamp_min(1e-8), format), None, self.group)

    def final(self, weight: Tensor) -> tuple[Tensor, Grid]:
        grid = self.grid()
        return grid.round(weight), grid

    def config(self) -> dict[str, Any]:
        return {"format": self.format, "group": self.group}


class WidthAndRank(Width):
    rank: int = parameter(8, "rank of the low-rank term", ge=1, le=1024)


@TRAINED_ROUNDING.add(
    "l4q",
    formula="lsq of W + A B, A and B alone trained",
    source="Jeon et al. 2024, L4Q",
    needs="training",
    title="L4Q",
    options=WidthAndRank,
    traits="low-rank",
)
class StepOfLowRank(LearnedStep):
    """A learned step around a weight and its low-rank term, which is zero at first."""

    @classmethod
    def before(cls, layers: Sequence[Layer], settings: TrainedSettings, generator: torch.Generator) -> None:
        rank = settings.method.options.rank
        for layer in layers:
            layer.attach(LowRank(*zero_term(layer.shape, rank, generator, layer.original.device)))


class Ramp(Options):
    ramp: float = parameter(
        0.0, "share of the steps over which rounding is phased in after the switch", ge=0, le=1, step=0.05
    )


@TRAINED_ROUNDING.add(
    "ternary",
    formula="gamma round(clip(w / gamma)), gamma = mean |w|",
    source="Ma et al. 2024; Kaushal et al. 2024, TriLM",
    needs="training",
    options=Ramp,
)
@TRAINED_ROUNDING.add(
    "binary",
    formula="gamma sign(w), gamma = mean |w|",
    source="Rastegari et al. 2016",
    needs="training",
    options=Ramp,
)
class MeanScaled(TrainedRounding):
    """Ternary or binary weights that follow the mean magnitude: gamma round(clip(w / gamma)),
    gamma = mean |w| of a group, straight through (Ma et al. 2024; Kaushal et al. 2024, TriLM).
    `blend` phases it in: w + blend (Q(w) - w).
    """

    blend: Tensor

    @classmethod
    def check(cls, settings: TrainedSettings, on: Subject, layers: Sequence[Layer]) -> None:
        super().check(settings, on, layers)
        ramp = settings.method.options.ramp
        if ramp + settings.switch_at > 1:
            raise BadInput(
                f"method.ramp: {ramp:g} after a switch at {settings.switch_at:g} ends beyond the last step; "
                "the two must add up to at most 1"
            )

    def __init__(self, blend: Tensor | None = None, *, format: str, group: int) -> None:
        super().__init__()
        self.register_buffer("blend", torch.ones(()) if blend is None else blend)
        self.format, self.group = format, group

    @classmethod
    def begin(cls, weight: Tensor, group: int, settings: TrainedSettings) -> MeanScaled:
        return cls(
            torch.tensor(0.0 if settings.method.options.ramp else 1.0, device=weight.device),
            format=settings.method.name,
            group=group,
        )

    def prepare(self, course: Course) -> None:
        if course.settings.method.options.ramp:
            share = course.settings.method.options.ramp / (
                1 - course.settings.switch_at
            )  # of the quantized steps
            self.blend.fill_(min(1.0, course.done / share))

    def grid_of(self, weight: Tensor) -> Grid:
        format = named(self.format)
        return Grid(
            format,
            stored(in_groups(weight.detach().float(), self.group).abs().mean(-1), format),
            None,
            self.group,
        )

    def change(self, weight: Tensor) -> Tensor:
        rounded = self.grid_of(weight).round(weight.detach())
        return weight + self.blend * (rounded - weight).detach()

    def final(self, weight: Tensor) -> tuple[Tensor, Grid]:
        grid = self.grid_of(weight)
        return grid.round(weight), grid

    def config(self) -> dict[str, Any]:
        return {"format": self.format, "group": self.group}


@TRAINED_ROUNDING.add(
    "bibert",
    formula="mean|w| sign(w - mean w), inputs sign(x)",
    source="Qin et al. 2022, BiBERT",
    needs="training",
    title="BiBERT",
    traits="signs",
)
class CentredSign(TrainedRounding):
    """Binary weights with both signs equally often: mean|w| sign(w - mean w) of every row, straight through
    where |w - mean w| < 1 (Qin et al. 2022, BiBERT, whose binary attention and distillation are not part
    of this).
    """

    def __init__(self, *, group: int) -> None:
        super().__init__()
        self.group = group

    @classmethod
    def check(cls, settings: TrainedSettings, on: Subject, layers: Sequence[Layer]) -> None:
        super().check(settings, on, layers)
        if fused := [layer.name for layer in layers if len(layer.shape) == 3]:
            raise BadInput(
                f"layers: {fused[0]} reads its inputs inside a fused expert kernel; "
                f"{settings.method} needs plain linears"
            )

    @classmethod
    def after(
        cls, on: Subject, layers: Sequence[Layer], settings: TrainedSettings, generator: torch.Generator
    ) -> None:
        for layer in layers:
            layer.attach(SignInputs())

    @classmethod
    def begin(cls, weight: Tensor, group: int, settings: TrainedSettings) -> CentredSign:
        return cls(group=weight.shape[-1])

    def change(self, weight: Tensor) -> Tensor:
        centred = weight - weight.mean(-1, keepdim=True)
        clipped = centred.clamp(-1, 1)
        return clipped + (self.signs(weight) * self.grid_of(weight).scale.to(weight.dtype) - clipped).detach()

    def signs(self, weight: Tensor) -> Tensor:
        return signs(weight - weight.mean(-1, keepdim=True))

    def grid_of(self, weight: Tensor) -> Grid:
        format = named("binary")
        return Grid(
            format, stored(weight.detach().float().abs().mean(-1, keepdim=True), format), None, self.group
        )

    def final(self, weight: Tensor) -> tuple[Tensor, Grid]:
        grid = self.grid_of(weight)
        return self.signs(weight) * grid.scale, grid

    def config(self) -> dict[str, Any]:
        return {"group": self.group}


@TRAINED_ROUNDING.add(
    "adapters",
    formula="Q + A B, A and B alone trained",
    source="Dettmers et al. 2023, QLoRA",
    needs="training",
    traits="low-rank",
)
class TermsBeside(TrainedRounding):
    """Low-rank terms beside weights that are rounded already."""

    @classmethod
    def check(cls, settings: TrainedSettings, on: Subject, layers: Sequence[Layer]) -> None:
        if bare := [layer.name for layer in layers if not any(isinstance(c, Adapter) for c in layer.changes)]:
            raise BadInput(
                f"layers: {bare[0]} has no adapter to train; quantize with adapter qlora or loftq first"
            )

    @classmethod
    def begin(cls, weight: Tensor, group: int, settings: TrainedSettings) -> None:
        return None
