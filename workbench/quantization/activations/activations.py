"""Activations: ranges seen in calibration, and changes that keep what a layer reads
(or the keys and values it writes) on a grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.axis import Axis, Choice, Options, parameter
from workbench.progress import Progress
from workbench.quantization.number.formats import Format, named
from workbench.quantization.number.grid import spanning
from workbench.quantization.number.number_format import NUMBER_FORMAT
from workbench.quantization.transform.coordinates import Transform
from workbench.statistics import InputCapture
from workbench.statistics.inputs import Handler, kept_positions
from workbench.subjects import Layer, Subject
from workbench.subjects.changes import Change

#: `entry(low, high, wide, options)` gives the range (low, high) kept with a layer, of calibration's extremes
#: (in,) of each input feature (None where the entry does not ask for "ranges") and of the features that are
#: rounded apart, (in,) or None.
ACTIVATION_QUANTIZER = Axis(
    "activation-quantizer",
    "round layer inputs, a scale per token (dynamic), tensor or channel",
    found_in="workbench.quantization.activations",
    home="quantize.activations",
)
Range = tuple[Tensor | None, Tensor | None]


@dataclass
class InputRanges:
    """Extremes and power sums of a layer's inputs over the calibration tokens, per input feature;
    shapes (experts, in).
    """

    low: Tensor
    high: Tensor
    second: Tensor
    fourth: Tensor
    tokens: Tensor

    @property
    def largest(self) -> Tensor:
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def kurtosis(self) -> Tensor:
        """(experts,) E x^4 / (E x^2)^2 over all entries: 3 for a Gaussian, larger with outliers."""
        count = (self.tokens * self.second.shape[-1]).clamp_min(1)
        return (self.fourth.sum(-1) / count) / (self.second.sum(-1) / count).square().clamp_min(1e-30)

    def outliers(self, factor: float = 6.0) -> Tensor:
        """(experts,) number of features whose largest magnitude exceeds `factor` times the median
        feature's.
        """
        return (self.largest > factor * self.largest.median(-1, keepdim=True).values).sum(-1)


@torch.no_grad()
def input_ranges(
    subject: Subject,
    layers: Sequence[Layer],
    split: str = "calibration",
    examples: int = 128,
    batch_size: int = 16,
    progress: Progress | None = None,
    transforms: Mapping[str, Transform | None] | None = None,
    also: Handler | None = None,
) -> dict[str, InputRanges]:
    """name -> ranges of the layer's inputs, in one streaming pass; padding positions are left out.
    With `transforms`, of T^-1 x. `also` sees the same inputs (tokens, in), in float32.
    """
    progress = progress or Progress()
    found = {}
    for layer in layers:
        experts = layer.shape[0] if len(layer.shape) == 3 else 1
        low, high, second, fourth = (
            torch.zeros(experts, layer.shape[-1], device=layer.original.device) for _ in range(4)
        )
        found[layer.name] = InputRanges(
            low, high, second, fourth, torch.zeros(experts, device=layer.original.device)
        )

    def add(layer: Layer, expert: int, rows: Tensor) -> None:
        if not len(rows):
            return
        mine, rows = found[layer.name], rows.float()
        if also is not None:
            also(layer, expert, rows)
        transform = None if transforms is None else transforms.get(layer.name)
        if transform is not None:
            rows = transform.inputs(rows)
        mine.low[expert] = torch.minimum(mine.low[expert], rows.amin(0))
        mine.high[expert] = torch.maximum(mine.high[expert], rows.amax(0))
        square = rows.square()
        mine.second[expert] += square.sum(0)
        mine.fourth[expert] += square.square().sum(0)
        mine.tokens[expert] += len(rows)

    count = -(-min(examples, subject.size(split)) // batch_size)
    with InputCapture(layers, add) as capture:
        for batch in progress.track(subject.batches(split, batch_size, examples), "activation ranges", count):
            capture.keep = kept_positions(subject, batch)
            subject.task.output(subject.model, batch)
    return found


class ActivationQuant(Change):
    """Rounds the inputs of a linear layer; its weight is left alone.

    granularity "token": a scale for every token, found as it comes (dynamic); "tensor" and "channel": from
    the stored `low` and `high`, one number or one a feature (static). Features marked in `wide` (in,) are
    rounded apart from the others, to `wide_format` (with "tensor", each part has its own range).
    Gradients pass straight through inside the range.
    """

    order = 80
    low: Tensor | None
    high: Tensor | None
    smooth: Tensor | None
    signs: Tensor | None
    left: Tensor | None
    right: Tensor | None
    wide: Tensor | None
    place = "input"

    def __init__(
        self,
        low: Tensor | None = None,
        high: Tensor | None = None,
        smooth: Tensor | None = None,
        signs: Tensor | None = None,
        left: Tensor | None = None,
        right: Tensor | None = None,
        wide: Tensor | None = None,
        *,
        format: str,
        granularity: str = "token",
        block: int = 0,
        group: int = 0,
        orthogonal: bool = False,
        wide_format: str = "uint8",
    ) -> None:
        super().__init__()
        for name, tensor in (
            ("low", low),
            ("high", high),
            ("smooth", smooth),
            ("signs", signs),
            ("left", left),
            ("right", right),
            ("wide", wide),
        ):
            self.register_buffer(name, tensor)
        self.format, self.granularity, self.block, self.group, self.orthogonal = (
            format,
            granularity,
            block,
            group,
            orthogonal,
        )
        self.wide_format = wide_format

    @property
    def transform(self) -> Transform:
        return Transform.of(dict(self.named_buffers()), self.block, self.orthogonal) or Transform()

    def change(self, weight: Tensor) -> Tensor:
        return weight

    def config(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "granularity": self.granularity,
            "block": self.block,
            "group": self.group,
            "orthogonal": self.orthogonal,
            "wide_format": self.wide_format,
        }

    def attached(self, module: nn.Module) -> None:
        hooks = module._forward_pre_hooks if self.place == "input" else module._forward_hooks
        for key, hook in list(hooks.items()):
            if type(getattr(hook, "__self__", None)) is type(self):
                del hooks[key]
        if self.place == "input":
            module.register_forward_pre_hook(self.before)
        else:
            module.register_forward_hook(self.after)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.round(args[0]), *args[1:])

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.round(output)

    def round(self, x: Tensor) -> Tensor:
        """Activations (..., features) rounded, same dtype."""
        work = self.transform.inputs(x.float())
        if self.group:
            work = work.unflatten(-1, (-1, self.group))
        if self.wide is None:
            rounded = rounded_inputs(work, named(self.format), self.low, self.high)
        else:
            rounded = torch.empty_like(work)
            for part, name in ((~self.wide, self.format), (self.wide, self.wide_format)):
                low, high = (None if t is None else t[part] for t in (self.low, self.high))
                rounded[..., part] = rounded_inputs(work[..., part], named(name), low, high)
        return self.transform.inputs_back(rounded.flatten(-2) if self.group else rounded).to(x.dtype)


def rounded_inputs(work: Tensor, format: Format, low: Tensor | None, high: Tensor | None) -> Tensor:
    """Inputs (..., features) on the grid that spans [low, high], or each token's own range;
    straight-through gradients.
    """
    if low is None or high is None:
        low, high = work.detach().amin(-1, keepdim=True), work.detach().amax(-1, keepdim=True)
    grid = spanning(low, high, format, work.shape[-1])
    shift = 0.0 if grid.zero is None else grid.zero
    element = grid.format.element
    units = (work / grid.scale + shift).clamp(element.lowest, element.highest)
    units = units + (element.round(units.detach().clone()) - units).detach()
    return (units - shift) * grid.scale


def signs(x: Tensor) -> Tensor:
    """1 where x >= 0, else -1: one of two codes for every number, zeros included."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


