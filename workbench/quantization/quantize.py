"""Quantize: put layers on a number format, and see what that costs beside what curvature predicted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pandas as pd
import torch
from pydantic import BaseModel, Field, create_model
from torch import Tensor

from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.quantization.activations.activations import (
    KEY_VALUE,
    InputRanges,
    KeyValueQuant,
    activation_format,
    head_size,
    input_ranges,
    key_value_layers,
    quantize_activations,
    widest,
)
from workbench.quantization.activations.sequential import (
    block_calls,
    grouped,
    paired_moments,
    target,
)
from workbench.quantization.number.fake_quant import FakeQuant
from workbench.quantization.number.formats import Format, named
from workbench.quantization.number.grid import Grid, group_of
from workbench.quantization.number.split_grid import ROUNDINGS as SPLIT_ROUNDINGS
from workbench.quantization.number.split_grid import Salient
from workbench.quantization.rounding.adapters import Adapter, Term, with_term
from workbench.quantization.rounding.blockwise import reconstruct, windows
from workbench.quantization.rounding.learned import LEARNED, LearnedRounding
from workbench.quantization.rounding.problem import ROUNDINGS, Factors, Problem
from workbench.quantization.transform.coordinates import Transform
from workbench.quantization.transform.flatquant import input_rows
from workbench.quantization.transform.transforms import in_coordinates
from workbench.results import Result
from workbench.statistics import InputMoments, second_moments
from workbench.subjects import Layer, Subject
from workbench.subjects.changes import Mask

if TYPE_CHECKING:
    from workbench.subjects import Layer

if TYPE_CHECKING:
    import plotly.graph_objects as go


def choices(name: str, **fields: tuple[str, ...]) -> type[BaseModel]:
    """A pydantic model with one choice a field, the first being the default:
    the view settings of a result.
    """
    return create_model(name, **{k: (Literal[v], Field(v[0], description=k)) for k, v in fields.items()})  # type: ignore[call-overload]


def short_names(fig: go.Figure, names: Sequence[str]) -> None:
    """Layers along the x axis in this order, their labels without the parts of the name that all of them
    begin with.
    """
    parts = [name.split(".") for name in names]
    same = 0
    while parts and all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    fig.update_xaxes(
        type="category",
        categoryorder="array",
        categoryarray=list(names),
        tickvals=list(names),
        ticktext=[".".join(p[same:]) for p in parts],
    )


@dataclass(frozen=True)
class Inputs:
    """What some transforms ask about a layer's inputs besides the second moment:
    ranges, and sampled rows, by layer.
    """

    ranges: dict[str, InputRanges]
    rows: dict[str, Tensor]


class QuantizeResult(Result):
    """Per-layer errors as bars; the quantized model is `.subject`."""

    def figure(
        self, column: str = "output_error", sort: str = "model order", only: str = "", **view: Any
    ) -> go.Figure:
        """Bars by layer. sort : "model order" or "largest first";
        only : layers whose name holds this text.
        """
        from workbench.figures import color, figure

        table = self.table if sort == "model order" else self.table.sort_values(column, ascending=False)
        table = table[table["layer"].str.contains(only, case=False, regex=False)]
        if column == "predicted_change":
            title, unit = "Predicted loss change of each layer alone", "nats"
        else:
            words = {"sqnr": "Signal to quantization noise", "bits": "Bits a weight"}.get(
                column, column.replace("_", " ").capitalize()
            )
            title = f"{words} of each layer"
            unit = {"sqnr": "dB", "bits": "bits"}.get(column, "share of energy")
        title += "" if len(table) else f": no layer's name holds {only!r}"
        fig = figure(title, "layer", unit, yaxis_type="log" if column.endswith("error") else "linear")
        fig.add_bar(
            x=table["layer"].to_numpy(),
            y=table[column].to_numpy(),
            name=column.replace("_", " "),
            marker_color=color(0),
        )
        short_names(fig, [str(name) for name in table["layer"]])
        return fig

    def view_model(self) -> type[BaseModel] | None:
        columns = tuple(
            c for c in ("output_error", "weight_error", "sqnr", "bits", "predicted_change") if c in self.table
        )
        only = (str, Field("", description="layers whose name holds this text"))
        return create_model(
            "QuantizeView",
            __base__=choices("QuantizeView", column=columns, sort=("model order", "largest first")),
            only=only,
        )


class Quantize(SubjectInstrument):
    """Put layers on a number format (integer, minifloat, codebook, block format)
    with a rounding of your choice; returns the quantized subject.
    """

    changes_model: ClassVar[bool] = True
    summary_line: ClassVar[str] = "number format x granularity x rounding, with predicted and measured loss"

    layers: str = parameter(
        "blocks",
        "layers to quantize, comma-separated globs; 'blocks' is every layer inside the repeated blocks",
    )
    format: str = parameter(
        "int",
        "number format: int, e4m3fn, e5m2, e2m1, ExMy, bf16, nf4, mxfp4, nvfp4, ternary, binary, fixedW.F, "
        "quantileB, ...",
    )
    bits: int = parameter(4, "width of the integer format", ge=2, le=8, unit="bits")
    symmetric: bool = parameter(True, "integers symmetric about zero; otherwise with a zero point")
    granularity: Literal["auto", "tensor", "channel", "group"] = parameter(
        "auto", "what shares a scale; auto: the format's own block, or groups"
    )
    group_size: int = parameter(
        64, "weights of a group (in one row)", ge=1, le=4096, scale="log", unit="weights"
    )
    range: Literal["auto", "minmax", "mse", "mean", "centred"] = parameter(
        "auto",
        "how scales are found: largest magnitude, least squared error, mean magnitude, "
        "or (binary) with the mean as zero point",
    )
    rounding: Literal[
        "nearest",
        "stochastic",
        "gptq",
        "adaround",
        "lowrank-adaround",
        "flexround",
        "signround",
        "adaquant",
        "scales",
        "hqq",
    ] = parameter("nearest", "how weights are put on the grid")
    transform: Literal["none", "smooth", "awq", "teq", "hadamard", "resq", "flatquant"] = parameter(
        "none", "equivalent transform in whose coordinates rounding happens (online)"
    )
    alpha: float = parameter(
        0.5, "SmoothQuant: how far outliers move from activations to weights", ge=0, le=1, step=0.05
    )
    activations: Literal["none", "token", "tensor", "channel"] = parameter(
        "none", "round layer inputs, a scale per token (dynamic), tensor or channel"
    )
    activation_format: str = parameter(
        "int", "number format of activations; int is affine with activation_bits"
    )
    activation_bits: int = parameter(8, "width of integer activations", ge=2, le=8, unit="bits")
    wide_share: float = parameter(
        0.0,
        "share of each layer's input features, those with the most energy, rounded apart and to 8 bits",
        ge=0,
        le=0.5,
        step=0.0625,
    )
    kv_bits: int = parameter(
        0, "width of keys and values as a cache would keep them (0: left alone)", ge=0, le=8, unit="bits"
    )
    layer_bits: dict[str, int] = parameter(
        {}, "width by layer glob, where it differs from bits (integers only)"
    )
    salient_share: float = parameter(
        0.0,
        "share of each row's weights, those that matter most to its output, on a wider grid (0: none)",
        ge=0,
        le=0.5,
        step=0.05,
    )
    salient_bits: int = parameter(4, "width of the salient weights", ge=2, le=8, unit="bits")
    salient_pattern: Literal["columns", "weights"] = parameter(
        "columns", "salient input features, or single weights, whose places cost bits"
    )
    damp: float = parameter(
        0.01, "damping of the inputs' second moment, as a share of its mean diagonal", gt=0, le=1, scale="log"
    )
    act_order: bool = parameter(False, "GPTQ: round the columns with the largest inputs first")
    steps: int = parameter(300, "iterations of learned roundings", ge=1, le=10000, scale="log")
    objective: Literal["layer", "block"] = parameter(
        "layer", "what learned roundings reconstruct: each layer's output or the block's"
    )
    window: int = parameter(
        1,
        "consecutive blocks learned together (objective block; 2 and more add CBQ's divergence)",
        ge=1,
        le=16,
        unit="blocks",
    )
    overlap: int = parameter(1, "blocks a window shares with the one before", ge=0, le=15, unit="blocks")
    adapter_rank: int = parameter(
        0, "rank of a low-rank term kept beside each rounded weight (0: none)", ge=0, le=1024
    )
    adapter_steps: int = parameter(
        5,
        "alternations of rounding and best low-rank fit (LoftQ); 0 starts the term at zero (QLoRA)",
        ge=0,
        le=100,
    )
    sequential: bool = parameter(
        False, "block by block: calibrate on the inputs that the already quantized blocks produce"
    )
    examples: int = parameter(
        128, "calibration examples for the inputs' second moments", ge=1, unit="examples"
    )
    predict_examples: int = parameter(
        32, "calibration examples of predicted and measured loss change (0: none)", ge=0, unit="examples"
    )
    test_examples: int = parameter(1024, "test examples at most (0: no test)", ge=0, unit="examples")

    @classmethod
    def result_class(cls) -> type[Result]:
        return QuantizeResult

    def check(self, on: Subject) -> None:
        layers = on.layers(self.layers)
        format = self.format_for(layers[0].name)
        if format.affine and self.format != "int" and not self.symmetric:
            raise BadInput(
                "symmetric: uint formats always have a zero point; use format int with symmetric false"
            )
        if self.rounding in ("adaround", "lowrank-adaround") and not format.uniform:
            raise BadInput(
                f"rounding: {self.rounding} chooses floor or ceiling of integers, {format.name} has no "
                "equal steps; use format int, or another rounding"
            )
        if self.rounding == "hqq" and not format.affine:
            raise BadInput(
                f"rounding: hqq moves zero points and {format.name} has none; "
                "use format int with symmetric false"
            )
        check_salient(self, layers, format)
        if self.rounding in ("flexround", "signround", "adaquant", "scales") and format.scale != "real":
            raise BadInput(
                f"rounding: {self.rounding} learns real scales and {format.name} has none; "
                "use an int, ExMy or codebook format"
            )
        if self.rounding == "scales" and self.transform != "none":
            raise BadInput(
                "rounding: scales learns column factors, a transform of its own; use transform none"
            )
        if self.objective == "block" and self.transform != "none":
            raise BadInput(
                "objective: 'block' learns in the model's own coordinates; "
                "use transform none, or objective layer"
            )
        if self.transform in ("hadamard", "resq", "flatquant") and (
            masked := [layer.name for layer in layers if mask_of(layer) is not None]
        ):
            raise BadInput(
                f"transform: {self.transform} mixes inputs, so the zeros of pruned layers ({masked[0]}, "
                "...) would be lost; use smooth, awq or teq"
            )
        if self.activations != "none":
            activation_format(self.activation_format, self.activation_bits)
            if fused := [layer.name for layer in layers if len(layer.shape) == 3]:
                raise BadInput(
                    f"activations: {fused[0]} reads its inputs inside a fused expert kernel; "
                    "choose layers without experts, or activations none"
                )
        if self.wide_share and self.activations == "none":
            raise BadInput(
                f"wide_share: {self.wide_share:g} of the activations are to stay wide, "
                "but activations is none; choose token, tensor or channel"
            )
        if self.kv_bits == 1:
            raise BadInput("kv_bits: 1 bit is not accepted; it should be 0 (left alone) or 2 to 8")
        if self.kv_bits and not key_value_layers(layers):
            raise BadInput(
                f"kv_bits: no layer of {self.layers!r} is a key or value projection (names ending in "
                f"{', '.join(KEY_VALUE)})"
            )
        if self.objective == "block" and self.rounding not in LEARNED:
            raise BadInput(
                f"objective: 'block' is for learned roundings ({', '.join(LEARNED)}), not {self.rounding}; "
                "use layer"
            )
        if self.adapter_rank and self.objective == "block":
            raise BadInput("adapter_rank: a low-rank term is fitted layer by layer; use objective layer")
        if self.window > 1 and (self.objective != "block" or self.overlap >= self.window):
            raise BadInput(
                f"window: {self.window} blocks with overlap {self.overlap} need objective block and an "
                "overlap smaller than the window"
            )
        if self.range == "mean" and format.affine:
            raise BadInput("range: 'mean' needs a format symmetric about zero; use minmax or mse")
        if self.range == "centred" and format.name != "binary":
            raise BadInput(
                "range: 'centred' makes a row's mean the zero point of binary weights, "
                f"not of {format.name}; use minmax or mse"
            )
        group_of(format, self.granularity, self.group_size, layers[0].shape[-1])
        for glob, bits in self.layer_bits.items():
            if self.format != "int" or not 2 <= bits <= 8:
                raise BadInput(f"layer_bits: {glob!r} asks for {bits} bits; it takes 2 to 8 and format int")
            on.layers(glob)
        on.split("calibration")
        if self.test_examples:
            on.split("test")

    def format_for(self, layer: str) -> Format:
        """The format of a layer, after `layer_bits` (the last glob that matches wins)."""
        from fnmatch import fnmatchcase

        bits = self.bits
        for glob, width in self.layer_bits.items():
            if fnmatchcase(layer, glob):
                bits = width
        return named(self.format, bits, self.symmetric)

    @property
    def rounds_rows(self) -> bool:
        """True when a transform is learned on rounded inputs, so that some of them must be kept."""
        return self.transform == "flatquant" and self.activations != "none"

    def _run(self, on: Subject, progress: Progress) -> Result:
        layers = on.layers(self.layers)
        before = self._losses(on, progress)
        moments = moments_for(on, layers, self.examples, progress)
        ranges = ranges_for(on, layers, self.examples, progress) if self.transform == "smooth" else {}
        tokens = (
            input_rows(on, layers, self.examples, torch.Generator().manual_seed(self.seed))
            if self.rounds_rows
            else {}
        )
        dense = on.copy() if self.sequential else on
        rows, deltas, grids, terms = [], {}, {}, {}
        for layer, values, grid, term in self._rounded(
            on, dense, layers, moments, Inputs(ranges, tokens), progress
        ):
            weight = layer.weight.detach()
            delta = effective(values, term) - weight.float()
            deltas[layer.name], grids[layer.name], terms[layer.name] = delta.to(weight.dtype), grid, term
            rows.append(layer_row(layer, weight.float(), delta, grid, moments[layer.name], term))
            if self.sequential:
                put(layer, values, grid, term)
        table = pd.DataFrame(rows)
        facts: dict[str, Any] = {}
        if self.predict_examples and rows:
            facts |= self._predict(dense, table, deltas, progress)
        if not self.sequential:
            for layer in layers[: len(rows)]:
                term = terms[layer.name]
                whole = layer.weight.detach() + deltas[layer.name]
                put(
                    layer,
                    whole if term is None else whole - (term[0] @ term[1]).to(whole.dtype),
                    grids[layer.name],
                    term,
                )
        self._round_activations(on, layers[: len(rows)], grids, moments, progress)
        after = self._losses(on, progress)
        facts = summary_facts(table, before, after) | facts
        if self.predict_examples:
            facts["measured_change"] = after["calibration"]["loss"] - before["calibration"]["loss"]
        return self.result(table, facts, subject=on)

    def _rounded(
        self,
        on: Subject,
        dense: Subject,
        layers: Sequence[Layer],
        moments: dict[str, InputMoments],
        seen: Inputs,
        progress: Progress,
    ) -> Iterator[tuple[Layer, Tensor, Grid, Term | None]]:
        """Each layer with its values and grid. With `sequential` a block's statistics are taken once those
        before it are in place.
        """
        generator = torch.Generator().manual_seed(self.seed)
        factors = Factors()
        if self.objective == "layer" and not self.sequential:
            for layer in progress.track(layers, "rounding"):
                yield layer, *self.round_layer(layer, moments[layer.name], generator, factors, None, seen)
            return
        groups = grouped(on, layers)
        if self.objective == "block":
            for _, stack in itertools.groupby(
                [g for g in groups if g[0]], key=lambda g: g[0].rsplit(".", 1)[0]
            ):  # an encoder's, then a decoder's
                yield from self._windows(on, dense, list(stack), moments, generator, factors, progress)
            groups = [g for g in groups if not g[0]]  # what lies outside the blocks is rounded layer by layer
        for block, mine in groups:
            if progress.stopped:
                return
            inputs, cross = moments, dict[str, Tensor]()
            if self.sequential:
                inputs, cross = paired_moments(dense, on, block, mine, self.examples, progress=progress)
            for layer in progress.track(mine, "rounding"):
                yield (
                    layer,
                    *self.round_layer(
                        layer, inputs[layer.name], generator, factors, cross.get(layer.name), seen
                    ),
                )

    def _windows(
        self,
        on: Subject,
        dense: Subject,
        groups: Sequence[tuple[str, list[Layer]]],
        moments: dict[str, InputMoments],
        generator: torch.Generator,
        factors: Factors,
        progress: Progress,
    ) -> Iterator[tuple[Layer, Tensor, Grid, Term | None]]:
        """Blocks learned in windows; a block's rounding is final once the window has left it,
        and those after it go on from where they are.
        """
        kind, modules, done = LEARNED[self.rounding], dict[str, list[LearnedRounding]](), 0
        spans = windows(len(groups), self.window, self.overlap)
        for span, following in zip(spans, [*spans[1:], range(len(groups), len(groups))], strict=True):
            if progress.stopped:
                return
            inside = [groups[i] for i in span]
            for block, mine in inside:
                if mine[0].name in modules:
                    continue
                inputs, cross = moments, dict[str, Tensor]()
                if self.sequential:
                    inputs, cross = paired_moments(dense, on, block, mine, self.examples, progress=progress)
                for layer in mine:
                    problems = self.problems(
                        layer, inputs[layer.name], generator, factors, cross.get(layer.name)
                    )
                    modules[layer.name] = [kind(p) for p in problems]
            blocks, layers = [block for block, _ in inside], [layer for _, mine in inside for layer in mine]
            calls = [block_calls(on, block, self.examples) for block in blocks]
            last = block_calls(dense, blocks[-1], self.examples) if self.sequential else calls[-1]
            targets = [[c.output for c in last]]
            if kind.angular and self.sequential:
                targets.append([c.output for c in calls[-1]])
            reconstruct(
                on.model,
                blocks,
                layers,
                modules,
                list(zip(*calls, strict=True)),
                targets,
                self.steps,
                generator,
                progress,
                divergence=self.window > 1,
                angular=kind.angular,
            )
            for _, mine in groups[done : following.start]:
                for layer in mine:
                    yield layer, *stacked([m.hard() for m in modules.pop(layer.name)]), None
            done = following.start

    def problems(
        self,
        layer: Layer,
        moments: InputMoments,
        generator: torch.Generator,
        factors: Factors,
        cross: Tensor | None = None,
        seen: Inputs | None = None,
    ) -> list[Problem]:
        """What to round: one matrix, or each of a stack of experts with its own inputs."""
        weight, mask, format = layer.weight.detach().float(), mask_of(layer), self.format_for(layer.name)
        assert moments.gram is not None
        if cross is not None:
            weight = target(weight, moments.gram[0], cross, self.damp)
        pairs = (
            [(weight, mask)]
            if weight.ndim == 2
            else [(weight[i], None if mask is None else mask[i]) for i in range(len(weight))]
        )
        ranges, rows = (
            (None, None) if seen is None else (seen.ranges.get(layer.name), seen.rows.get(layer.name))
        )
        salient = (
            Salient(self.salient_share, self.salient_bits, self.salient_pattern)
            if self.salient_share
            else None
        )
        largest = [None] * len(pairs) if ranges is None else list(ranges.largest)
        activation = None if rows is None else activation_format(self.activation_format, self.activation_bits)
        return [
            Problem(
                matrix if kept is None else matrix * kept,
                gram,
                format,
                self.granularity,
                self.group_size,
                self.range,
                kept,
                self.damp,
                self.act_order,
                self.steps,
                generator,
                factors,
                most,
                rows,
                activation,
                salient,
            )
            for (matrix, kept), gram, most in zip(pairs, moments.gram, largest, strict=True)
        ]

    def round_layer(
        self,
        layer: Layer,
        moments: InputMoments,
        generator: torch.Generator,
        factors: Factors,
        cross: Tensor | None = None,
        seen: Inputs | None = None,
    ) -> tuple[Tensor, Grid, Term | None]:
        """Values (..., out, in), float32, in the model's coordinates, their grid,
        and the low-rank term beside them, if any.
        """
        problems = self.problems(layer, moments, generator, factors, cross, seen)
        if not self.adapter_rank:
            return *stacked([self.round(problem) for problem in problems]), None
        parts = [
            with_term(problem, self.round, self.adapter_rank, self.adapter_steps) for problem in problems
        ]
        ups, downs = zip(*(term for _, _, term in parts), strict=True)
        term = (ups[0], downs[0]) if len(parts) == 1 else (torch.stack(ups), torch.stack(downs))
        return *stacked([(values, grid) for values, grid, _ in parts]), term

    def round(self, problem: Problem) -> tuple[Tensor, Grid]:
        """One matrix: its values in the model's coordinates, and the grid they are on in the transform's."""
        moved, transform = in_coordinates(problem, self.transform, self.alpha)
        values, grid = ROUNDINGS[self.rounding](moved)
        return (
            (values, grid)
            if transform is None
            else (transform.weight_back(values), replace(grid, transform=transform))
        )

    def _round_activations(
        self,
        on: Subject,
        layers: Sequence[Layer],
        grids: dict[str, Grid],
        moments: dict[str, InputMoments],
        progress: Progress,
    ) -> None:
        if self.kv_bits:
            size = head_size(on)
            for layer in key_value_layers(layers):
                layer.attach(KeyValueQuant(format=activation_format("int", self.kv_bits).name, group=size))
        if self.activations == "none":
            return
        format = activation_format(self.activation_format, self.activation_bits).name
        transforms = {layer.name: grids[layer.name].transform for layer in layers}
        static = (
            {}
            if self.activations == "token"
            else input_ranges(on, layers, examples=self.examples, progress=progress, transforms=transforms)
        )
        for layer in layers:
            transform, gram = transforms[layer.name], moments[layer.name].gram
            assert gram is not None
            wide = (
                widest(gram[0] if transform is None else transform.gram(gram[0]), self.wide_share)
                if self.wide_share
                else None
            )
            quantize_activations(layer, static.get(layer.name), format, self.activations, transform, wide)

    def _losses(self, on: Subject, progress: Progress) -> dict[str, dict[str, float]]:
        found = {}
        if self.predict_examples:
            found["calibration"] = on.evaluated("calibration", self.predict_examples)
        if self.test_examples:
            found["test"] = on.evaluated("test", self.test_examples, progress)
        return found

    def _predict(
        self, on: Subject, table: pd.DataFrame, deltas: dict[str, Tensor], progress: Progress
    ) -> dict[str, Any]:
        from workbench.curvature.estimators.quadratic import predicted_change

        found = predicted_change(
            on, deltas, split="calibration", examples=self.predict_examples, progress=progress
        )
        table["predicted_first"] = [found.by_layer[name][0] for name in table["layer"]]
        table["predicted_second"] = [found.by_layer[name][1] for name in table["layer"]]
        table["predicted_change"] = table["predicted_first"] + table["predicted_second"]
        return {"predicted_change": float(found.total)}


def stacked(parts: Sequence[tuple[Tensor, Grid]]) -> tuple[Tensor, Grid]:
    """A layer's matrices as one: unchanged when there is one, stacked for experts."""
    if len(parts) == 1:
        return parts[0]
    zeros = [g.zero for _, g in parts if g.zero is not None]
    transform = parts[0][1].transform
    if transform is not None:
        own = [g.transform.tensors for _, g in parts if g.transform is not None]
        each = {name: torch.stack([tensors[name] for tensors in own]) for name in own[0] if name != "signs"}
        transform = Transform.of(transform.tensors | each, transform.block, transform.orthogonal)
    grid = Grid(
        parts[0][1].format,
        torch.stack([g.scale for _, g in parts]),
        torch.stack(zeros) if zeros else None,
        parts[0][1].group,
        transform,
    )
    return torch.stack([v for v, _ in parts]), grid


