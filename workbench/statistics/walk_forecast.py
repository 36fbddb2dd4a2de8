"""What a walk over blocks holds, from shapes alone, and how long it takes, from a trial of one block."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from workbench.measures.language import CHUNK_BYTES
from workbench.statistics.inputs import InputMoments
from workbench.statistics.walk import Walk
from workbench.storage.forecast import Forecast, weight_bytes
from workbench.storage.resident import of_files
from workbench.subjects import Layer, Subject
from workbench.subjects.tasks import LanguageModel

#: Of a batch's tokens in a block: how many tensors as wide as its widest layer live at a time (the gate's
#: activation, what it is multiplied by, their product, one that is on its way), and as wide as the model.
WIDE, NARROW = 3, 6
#: Pieces of a vocabulary's logits that live at a time where two models are compared.
PIECES = 4
#: Matrices of a layer's shape, and of its inputs' second moment, that are worked on while it is changed.
MATRICES, SQUARES = 6, 4
EVALUATED, WALKED = 64, 16  # examples of a batch, of short sequences
TRIED = 4  # test examples of a trial
Made = TypeVar("Made")


@dataclass(frozen=True)
class Planned:
    """A walk as far as its memory and time depend on it.

    rewritten : the layers get new weights, else only masks;  masks, grids : bytes of what is put on them
    tested : examples of `test_split` that are measured before and after
    predicted : whether the loss change is predicted, by gradients of the whole model
    """

    on: Subject
    layers: Sequence[Layer]
    split: str
    examples: int
    test_split: str
    tested: int
    rewritten: bool
    masks: int = 0
    grids: int = 0
    in_sequence: bool = True
    predicted: bool = False

    def groups(self) -> dict[str, list[Layer]]:
        """The layers by the block that they are in, "" for those in none."""
        names = [name for name, _ in self.on.blocks()]
        found: dict[str, list[Layer]] = {}
        for layer in self.layers:
            block = next((name for name in names if layer.name.startswith(name + ".")), "")
            found.setdefault(block, []).append(layer)
        return found

    def forecast(self) -> Forecast:
        """At the moment when most is held, with what fewer calibration examples would save."""
        found = self.held(self.examples)
        smaller = {}
        for fewer in (self.examples // 2, self.examples // 4, WALKED):
            if not WALKED <= fewer < self.examples:
                continue
            less = sum(self.held(fewer).values())
            if less < sum(found.values()):
                smaller[f"--calibration-examples {fewer}"] = less
        if self.predicted:
            less = sum(replace(self, predicted=False).held(self.examples).values())
            smaller = {"--predict-examples 0": less}
        return Forecast(found, smaller=smaller, exact=not self.predicted, streamed=self.streamed())

    def streamed(self) -> Forecast | None:
        """With the blocks that are done in files: one block dense and changed, and what is in no block."""
        groups = self.groups()
        if self.predicted or "" in groups or not self.mapped or not self.in_sequence:
            return None
        chosen = sum(map(stored, self.layers))
        share = max(sum(map(stored, group)) for group in groups.values()) / chosen
        sizes = [weight_bytes(block) for _, block in self.on.blocks()]
        weights = self.model_bytes - sum(sizes) + max(sizes) + int(share * self.changed(chosen))
        phases = [self.walking(WALKED) | {"weights": weights}]
        if self.tested:
            phases.append(self.evaluating(changed=False) | {"weights": weights})
        return Forecast(max(phases, key=lambda phase: sum(phase.values())), in_files=True)

    def held(self, examples: int) -> dict[str, int]:
        phases = [self.walking(examples)]
        if self.tested:
            phases += [self.evaluating(changed=False), self.evaluating(changed=True)]
        if self.predicted:
            phases.append(self.predicting())
        return max(phases, key=lambda phase: sum(phase.values()))

    def walking(self, examples: int) -> dict[str, int]:
        model, chosen = self.model_bytes, sum(map(stored, self.layers))
        groups = list(self.groups().values())
        block = max(sum(map(stored, group)) for group in groups)
        weights = self.changed(chosen) + block + (model - chosen if self.mapped else model)
        total, batch = tokens_of(self.on, self.split, WALKED, examples)
        squares = [sum(map(square, group)) for group in groups]
        largest = max(self.layers, key=square)
        rounding = MATRICES * stored(max(self.layers, key=stored)) + SQUARES * square(largest)
        return {
            "weights": weights,
            "hidden states": self.rows(total) + self.answers(),
            "second moments": max(squares) + square(largest),
            "workspace": max(self.activations(batch), rounding),
        }

    def evaluating(self, changed: bool) -> dict[str, int]:
        at_once = self.on.examples_at_once(self.test_split, EVALUATED)
        _, batch = tokens_of(self.on, self.test_split, at_once, self.tested)
        chosen = sum(map(stored, self.layers))
        weights = self.model_bytes
        if changed and not (self.mapped and self.rewritten):
            weights += self.changed(chosen)
        elif changed:
            weights += self.masks + self.grids
        pieces = PIECES * CHUNK_BYTES if isinstance(self.on.task, LanguageModel) else 0
        return {
            "weights": weights,
            "hidden states": self.answers(),
            "workspace": max(self.activations(batch), pieces),
        }

    def predicting(self) -> dict[str, int]:
        """At least: the dense and the changed weights, their difference, a gradient and its derivative."""
        chosen = sum(map(stored, self.layers))
        return {
            "weights": self.model_bytes + self.changed(chosen) + chosen,
            "gradients": 2 * chosen,
            "hidden states": self.answers(),
        }

    def changed(self, chosen: int) -> int:
        return (chosen if self.rewritten else 0) + self.masks + self.grids

    @functools.cached_property
    def model_bytes(self) -> int:
        return weight_bytes(self.on.model)

    @functools.cached_property
    def mapped(self) -> bool:
        return of_files(layer.original for layer in self.layers)

    def rows(self, tokens: int) -> int:
        return 4 * tokens * self.widths()[0]

    def answers(self) -> int:
        """The dense model's last hidden states of the test examples."""
        if not self.tested:
            return 0
        return self.rows(tokens_of(self.on, self.test_split, EVALUATED, self.tested)[0])

    def activations(self, tokens: int) -> int:
        narrow, wide = self.widths()
        return 4 * tokens * (WIDE * wide + NARROW * narrow)

    def widths(self) -> tuple[int, int]:
        """The model's width and that of its widest layer, from what layers read and give."""
        shapes = [layer.shape[-2:] for layer in self.layers]
        return min(width for _, width in shapes), max(max(shape) for shape in shapes)

    def seconds(self, change: Callable[[Sequence[Layer], Mapping[str, InputMoments]], None]) -> float | None:
        """From one batch through one block, what `change` takes there, and a few test examples; on a copy
        that shares its weights. None where there are no blocks.
        """
        mine = self.on.copy(shares=True)
        named = {layer.name: layer for layer in mine.layers("*")}
        groups = self.groups()
        block = next((name for name in groups if name), None)
        if block is None or not self.in_sequence:
            return None
        layers = [named[layer.name] for layer in groups[block]]
        walk = Walk(mine, layers, WALKED, self.split)
        walk.answers = [{} for _ in range(walk.batch_count)]
        moments, collect = clocked(lambda: walk.moments(block, layers))
        _, changing = clocked(lambda: change(layers, moments))
        _, pass_on = clocked(lambda: walk.pass_on(block))
        one = tokens_of(self.on, self.split, WALKED, WALKED)[1]
        share = tokens_of(self.on, self.split, WALKED, self.examples)[0] / max(one, 1)
        total = len(groups) * ((collect + pass_on) * share + changing)
        if self.tested:
            _, test = clocked(lambda: self.on.evaluate(self.test_split, limit=TRIED))
            few = tokens_of(self.on, self.test_split, EVALUATED, TRIED)[0]
            total += 2.5 * test * tokens_of(self.on, self.test_split, EVALUATED, self.tested)[0] / max(few, 1)
        return total


def clocked(work: Callable[[], Made]) -> tuple[Made, float]:
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


def stored(layer: Layer) -> int:
    return layer.original.nbytes


def square(layer: Layer) -> int:
    """Bytes of the second moment of a layer's inputs."""
    return 4 * math.prod(layer.shape[:-2]) * layer.shape[-1] ** 2


def tokens_of(on: Subject, split: str, batch_size: int, examples: int) -> tuple[int, int]:
    """(tokens of all batches, of the largest) when so many examples of a split go through the model."""
    ids = on.split(split).get("input_ids")
    count = min(on.size(split), examples)
    if ids is None or ids.ndim != 2:
        positions = patches(on)
        return count * positions, min(count, batch_size) * positions
    lengths = on.task.lengths({k: v[:count] for k, v in on.split(split).items()})
    if lengths is None:
        return count * ids.shape[1], min(count, batch_size) * ids.shape[1]
    each = [len(part) * int(part.max()) for part in lengths.sort().values.split(batch_size)]
    return sum(each), max(each)


def patches(on: Subject) -> int:
    """Positions of an example that is no text: the patches of an image, else one."""
    config = getattr(on.model, "config", None)
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    return (size // patch) ** 2 + 1 if isinstance(size, int) and isinstance(patch, int) else 1