class SignInputs(ActivationQuant):
    """Inputs as signs, +1 or -1, with the gradient of clip(x, -1, 1) (Qin et al. 2022, BiBERT)."""

    def __init__(self) -> None:
        super().__init__(format="binary")

    def round(self, x: Tensor) -> Tensor:
        clipped = x.clamp(-1, 1)
        return clipped + (signs(x) - clipped).detach()

    def config(self) -> dict[str, Any]:
        return {}


class KeyValueQuant(ActivationQuant):
    """Rounds what a key or value projection writes, as a quantized key-value cache would keep it:
    per token, in groups of one head.
    """

    place = "output"


class Rounded(Options):
    format: Choice = NUMBER_FORMAT.choice("uint8")
    wide_share: float = parameter(
        0.0,
        "share of each layer's input features, those with the most energy, rounded apart and to 8 bits",
        ge=0,
        le=0.5,
        step=0.0625,
    )


@ACTIVATION_QUANTIZER.add("none", formula="x", source="inputs in full precision")
def left_alone(low: None, high: None, wide: None, options: Options) -> Range:
    """Inputs as they are."""
    return None, None


@ACTIVATION_QUANTIZER.add(
    "token",
    formula="s = (max x - min x) / (2^b - 1) of every token",
    source="Yao et al. 2022, ZeroQuant, section 4.1",
    options=Rounded,
)
def token(low: None, high: None, wide: Tensor | None, options: Rounded) -> Range:
    """A token's own range, found as it comes."""
    return None, None