def ranges_for(
    on: Subject, layers: Sequence[Layer], examples: int, progress: Progress
) -> dict[str, InputRanges]:
    key = ("input ranges", examples, tuple(layer.name for layer in layers))
    return on.memo(key, lambda: input_ranges(on, layers, examples=examples, progress=progress))


def moments_for(
    on: Subject, layers: Sequence[Layer], examples: int, progress: Progress
) -> dict[str, InputMoments]:
    """Input second moments, kept with the subject: a sweep over formats and roundings measures them once."""
    key = ("input moments", examples, tuple(layer.name for layer in layers))
    return on.memo(key, lambda: second_moments(on, layers, "calibration", examples, progress=progress))


def mask_of(layer: Layer) -> Tensor | None:
    """True where the weight is kept, when the layer is pruned."""
    masks = [c.mask for c in layer.changes if isinstance(c, Mask)]
    return masks[0] if masks else None


def effective(values: Tensor, term: Term | None) -> Tensor:
    return values if term is None else values + term[0] @ term[1]


@torch.no_grad()
def put(layer: Layer, values: Tensor, grid: Grid, term: Term | None = None) -> None:
    """Write values and keep them on their grid, with a low-rank term beside them.
    What was added before is part of `values` now.
    """
    layer.attach(FakeQuant.of(grid))
    stack = layer.module.parametrizations[layer.tensor]
    kept = [c for c in stack if c.order >= FakeQuant.order and not isinstance(c, Adapter)]
    while len(stack):
        del stack[-1]
    stack.extend(kept)
    layer.write(values.to(layer.original.dtype))
    if term is not None:
        layer.attach(Adapter(*term))


