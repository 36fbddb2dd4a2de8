"""One stored integer tensor that is read at several widths, and training for all of them at once
(Huang et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization.number.fake_quant import FakeQuant
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import Grid, in_groups, stored
from workbench.quantization.number.packing import quantizer_of
from workbench.quantization.trained.settings import TRAINED_ROUNDING, TrainedSettings
from workbench.quantization.trained.trained_rounding import Course, TrainedRounding, spread
from workbench.subjects import Layer, Subject

PROBES, EXAMPLES = 4, 32  # of the Hessian traces


class Widths(Options):
    widths: list[int] = parameter(
        [8, 6, 4, 2], "widths that are trained for; the widest is stored", min_length=1, unit="bits"
    )
    switching: Literal["in turn", "by trace"] = parameter(
        "in turn", "a step's width, one for all layers in turn, or drawn for each by its Hessian trace"
    )


@TRAINED_ROUNDING.add(
    "double-rounding",
    formula="W_l = clip(round(W_h / 2^(h-l))), W_h = clip(round(W / s))",
    source="Huang et al. 2025",
    needs="training",
    options=Widths,
)
class DoubleRounding(TrainedRounding):
    """W_h = clip(round(W / s)) at the widest of several widths, and W_l = clip(round(W_h / 2^(h-l)))
    at a step s 2^(h-l) for a narrower one.

    Every step of training reads one width: the widths in turn (joint training), or for each layer one drawn
    with a probability that follows its Hessian trace (HASB). Gradients pass straight through both roundings
    inside the narrower range; d/ds is LSQ's (Esser et al. 2020).

    Gradients of s at width l are 2^(h-l) times those of a step of that width's own, so the lowest width would
    drown the others. The paper's adaptive scaling of the step's learning rate by width (ALRS) could not be
    read; here that factor is taken out, which is derived: at every width s then gets the gradient that LSQ
    gives to a step of its own. log s is learned. s starts where W_h just holds a group's largest weight.
    """

    rate = 10.0

    def __init__(self, log_step: Tensor, *, widths: Sequence[int], group: int) -> None:
        super().__init__()
        self.log_step = nn.Parameter(log_step)  # (..., out, groups)
        self.widths, self.group, self.drawn = sorted(widths, reverse=True), group, max(widths)
        self.draws: list[int] = []

    @classmethod
    def check(cls, settings: TrainedSettings, on: Subject, layers: Sequence[Layer]) -> None:
        super().check(settings, on, layers)
        widths = settings.method.options.widths
        if bad := [w for w in widths if not 2 <= w <= 8]:
            raise BadInput(
                f"method.widths: {bad[0]} is not a width that can be stored; give numbers of bits from 2 to 8"
            )
        if len(set(widths)) < len(widths):
            raise BadInput(f"method.widths: {widths} names a width twice; give each once")

    @classmethod
    def begin(cls, weight: Tensor, group: int, settings: TrainedSettings) -> DoubleRounding:
        highest = named("int", max(settings.method.options.widths)).element.highest
        return cls(
            (in_groups(weight, group).abs().amax(-1).clamp_min(1e-8) / highest).log(),
            widths=settings.method.options.widths,
            group=group,
        )

    @classmethod
    def survey(
        cls, on: Subject, layers: Sequence[Layer], settings: TrainedSettings
    ) -> dict[str, dict[str, float]]:
        """Each layer's Hessian trace and its place between the least and the largest, on a logarithmic axis;
        nothing where widths take turns.
        """
        from workbench.quantization.allocation.layer_sensitivity import traces

        if settings.method.options.switching == "in turn":
            return {}
        found = traces(on, layers, PROBES, EXAMPLES, torch.Generator().manual_seed(settings.seed), "train")
        logs = {name: math.log(max(trace, 1e-12)) for name, (trace, _) in found.items()}
        low, high = min(logs.values()), max(logs.values())
        return {
            name: {"trace": found[name][0], "place": (log - low) / (high - low) if high > low else 0.5}
            for name, log in logs.items()
        }

    def prepare(self, course: Course) -> None:
        if self.surveyed:
            chances = chances_of(self.surveyed["place"], len(self.widths))
            self.drawn = self.widths[int(torch.multinomial(chances, 1, generator=course.generator))]
        else:
            self.drawn = self.widths[len(self.draws) % len(self.widths)]
        self.draws.append(self.drawn)

    def change(self, weight: Tensor) -> Tensor:
        width = self.drawn if self.training else self.widths[0]
        element, shift = named(f"int{width}-odd").element, 2.0 ** (self.widths[0] - width)
        factor = (self.group * max(element.highest, 1.0)) ** -0.5 / shift
        grid = self.grid()
        step = spread(
            grid.scale * shift * (1 + factor * (self.log_step - self.log_step.detach())),
            self.group,
            weight.shape[-1],
        )
        units = (weight / step).clamp(element.lowest, element.highest)
        whole = grid.format.element.round(weight.detach() / step.detach() * shift)
        return (units + (element.round(whole / shift) - units).detach()) * step

    def grid(self) -> Grid:
        format = named(f"int{self.widths[0]}-odd")
        return Grid(format, stored(self.log_step.detach().exp(), format), None, self.group)

    def final(self, weight: Tensor) -> tuple[Tensor, Grid]:
        grid = self.grid()
        return grid.round(weight), grid

    @classmethod
    def tables(
        cls,
        roundings: Sequence[TrainedRounding],
        layers: Sequence[Layer],
        on: Subject,
        settings: TrainedSettings,
        progress: Progress,
    ) -> dict[str, pd.DataFrame]:
        """ "readings": test metrics at each width of the one stored tensor, and the bytes of that width
        alone; "switching": each layer's trace beside the mean of the widths it drew."""
        rows = []
        for width in progress.track(sorted(settings.method.options.widths, reverse=True), "reading widths"):
            read = at_width(on, width, layers=settings.layers)
            size = sum(quantizer_of(layer).grid.bytes(layer.shape) for layer in read.layers(settings.layers))
            rows.append(
                {"bits": width, "bytes": math.ceil(size)}
                | read.evaluate("test", limit=settings.test_examples)
            )
        found = {"readings": pd.DataFrame(rows)}
        switched = [
            {
                "layer": layer.name,
                "trace": r.surveyed["trace"],
                "mean_width": sum(r.draws) / max(len(r.draws), 1),
            }
            for layer, r in zip(layers, roundings, strict=True)
            if isinstance(r, DoubleRounding) and r.surveyed
        ]
        return found | ({"switching": pd.DataFrame(switched)} if switched else {})

    def config(self) -> dict[str, Any]:
        return {"widths": self.widths, "group": self.group}


