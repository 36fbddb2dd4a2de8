"""Widths and formats chosen in training, under a budget of bits: by noise, by bit planes, by policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import Grid, fit, in_groups, stored
from workbench.quantization.trained.settings import TRAINED_ROUNDING, TrainedSettings
from workbench.quantization.trained.trained_rounding import Course, TrainedRounding, average_width, spread
from workbench.subjects import Layer, Subject


class Budget(Options):
    budget: float = parameter(3.0, "average width that it pulls towards", ge=2, le=8, unit="bits", step=0.25)
    strength: float = parameter(1.0, "how hard it pulls (nats a bit)", ge=0, le=1000, scale="log")


class SettlingBudget(Budget):
    settle: float = parameter(
        0.0,
        "share of the steps, the last, that train with the widths as they are then",
        ge=0,
        lt=1,
        step=0.05,
    )


def settled(course: Course) -> bool:
    """Whether the last share of the steps, in which widths no longer move, has begun."""
    return course.done > 1 - course.settings.method.options.settle


@TRAINED_ROUNDING.add(
    "nipq",
    formula="clip(w, -a, a) + D n, n uniform, D = a / (2^(b-1) - 1)",
    source="Shin et al. 2023, NIPQ",
    needs="training",
    title="NIPQ",
    options=SettlingBudget,
)
class PseudoNoise(TrainedRounding):
    """NIPQ (Shin et al. 2023): in training clip(w, -a, a) + D n with n uniform in [-1/2, 1/2] and the step
    D = a / (2^(b-1) - 1); a and the real-valued width b are learned, without a straight-through estimate.
    Outside training w is rounded to the nearest whole width.

    The penalty is strength |average width - budget|. Only weights get noise here, not activations. With
    `settle` the last steps round, straight through, to the nearest whole width; the bound is still learned.
    """

    rate = 30.0
    low, high = 2.0, 8.0
    settled = False

    def __init__(self, log_bound: Tensor, place: Tensor, *, group: int) -> None:
        super().__init__()
        self.log_bound = nn.Parameter(log_bound)  # (..., out, groups)
        self.place = nn.Parameter(place)  # b = low + (high - low) sigmoid(place)
        self.group, self.drawn = group, 0

    @classmethod
    def begin(cls, weight: Tensor, group: int, settings: TrainedSettings) -> PseudoNoise:
        share = (min(max(settings.method.options.budget + 1.0, cls.low + 0.5), cls.high - 0.5) - cls.low) / (
            cls.high - cls.low
        )
        bound = in_groups(weight, group).abs().amax(-1).clamp_min(1e-8)
        return cls(
            bound.log(), torch.tensor(math.log(share / (1 - share)), device=weight.device), group=group
        )

    def prepare(self, course: Course) -> None:
        self.drawn = int(
            torch.randint(2**31, (), generator=course.generator)
        )  # the step's noise, the same in every forward pass
        self.settled = settled(course)

    @property
    def width(self) -> Tensor:
        width = self.low + (self.high - self.low) * torch.sigmoid(self.place)
        return width.detach().round() if self.settled else width

    def step(self) -> Tensor:
        return self.log_bound.exp() / (2 ** (self.width - 1) - 1)

    def change(self, weight: Tensor) -> Tensor:
        if not self.training:
            values, _ = self.final(weight.float())
            return values.to(weight.dtype)
        bound, step = (spread(t, self.group, weight.shape[-1]) for t in (self.log_bound.exp(), self.step()))
        if self.settled:
            highest = 2 ** (self.width - 1) - 1
            units = torch.minimum(torch.maximum(weight / step, -highest), highest)
            return (units + (units.round() - units).detach()) * step
        noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(self.drawn)).to(weight) - 0.5
        return torch.minimum(torch.maximum(weight, -bound), bound) + step * noise

    @classmethod
    def extra(
        cls, roundings: Sequence[TrainedRounding], sizes: Sequence[int], loss: Tensor, course: Course
    ) -> Tensor | None:
        return (
            course.settings.method.options.strength
            * (average_width(roundings, sizes) - course.settings.method.options.budget).abs()
        )

    def final(self, weight: Tensor) -> tuple[Tensor, Grid]:
        format = named(f"int{round(float(self.width.detach()))}-odd")
        scale = stored(self.log_bound.detach().exp() / format.element.highest, format)
        grid = Grid(format, scale, None, self.group)
        return grid.round(weight), grid

    def config(self) -> dict[str, Any]:
        return {"group": self.group}


@TRAINED_ROUNDING.add(
    "csq",
    formula="s / (2^n - 1) sum_b (f(p_b) - f(q_b)) f(m_b) 2^b",
    source="Xiao et al. 2023, CSQ",
    needs="training",
    title="CSQ",
    options=SettlingBudget,
)
class BitPlanes(TrainedRounding):
    """CSQ (Xiao et al. 2023): w = s/(2^n - 1) sum_b (f(p_b) - f(q_b)) f(m_b) 2^b with gates f(m) =
    sigmoid(beta m), beta growing until they are zeros and ones; m_b, one for a layer and plane, says which
    planes stay. No rounding and no straight-through estimate in training.

    The penalty is strength (average width - budget) sum_b f(m_b), its first factor held fixed, so a layer's
    width grows or shrinks. The planes start at the weight's own bits,
    with the step enlarged by what the soft gates take away. With `settle` the last steps are the paper's
    second phase: open planes stay open, closed ones closed, and beta grows again from its start, as saturated
    planes would not learn.
    """

    rate = 30.0
    settled = False
    planes: ClassVar[int] = 7  # with the sign, eight bits
    first, last, ajar = (
        4.0,
        200.0,
        0.25,
    )  # sharpness at both ends; where the planes' gates start, so that few steps can close them
    sharpness: Tensor

    def __init__(
        self,
        log_step: Tensor,
        positive: Tensor,
        negative: Tensor,
        keep: Tensor,
        sharpness: Tensor | None = None,
        *,
        group: int,
    ) -> None:
        super().__init__()
        self.log_step = nn.Parameter(log_step)  # (..., out, groups): log of s / (2^n - 1)
        self.positive, self.negative = (
            nn.Parameter(positive),
            nn.Parameter(negative),
        )  # (planes, ..., out, in)
        self.keep = nn.Parameter(keep)  # (planes,)
        self.register_buffer("sharpness", torch.tensor(self.first) if sharpness is None else sharpness)
        self.group = group

    @classmethod
    def begin(cls, weight: Tensor, group: int, settings: TrainedSettings) -> BitPlanes:
        step = in_groups(weight, group).abs().amax(-1).clamp_min(1e-8) / (2**cls.planes - 1)
        whole = (weight / spread(step, group, weight.shape[-1])).round().long()
        digits = torch.stack([(whole.abs() >> b) & 1 for b in range(cls.planes)])
        positive, negative = (torch.where((digits == 1) & (sign * whole > 0), 1.0, -1.0) for sign in (1, -1))
        soft = math.tanh(cls.first / 2) * torch.sigmoid(
            torch.tensor(cls.first * cls.ajar)
        )  # f(1) - f(-1), times a plane's gate
        return cls(
            (step / soft).log(),
            positive,
            negative,
            torch.full((cls.planes,), cls.ajar, device=weight.device),
            group=group,
        )

    def prepare(self, course: Course) -> None:
        self.settled, settle = settled(course), course.settings.method.options.settle
        done = (course.done - 1 + settle) / settle if self.settled else course.done / (1 - settle)
        self.sharpness.fill_(self.first * (self.last / self.first) ** done)

    def gates(self) -> Tensor:
        """In the second phase, with `settle`, the open planes stay open and the others closed."""
        if self.settled:
            return (self.keep.detach() > 0).to(self.keep.dtype)
        return torch.sigmoid(self.sharpness * self.keep)

    @property
    def width(self) -> Tensor:
        return self.gates().sum() + 1  # the sign

    def change(self, weight: Tensor) -> Tensor:
        powers = 2.0 ** torch.arange(self.planes, device=weight.device)
        units = torch.zeros_like(weight)
        for gate, power, p, q in zip(self.gates(), powers, self.positive, self.negative, strict=True):
            units = units + gate * power * (
                torch.sigmoid(self.sharpness * p) - torch.sigmoid(self.sharpness * q)
            )
        return units * spread(self.log_step.exp(), self.group, weight.shape[-1])

    @classmethod
    def extra(
        cls, roundings: Sequence[TrainedRounding], sizes: Sequence[int], loss: Tensor, course: Course
    ) -> Tensor | None:
        average = average_width(roundings, sizes)
        return (
            course.settings.method.options.strength
            * (average.detach() - course.settings.method.options.budget)
            * average
        )

    def final(self, weight: Tensor) -> tuple[Tensor, Grid]:
        """Integers of the open planes; a closed lowest plane doubles the step.
        A closed plane between open ones still takes its bit.
        """
        open_planes = [b for b in range(self.planes) if float(self.keep[b].detach()) > 0] or [self.planes - 1]
        low, high = open_planes[0], open_planes[-1]
        whole = sum(
            2.0 ** (b - low) * ((self.positive[b] > 0).float() - (self.negative[b] > 0).float())
            for b in open_planes
        )
        assert isinstance(whole, Tensor)
        format = named(f"int{max(2, high - low + 2)}-odd")
        grid = Grid(format, stored(self.log_step.detach().exp() * 2.0**low, format), None, self.group)
        return whole.detach() * grid.columns(weight.shape[-1])[0], grid

    def config(self) -> dict[str, Any]:
        return {"group": self.group}


class FormatBudget(Budget):
    formats: list[str] = parameter(
        ["int2", "int3", "int4", "int8"], "formats that are chosen from, by name", min_length=2
    )


@TRAINED_ROUNDING.add(
    "fliqs",
    formula="REINFORCE on a softmax over formats",
    source="Dotzel et al. 2024, FLIQS",
    needs="training",
    title="FLIQS",
    options=FormatBudget,
)
class FormatPolicy(TrainedRounding):
    """FLIQS (Dotzel et al. 2024): each layer draws a format at every step from a softmax policy;
    all formats share the weights (straight through).

    REINFORCE with an exponential-average baseline on the reward -loss - strength |bits / budget - 1|
    (the paper's absolute cost, with the loss in the accuracy's place) and an entropy bonus that follows
    a cosine: exploring first, a single format at the end.
    """

    rate = 100.0

    @classmethod
    def check(cls, settings: TrainedSettings, on: Subject, layers: Sequence[Layer]) -> None:
        super().check(settings, on, layers)
        for name in settings.method.options.formats:
            if named(name).scale != "real":
                raise BadInput(
                    f"method.formats: {name!r} fixes its own scale; fliqs chooses among formats with real "
                    "scales, as int4, e2m1 or nf4"
                )

    def __init__(self, logits: Tensor, *, formats: Sequence[str], group: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.formats, self.group, self.drawn = list(formats), group, -1

    @classmethod
    def begin(cls, weight: Tensor, group: int, settings: TrainedSettings) -> FormatPolicy:
        return cls(
            torch.zeros(len(settings.method.options.formats), device=weight.device),
            formats=settings.method.options.formats,
            group=group,
        )

    def prepare(self, course: Course) -> None:
        chances = torch.softmax(self.logits.detach().cpu(), 0)
        self.drawn = int(torch.multinomial(chances, 1, generator=course.generator))

    def grid_of(self, weight: Tensor, index: int) -> Grid:
        return fit(weight, named(self.formats[index]), "group", self.group)

    @property
    def index(self) -> int:
        """The format of this forward pass: the drawn one in training, else the likeliest."""
        return self.drawn if self.training and self.drawn >= 0 else int(self.logits.detach().argmax())

    def change(self, weight: Tensor) -> Tensor:
        return weight + (self.grid_of(weight, self.index).round(weight.detach()) - weight).detach()

    @property
    def bits(self) -> Tensor:
        return torch.tensor([float(named(f).element.bits) for f in self.formats])

    @classmethod
    def extra(
        cls, roundings: Sequence[TrainedRounding], sizes: Sequence[int], loss: Tensor, course: Course
    ) -> Tensor | None:
        policies = [r for r in roundings if isinstance(r, FormatPolicy)]
        drawn = sum(float(p.bits[p.drawn]) * n for p, n in zip(policies, sizes, strict=True)) / sum(sizes)
        reward = -float(loss.detach()) - course.settings.method.options.strength * abs(
            drawn / course.settings.method.options.budget - 1
        )
        baseline = course.kept.get("baseline", reward)
        course.kept["baseline"] = 0.9 * baseline + 0.1 * reward
        logs = [torch.log_softmax(p.logits, 0) for p in policies]
        chosen = torch.stack([log[p.drawn] for log, p in zip(logs, policies, strict=True)]).sum()
        entropy = torch.stack([-(log.exp() * log).sum() for log in logs]).mean()
        bonus = 0.05 * math.cos(math.pi * course.done)  # from exploring to deciding
        return -(reward - baseline) * chosen - bonus * entropy

    def final(self, weight: Tensor) -> tuple[Tensor, Grid]:
        grid = self.grid_of(weight, int(self.logits.detach().argmax()))
        return grid.round(weight), grid

    def config(self) -> dict[str, Any]:
        return {"formats": self.formats, "group": self.group}
