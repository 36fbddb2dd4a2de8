"""What saliencies and compensations ask of the data, measured once when first asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.axis import Choice
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.pruning.axes import Gradients
from workbench.pruning.pattern import Pattern
from workbench.pruning.solvers import fisher
from workbench.statistics import (
    InputMoments,
    StackedGradients,
    example_gradients,
    gradient_factors,
    second_moments,
)
from workbench.statistics.factors import bytes_per_example
from workbench.subjects import Layer, Subject

BYTES = 2 << 30  # statistics of as many neighbouring layers as fit are collected in one pass and kept


@dataclass
class Calibration:
    """Statistics of a subject's weights, as they are when this is made, on its calibration split.

    They are kept with the subject (`Subject.memo`), so a sweep over sparsities measures them once. When they
    take more than `memory` bytes they are measured a group of neighbouring layers at a time, each when it is
    asked for, and only one group is held. Everything asked for must be asked before the weights are changed.

    given : second moments that a walk over the blocks has collected; nothing else can be asked for then
    """

    subject: Subject
    layers: Sequence[Layer]
    split: str = "calibration"
    examples: int = 128
    seed: int = 0
    progress: Progress = field(default_factory=Progress)
    memory: int = BYTES
    given: Mapping[str, InputMoments] | None = None

    def __post_init__(self) -> None:
        self.passes: dict[Any, list[list[Layer]]] = {}
        self.store: dict[Any, Any] = (
            self.subject.memo(("pruning calibration", self.split, self.names), dict)
            if self.given is None
            else {}
        )

    def remember(self, key: tuple[Any, ...], compute: Any) -> Any:
        if key in self.store:
            return self.store[key]
        found = compute()
        if not self.progress.stopped:  # what a stop has cut short is not kept for the next run
            self.store[key] = found
        return found

    def scores(self, saliency: Choice, pattern: Pattern, layer: Layer) -> Tensor:
        """A layer's saliencies, kept like every other statistic:
        they do not depend on the sparsity asked for.
        """
        if saliency.entry.needs == "training":
            return saliency(layer, self, pattern).float()
        key = (
            "scores",
            repr(saliency),
            saliency.value,
            repr(pattern),
            self.examples,
            self.seed,
            layer.name,
        )
        found: Tensor = self.remember(key, lambda: saliency(layer, self, pattern).float())
        return found

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    def moments(self, layer: Layer) -> InputMoments:
        """Input second moments of one layer; its neighbours come with it."""
        if self.given is not None:
            return self.given[layer.name]
        groups = self.groups(
            "moments", lambda a: 4 * a.shape[-1] ** 2 * (a.shape[0] if len(a.shape) == 3 else 1)
        )

        def measure(group: Sequence[Layer]) -> dict[str, InputMoments]:
            return second_moments(self.subject, group, self.split, self.examples, progress=self.progress)

        return self.grouped("moments", self.examples, groups, layer, measure)[layer.name]

    def grouped(
        self,
        what: str,
        examples: Any,
        groups: list[list[Layer]],
        layer: Layer,
        measure: Callable[[list[Layer]], Any],
    ) -> Any:
        """What is measured for the group that a layer is in;
        when there are several groups, the others' is let go.
        """
        group = next(g for g in groups if layer.name in [other.name for other in g])
        key = (what, examples, group[0].name)
        if len(groups) > 1 and key not in self.store:  # too much to keep it all
            for other in [k for k in self.store if k[0] == what]:
                del self.store[other]
        return self.remember(key, lambda: measure(group))

    def gram(self, layer: Layer) -> Tensor:
        """(experts, in, in) mean of x x^T over the tokens; the mean over all experts' tokens for an expert
        that saw fewer than 2.
        """
        moments = self.moments(layer)
        assert moments.gram is not None
        return mean_of(moments.gram, moments.tokens)

    def norm(self, layer: Layer) -> Tensor:
        """(experts, in) root mean square of each input feature; of few tokens as `gram`."""
        moments = self.moments(layer)
        return mean_of(moments.square, moments.tokens).sqrt()

    def mean(self, layer: Layer) -> Tensor:
        """(experts, in) mean input; of few tokens as `gram`."""
        moments = self.moments(layer)
        return mean_of(moments.total, moments.tokens)

    def variance(self, layer: Layer) -> Tensor:
        """(experts, in) variance of each input feature over the tokens."""
        return (self.norm(layer).square() - self.mean(layer).square()).clamp_min(0)

    def groups(self, what: Any, bytes_of: Callable[[Layer], int]) -> list[list[Layer]]:
        """Neighbouring layers that are measured in one pass over the data;
        plain matrices and stacks of experts apart.
        """
        if what in self.passes:
            return self.passes[what]
        made: list[list[Layer]] = []
        size = 0
        for layer in self.layers:
            mine = bytes_of(layer)
            if (
                not made
                or size + mine > self.memory
                or (len(layer.shape) == 3) != (len(made[-1][0].shape) == 3)
            ):
                made.append([])
                size = 0
            made[-1].append(layer)
            size += mine
        self.passes[what] = made
        return made

    def collect(self, layers: Sequence[Layer], count: int, size: int) -> dict[str, fisher.Gradients]:
        """`count` gradients of some layers, each the mean of `size` examples'
        (for stacked experts: of the mean loss of so many).
        """
        examples = count * size
        if len(layers[0].shape) == 3:
            rows = list(example_gradients(self.subject, layers, self.split, examples, size, self.progress))
            return {
                layer.name: StackedGradients(torch.stack([r[i].flatten(0, 1) for r in rows]))
                for i, layer in enumerate(layers)
            }
        # bfloat16 halves the store; its rounding is far below the sampling noise of a few hundred gradients.
        found = gradient_factors(
            self.subject,
            layers,
            self.split,
            examples,
            size * max(16 // size, 1),
            torch.bfloat16,
            self.progress,
        )
        return {name: factors.averaged(size) if size > 1 else factors for name, factors in found.items()}

    def factors(self, layer: Layer, asked: Gradients) -> fisher.Gradients:
        """The gradients of one layer; neighbours that fit in memory come with it."""
        if self.given is not None:
            raise BadInput(
                "prune: an entry asks for gradients that was not registered with needs='gradients'; "
                "without it blocks are pruned one after the other, on their inputs alone"
            )
        count, size = asked.gradients, asked.gradient_batch
        groups = self.groups(
            ("gradients", count, size),
            lambda a: count * size * bytes_per_example(self.subject, [a], self.split, torch.bfloat16),
        )
        found: dict[str, fisher.Gradients] = self.grouped(
            "gradients", (count, size), groups, layer, lambda group: self.collect(group, count, size)
        )
        return found[layer.name]

    def _trace(self, layer: Layer, asked: Gradients) -> float:
        """Trace of a layer's Fisher matrix; `BadInput` names a layer that has none."""
        factors = self.factors(layer, asked)
        found = factors.square_sum() / factors.examples
        if not math.isfinite(found):
            raise BadInput(
                f"subject: the gradients of layer {layer.name!r} on the split {self.split!r} are not finite, "
                "or their squares are not; leave out examples that are not, or scale the weights down"
            )
        return found

    def absolute_damp(self, asked: Gradients, damp: float) -> float:
        """The Fisher's damp: `damp` times the mean of its diagonal over all layers."""
        weights = sum(layer.original.numel() for layer in self.layers)
        trace: float = self.remember(
            ("trace", asked.gradients, asked.gradient_batch),
            lambda: sum(self._trace(layer, asked) for layer in self.layers),
        )
        return max(damp * trace / weights, 1e-30)


def rows_of(weight: Tensor) -> Tensor:
    """(..., out, in) -> (all rows, in)."""
    return weight.reshape(-1, weight.shape[-1])


def mean_of(sums: Tensor, tokens: Tensor) -> Tensor:
    """(experts, ...) means over each expert's tokens (experts,); over all of them for one that saw fewer
    than 2.
    """
    counts = tokens.reshape(-1, *[1] * (sums.ndim - 1))
    pooled = sums.sum(0) / counts.sum().clamp_min(1)
    return torch.where(counts >= 2, sums / counts.clamp_min(1), pooled)