@ACTIVATION_QUANTIZER.add(
    "channel",
    formula="s_j = (max x_j - min x_j) / (2^b - 1) over calibration",
    source="Jacob et al. 2018",
    needs="inputs",
    options=Rounded,
    traits="ranges",
)
def channel(low: Tensor, high: Tensor, wide: Tensor | None, options: Rounded) -> Range:
    return low, high


@ACTIVATION_QUANTIZER.add(
    "tensor",
    formula="s = (max x - min x) / (2^b - 1) over calibration",
    source="Jacob et al. 2018",
    needs="inputs",
    options=Rounded,
    traits="ranges",
)
def tensor(low: Tensor, high: Tensor, wide: Tensor | None, options: Rounded) -> Range:
    """One range, or one each for the wide features and the others."""
    if wide is None:
        return low.min(), high.max()
    low, high = low.clone(), high.clone()
    for part in (~wide, wide):
        low[part], high[part] = low[part].min(), high[part].max()
    return low, high


def activation_format(name: str, bits: int) -> Format:
    """The format of activations: affine integers (post-GELU inputs are one-sided), or a minifloat by name."""
    return named("int", bits, symmetric=False) if name == "int" else named(name)


#: Last part of the names of key and value projections in the transformers library
KEY_VALUE = ("k_proj", "v_proj", "key", "value", "k", "v", "k_lin", "v_lin")


def key_value_layers(layers: Sequence[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.name.rsplit(".", 1)[-1] in KEY_VALUE]


def head_size(subject: Subject) -> int:
    """Features of one head, from the model's configuration."""
    config: Any = subject.model.config
    known = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return int(known or config.hidden_size // config.num_attention_heads)


def quantize_activations(
    layer: Layer,
    ranges: InputRanges | None,
    format: str,
    granularity: str,
    transform: Transform | None = None,
    wide: Tensor | None = None,
) -> None:
    """Attach an `ActivationQuant` to a linear layer; static granularities take their range from `ranges`,
    in transformed coordinates.
    """
    chosen = ACTIVATION_QUANTIZER.chosen(granularity)
    seen: Range = (None, None)
    if chosen.has("ranges"):
        assert ranges is not None
        seen = ranges.low[0], ranges.high[0]
    low, high = chosen(*seen, wide)
    transform = transform or Transform()
    layer.attach(
        ActivationQuant(
            low,
            high,
            **transform.tensors,
            wide=wide,
            format=format,
            granularity=str(granularity),
            block=transform.block,
            orthogonal=transform.orthogonal,
        )
    )


def widest(gram: Tensor, share: float) -> Tensor:
    """(in,) True for the `share` of features with the most energy in a second moment:
    those a mixed-precision rounding keeps wide.
    """
    energy = gram.diagonal()
    found = torch.zeros_like(energy, dtype=torch.bool)
    found[energy.argsort(descending=True, stable=True)[: max(1, round(share * len(energy)))]] = True
    return found
