"""Layers in the order in which they are rounded: one by one, block by block, or in windows of blocks."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench.progress import Progress
from workbench.quantization.activations.activations import InputRanges
from workbench.quantization.activations.sequential import block_calls, grouped, paired_moments, target
from workbench.quantization.number.grid import Grid
from workbench.quantization.number.split_grid import Salient
from workbench.quantization.quantize_settings import QuantizeSettings
from workbench.quantization.quantized_layer import effective, mask_of, moments_for, stacked
from workbench.quantization.rounding.adapters import Term
from workbench.quantization.rounding.blockwise import reconstruct, windows
from workbench.quantization.rounding.feedback import Factors
from workbench.quantization.rounding.learned import LearnedRounding
from workbench.quantization.rounding.nearest import rounded
from workbench.quantization.rounding.problem import Problem
from workbench.quantization.rounds import Rounds
from workbench.quantization.transform.transform import in_coordinates
from workbench.statistics import InputMoments, Visit, Walk
from workbench.statistics.experts import all_tokens
from workbench.subjects import Layer, Subject

Rounded = tuple[Tensor, Grid, Term | None]
Placed = tuple[Layer, Tensor, Grid, Term | None, InputMoments]
KEPT = 256 << 20  # bytes of second moments that are kept with a subject, for the next run on it
TOGETHER = 1 << 21  # weights that are rounded as one matrix at most: more are no faster, and take memory


@dataclass(frozen=True)
class Inputs:
    """What some transforms ask about a layer's inputs besides the second moment:
    ranges, and sampled rows, by layer.
    """

    ranges: dict[str, InputRanges]
    rows: dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """What one layer's rounding reads beside its weight.

    moments : second moments of the inputs it will see;  cross : (in, in) products of the dense model's inputs
        with those, where blocks before are quantized already (`sequential`)
    generator : the source of every random choice;  factors : shared by layers with the same inputs
    """

    moments: InputMoments
    generator: torch.Generator
    factors: Factors
    cross: Tensor | None = None
    seen: Inputs | None = None


def problems(settings: QuantizeSettings, layer: Layer, source: Source) -> list[Problem]:
    """What to round: one matrix, or each of a stack of experts with its own inputs."""
    grams, mask = source.moments.gram, mask_of(layer)
    assert grams is not None
    weight = layer.weight.detach().float()
    if source.cross is not None:
        weight = target(weight, grams[0], source.cross, settings.sequential_damp)
    matrices = weight if weight.ndim == 3 else weight[None]
    masks = [None] * len(matrices) if mask is None else mask.reshape(matrices.shape)
    ranges = None if source.seen is None else source.seen.ranges.get(layer.name)
    rows = None if source.seen is None else source.seen.rows.get(layer.name)
    salient = None
    if settings.salient != "none":
        wide = settings.salient.options
        salient = Salient(wide.share, wide.bits, settings.salient)
    shared = Problem(
        weight=matrices[0],
        gram=grams[0],
        format=settings.format_for(layer.name),
        granularity=settings.granularity,
        group_size=settings.group_size,
        rule=settings.range,
        generator=source.generator,
        factors=source.factors,
        rows=rows,
        activation=None if rows is None else settings.activations.options.format(),
        salient=salient,
        layer=layer.name,
    )
    return [
        replace(
            shared,
            weight=matrix if kept is None else matrix * kept,
            gram=grams[expert],
            mask=kept,
            largest=None if ranges is None else ranges.largest[expert],
        )
        for expert, (matrix, kept) in enumerate(zip(matrices, masks, strict=True))
    ]


def round_matrix(settings: QuantizeSettings, problem: Problem) -> tuple[Tensor, Grid]:
    """One matrix: its values in the model's coordinates, and the grid they are on in the transform's."""
    moved, transform = in_coordinates(problem, settings.transform)
    values, grid = rounded(moved, settings.rounding)
    if transform is None:
        return values, grid
    return transform.weight_back(values), replace(grid, transform=transform)


def round_layer(settings: QuantizeSettings, layer: Layer, source: Source) -> Rounded:
    """Values (..., out, in), float32, in the model's coordinates, their grid,
    and the low-rank term beside them, if any.
    """

    def rounder(problem: Problem) -> tuple[Tensor, Grid]:
        return round_matrix(settings, problem)

    parts = [settings.adapter(problem, rounder) for problem in problems(settings, layer, source)]
    values, grid = stacked([(values, grid) for values, grid, _ in parts])
    terms = [term for _, _, term in parts if term is not None]
    if not terms:
        return values, grid, None
    if len(terms) == 1:
        return values, grid, terms[0]
    ups, downs = zip(*terms, strict=True)
    return values, grid, (torch.stack(ups), torch.stack(downs))


def round_layers(
    settings: QuantizeSettings, layers: Sequence[Layer], sources: Mapping[str, Source]
) -> Iterator[Rounded]:
    """What `round_layer` gives for each of these layers, one after another; neighbours that read the same
    (query, key and value, gate and up) are rounded as one matrix where each row is rounded by itself.
    """
    group: list[Layer] = []
    for layer in layers:
        if group and not can_join(settings, group, layer, sources):
            yield from round_group(settings, group, sources)
            group = []
        group.append(layer)
    if group:
        yield from round_group(settings, group, sources)


def can_join(
    settings: QuantizeSettings, group: Sequence[Layer], layer: Layer, sources: Mapping[str, Source]
) -> bool:
    """Whether a layer reads what those of the group do, and nothing but the inputs, the format and its own
    weights decides about any row of them.
    """
    first, format = group[0], settings.format_for(layer.name)
    plain = settings.transform == "none" and settings.adapter == "none" and settings.salient == "none"
    if not plain or not settings.rounding.has("rows apart") or settings.granularity == "tensor":
        return False
    if format.scale not in ("real", "e8m0") or format != settings.format_for(first.name):
        return False
    if len(first.shape) != 2 or len(layer.shape) != 2:
        return False
    if sum(math.prod(each.shape) for each in (*group, layer)) > TOGETHER:
        return False
    one, other = sources[first.name].moments.gram, sources[layer.name].moments.gram
    if one is None or other is None:
        return False
    return one.shape == other.shape and one.device == other.device and torch.equal(one, other)


def round_group(
    settings: QuantizeSettings, group: Sequence[Layer], sources: Mapping[str, Source]
) -> list[Rounded]:
    """Layers that read the same, their rows one under the other."""
    if len(group) == 1:
        return [round_layer(settings, group[0], sources[group[0].name])]
    parts = [problems(settings, layer, sources[layer.name])[0] for layer in group]
    mask = None
    if any(part.mask is not None for part in parts):
        every = [torch.ones_like(part.weight, dtype=torch.bool) for part in parts]
        mask = torch.cat([e if p.mask is None else p.mask for e, p in zip(every, parts, strict=True)])
    whole = replace(parts[0], weight=torch.cat([part.weight for part in parts]), mask=mask)
    values, grid = round_matrix(settings, whole)
    rows = [len(part.weight) for part in parts]
    zeros = [None] * len(rows) if grid.zero is None else grid.zero.split(rows)
    own = zip(values.split(rows), grid.scale.split(rows), zeros, strict=True)
    return [(value, replace(grid, scale=scale, zero=zero), None) for value, scale, zero in own]


def rounded_expert(settings: QuantizeSettings, layer: Layer, source: Source, expert: int) -> Tensor:
    """(out, in) what one expert of a layer computes with when it is rounded by itself."""

    def rounder(problem: Problem) -> tuple[Tensor, Grid]:
        return round_matrix(settings, problem)

    values, _, term = settings.adapter(problems(settings, layer, source)[expert], rounder)
    return effective(values, term)


@dataclass
class RoundingOrder:
    """The layers of `on` in the order in which they are rounded.

    dense : the subject before anything was rounded, the same as `on` unless blocks are rounded in sequence
        and need the dense ones' outputs
    rounds : whom each layer is handed to before the next is asked for
    """

    settings: QuantizeSettings
    on: Subject
    dense: Subject
    layers: Sequence[Layer]
    seen: Inputs
    rounds: Rounds
    progress: Progress

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.settings.seed)
        self.factors = Factors()
        self.rounds.on_all = self.on_all_tokens

    def on_all_tokens(self, layer: Layer, moments: InputMoments, expert: int) -> Tensor | None:
        """What an expert's weight would become, were the layer's tokens routed to it; None where more is read
        of them than their second moment.
        """
        if self.settings.by_blocks or self.settings.paired or self.settings.transform.has("needs ranges"):
            return None
        generator = torch.Generator().manual_seed(self.settings.seed)
        return rounded_expert(self.settings, layer, Source(all_tokens(moments), generator, Factors()), expert)

    @functools.cached_property
    def moments(self) -> dict[str, InputMoments]:
        """Second moments of the dense inputs of all layers at once."""
        return moments_for(self.on, self.layers, self.settings.calibration_examples, self.progress)

    def __iter__(self) -> Iterator[Placed]:
        """Each layer with its values, grid, low-rank term and second moments. With `sequential` a block's
        statistics are taken once those before it are in place.
        """
        if self.settings.walks:
            for visit in self.visits():
                if visit.done:
                    self.rounds.take(visit.layers, visit.record)
                    self.generator.set_state(torch.tensor(visit.record["generator"], dtype=torch.uint8))
                    continue
                moments = visit.moments
                sources = {
                    layer.name: Source(moments[layer.name], self.generator, self.factors, seen=self.seen)
                    for layer in visit.layers
                }
                found = round_layers(self.settings, visit.layers, sources)
                for layer, each in zip(self.progress.track(visit.layers, "rounding"), found, strict=False):
                    yield layer, *each, moments[layer.name]
                self.factors = Factors()
                visit.record = self.rounds.record(visit.layers)
                visit.record["generator"] = self.generator.get_state().tolist()
            return
        dense_moments = self.moments  # before anything is put in place
        for layer, values, grid, term in self.by_groups():
            yield layer, values, grid, term, dense_moments[layer.name]

    def visits(self) -> Iterator[Visit]:
        """Layers that are rounded on the same state of the model, with the second moments of their inputs:
        all of them on the dense inputs while that is little, else block by block.
        """
        settings = self.settings
        if not settings.in_sequence and gram_bytes(self.layers) <= KEPT:
            yield Visit("", self.layers, self.moments)
            return
        yield from Walk(
            self.on,
            self.layers,
            settings.calibration_examples,
            sequential=settings.in_sequence,
            within=settings.within,
            resumes=self.rounds.resumes,
            progress=self.progress,
        )

    def by_groups(self) -> Iterator[tuple[Layer, Tensor, Grid, Term | None]]:
        """Block by block where blocks are learned or follow the dense outputs."""
        groups = grouped(self.on, self.layers)
        if self.settings.by_blocks:
            inside = [group for group in groups if group[0]]
            stacks = itertools.groupby(inside, key=lambda group: group[0].rsplit(".", 1)[0])
            for _, stack in stacks:  # an encoder's, then a decoder's
                yield from self.by_windows(list(stack))
            groups = [group for group in groups if not group[0]]  # what lies outside goes layer by layer
        for block, mine in groups:
            if self.progress.stopped:
                return
            sources = {name: replace(own, seen=self.seen) for name, own in self.sources(block, mine).items()}
            found = round_layers(self.settings, mine, sources)
            for layer, each in zip(self.progress.track(mine, "rounding"), found, strict=False):
                yield layer, *each

    def sources(self, block: str, layers: Sequence[Layer]) -> dict[str, Source]:
        """What the layers of a block read, measured anew where the blocks before it are rounded already."""
        moments, cross = self.moments, dict[str, Tensor]()
        if self.settings.in_sequence:
            moments, cross = paired_moments(
                self.dense,
                self.on,
                block,
                layers,
                self.settings.calibration_examples,
                progress=self.progress,
            )
        if not self.settings.paired:
            cross = {}
        return {
            layer.name: Source(moments[layer.name], self.generator, self.factors, cross.get(layer.name))
            for layer in layers
        }

    def by_windows(
        self, groups: Sequence[tuple[str, list[Layer]]]
    ) -> Iterator[tuple[Layer, Tensor, Grid, Term | None]]:
        """Blocks learned in windows; a block's rounding is final once the window has left it,
        and those after it go on from where they are.
        """
        options = self.settings.rounding.options.objective.options
        modules, done = dict[str, list[LearnedRounding]](), 0
        spans = windows(len(groups), options.window, options.overlap)
        for span, following in zip(spans, [*spans[1:], range(len(groups), len(groups))], strict=True):
            if self.progress.stopped:
                return
            inside = [groups[i] for i in span]
            for block, mine in inside:
                if mine[0].name not in modules:
                    for name, source in self.sources(block, mine).items():
                        layer = next(layer for layer in mine if layer.name == name)
                        modules[name] = [
                            self.settings.rounding(problem)
                            for problem in problems(self.settings, layer, source)
                        ]
            self.learn(inside, modules)
            for _, mine in groups[done : following.start]:
                for layer in mine:
                    yield layer, *stacked([m.hard() for m in modules.pop(layer.name)]), None
            done = following.start

    def learn(
        self, inside: Sequence[tuple[str, list[Layer]]], modules: dict[str, list[LearnedRounding]]
    ) -> None:
        """Move the roundings of a window's blocks towards what its last block puts out."""
        blocks = [block for block, _ in inside]
        layers = [layer for _, mine in inside for layer in mine]
        examples, rounding = self.settings.calibration_examples, self.settings.rounding
        calls = [block_calls(self.on, block, examples) for block in blocks]
        wanted = block_calls(self.dense, blocks[-1], examples) if self.settings.in_sequence else calls[-1]
        targets = [[call.output for call in wanted]]
        learned = modules[layers[0].name][0]
        if learned.homologous and self.settings.in_sequence:
            targets.append([call.output for call in calls[-1]])
        reconstruct(
            self.on.model,
            blocks,
            layers,
            modules,
            list(zip(*calls, strict=True)),
            targets,
            rounding.options.steps,
            self.generator,
            self.progress,
            divergence=rounding.options.objective.options.window > 1,
            angular=learned.angular,
        )


def gram_bytes(layers: Sequence[Layer]) -> int:
    """Bytes of the second moments of all these layers' inputs."""
    return sum(4 * math.prod(layer.shape[:-2]) * layer.shape[-1] ** 2 for layer in layers)