def chances_of(place: float, count: int) -> Tensor:
    """Probabilities of `count` widths, widest first, of a layer whose trace lies at `place` in [0, 1]: linear
    in the width's rank, rising with the width at 1, falling at 0, equal at 1/2.
    How the paper weighs them could not be read; this is the simplest such rule.
    """
    up = torch.arange(count, 0, -1, dtype=torch.float64)
    return (place * up + (1 - place) * up.flip(0)) / up.sum()


@torch.no_grad()
def at_width(
    on: Subject, widths: int | Mapping[str, int], truncate: bool = False, layers: str = "blocks"
) -> Subject:
    """The subject with its stored integers read at fewer bits: one width, or one for each layer by name.

    W_l = clip(round(W_h / 2^(h-l))), or with `truncate` clip(floor(W_h / 2^(h-l))), the leading bits alone.
    Layers that have fewer bits already, or are not named, stay. `BadInput` for a layer on a format other than
    symmetric integers with real scales, or in a transform's coordinates.
    """
    found = on.copy()
    for layer in found.layers(layers):
        grid = quantizer_of(layer).grid
        if not grid.format.name.startswith("int") or type(grid) is not Grid or grid.transform is not None:
            raise BadInput(
                f"layers: {layer.name} is on {grid.format.name}; "
                "widths are read from symmetric integers alone"
            )
        stored_bits = grid.format.element.bits
        width = widths if isinstance(widths, int) else widths.get(layer.name, stored_bits)
        if not 2 <= width <= 8:
            raise BadInput(f"widths: {width} bits of {layer.name} cannot be read; choose 2 to 8")
        if width < stored_bits:
            narrow = narrowed(grid, width)
            values = layer.weight.detach().float()
            if truncate:
                step, _ = narrow.columns(values.shape[-1])
                values = (
                    torch.floor(values / step + 2.0**-8) * step
                )  # a stored integer is at most 63/64 short of the next
            layer.attach(FakeQuant.of(narrow))
            layer.write(narrow.round(values).to(layer.original.dtype))
    return found


def narrowed(grid: Grid, width: int) -> Grid:
    """The grid of the leading `width` bits."""
    return replace(
        grid, format=named(f"int{width}-odd"), scale=grid.scale * 2.0 ** (grid.format.element.bits - width)
    )