def layer_row(
    layer: Layer, weight: Tensor, delta: Tensor, grid: Grid, moments: InputMoments, term: Term | None = None
) -> dict[str, Any]:
    """Errors of one layer as shares of energy, and its size."""
    assert moments.gram is not None
    gram = moments.gram if weight.ndim == 3 else moments.gram[0]
    weight_error = float(delta.square().sum() / weight.square().sum().clamp_min(1e-30))
    output_error = float(((delta @ gram) * delta).sum() / ((weight @ gram) * weight).sum().clamp_min(1e-30))
    mask = mask_of(layer)
    packed = grid.bytes(tuple(weight.shape), None if mask is None else int(mask.sum()))
    packed += 0 if term is None else 2 * (term[0].numel() + term[1].numel())  # kept in 16 bits
    return {
        "layer": layer.name,
        "weights": weight.numel(),
        "bits": packed * 8 / weight.numel(),
        "bytes": packed,
        "weight_error": weight_error,
        "output_error": output_error,
        "sqnr": -10 * math.log10(max(weight_error, 1e-30)),
    }


def summary_facts(
    table: pd.DataFrame, before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]
) -> dict[str, Any]:
    weights = int(table["weights"].sum()) if len(table) else 0
    facts: dict[str, Any] = {}
    for key, value in after.get("test", {}).items():
        facts[f"dense_{key}"], facts[key] = before["test"][key], value
    if weights:
        facts["average_bits"] = float(table["bytes"].sum() * 8 / weights)
        facts["bytes"] = math.ceil(table["bytes"].sum())
        facts["weights"] = weights
        facts["output_error"] = float(table["output_error"].mean())
    return facts


def check_salient(settings: Quantize, layers: Sequence[Layer], format: Format) -> None:
    """`BadInput` for what cannot keep salient weights apart."""
    if not settings.salient_share:
        return
    if settings.rounding not in SPLIT_ROUNDINGS:
        raise BadInput(
            f"salient_share: {settings.rounding} rounds on one grid; "
            f"use {', '.join(SPLIT_ROUNDINGS)}, or salient_share 0"
        )
    if fused := [layer.name for layer in layers if len(layer.shape) == 3]:
        raise BadInput(
            f"salient_share: {fused[0]} is a stack of experts, each with salient weights of its own; "
            "choose other layers, or salient_share 0"
        )
    if format.scale == "none":
        raise BadInput(
            f"salient_share: {format.name} has no scales; use an int, ExMy, codebook, block, "
            "ternary or binary format"
        )
    group_of(format, settings.granularity, settings.group_size, layers[0].shape[-1])
