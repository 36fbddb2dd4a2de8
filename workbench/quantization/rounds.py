"""What a run of `quantize` keeps of the layers that it has rounded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from workbench.quantization.activations.activations import widest
from workbench.quantization.number.grid import Grid
from workbench.quantization.quantize_settings import QuantizeSettings
from workbench.quantization.quantized_layer import effective, layer_row, mask_of, put
from workbench.quantization.rounding.adapters import Term
from workbench.quantization.transform.coordinates import Transform
from workbench.statistics import ExpertsSeen, InputMoments
from workbench.subjects import Layer, Subject


class Rounds:
    """Rounded layers: their rows of the table, and what is asked of the dense ones afterwards.

    Values are put in place at once, unless blocks are learned on the dense model's calls.
    keeps_dense : keep the dense weights, for a prediction at them
    on_all : what an expert's weight becomes when it is rounded on the tokens of all the layer's experts
    wide : (in,) input features on the wider grid, by layer
    """

    def __init__(self, settings: QuantizeSettings, keeps_dense: bool) -> None:
        self.settings, self.keeps_dense = settings, keeps_dense
        self.at_once = settings.in_sequence or not settings.by_blocks
        self.layers: list[Layer] = []
        self.revived = 0  # weights that came in as zeros, by no mask, and are none now
        self.rows: list[dict[str, Any]] = []
        self.experts = ExpertsSeen()
        self.on_all: Callable[[Layer, InputMoments, int], Tensor | None] | None = None
        self.transforms: dict[str, Transform | None] = {}
        self.wide: dict[str, Tensor] = {}
        self.dense: dict[str, Tensor] = {}
        self.waiting: list[tuple[Layer, Tensor, Grid, Term | None]] = []

    def add(self, layer: Layer, values: Tensor, grid: Grid, term: Term | None, moments: InputMoments) -> None:
        """One layer's values (..., out, in), with the second moments of what it reads."""
        weight = layer.weight.detach()
        delta = effective(values, term) - weight.float()
        self.revived += revived_in(layer, weight, delta)
        self.layers.append(layer)
        self.experts.add(layer.name, moments)
        if self.settings.reads_inputs and weight.ndim == 3 and not bool(moments.tokens.all()):
            self.unreached(layer, weight, weight.float() + delta, moments)
        self.rows.append(layer_row(layer, weight.float(), delta, grid, moments, term))
        self.transforms[layer.name] = transform = grid.transform
        options = self.settings.activations.options
        if self.settings.rounds_inputs and options.wide_share:
            assert moments.gram is not None
            moved = moments.gram[0] if transform is None else transform.gram(moments.gram[0])
            self.wide[layer.name] = widest(moved, options.wide_share)
        if not self.settings.in_sequence:
            values = weight + delta.to(weight.dtype)
            if term is not None:
                values = values - (term[0] @ term[1]).to(values.dtype)
        if not self.at_once:
            self.waiting.append((layer, values, grid, term))
            return
        if self.keeps_dense:
            self.dense[layer.name] = weight if layer.shared else weight.clone()
        put(layer, values, grid, term)

    def unreached(self, layer: Layer, before: Tensor, after: Tensor, moments: InputMoments) -> None:
        """What the rounding of experts without tokens costs, beside one on what all others read."""

        def on_all(expert: int) -> Tensor | None:
            return None if self.on_all is None else self.on_all(layer, moments, expert)

        self.experts.measure(layer.name, moments, before, after, "rounded on all tokens of the layer", on_all)

    @property
    def resumes(self) -> bool:
        """Whether the rows and counts are all that anybody asks of a layer that is done."""
        return self.at_once and not self.keeps_dense and not self.settings.rounds_inputs

    def record(self, layers: Sequence[Layer]) -> dict[str, Any]:
        """What JSON can hold of these layers, which were the last to be added."""
        rows = self.rows[len(self.rows) - len(layers) :]
        return {"rows": rows, "revived": self.revived} | self.experts.record(layers)

    def take(self, layers: Sequence[Layer], record: dict[str, Any]) -> None:
        """Layers that were added by a run that was interrupted, which has left this record of them."""
        self.layers += layers
        self.rows += record["rows"]
        self.experts.take(record)
        self.revived = record["revived"]

    @contextlib.contextmanager
    def dense_weights(self, on: Subject) -> Iterator[None]:
        """Inside, `on` computes with its dense weights."""
        from workbench.curvature.operators.weights import place_of, with_weights

        layers = [layer for layer in self.layers if layer.name in self.dense]
        values = [self.dense[layer.name] for layer in layers]
        stored = [v.mT if layer.transposed else v for layer, v in zip(layers, values, strict=True)]
        with with_weights(on.model, [place_of(layer) for layer in layers], stored):
            yield

    def deltas(self) -> dict[str, Tensor]:
        """What rounding adds to each layer's weight (..., out, in)."""
        if not self.at_once:
            return {
                layer.name: effective(values, term) - layer.weight.detach()
                for layer, values, _, term in self.waiting
            }
        return {layer.name: layer.weight.detach() - self.dense[layer.name] for layer in self.layers}

    def finish(self) -> None:
        """Put in place what has waited, and let the dense weights go."""
        for layer, values, grid, term in self.waiting:
            put(layer, values, grid, term)
        self.waiting, self.dense = [], {}


def revived_in(layer: Layer, weight: Tensor, delta: Tensor) -> int:
    """Weights that are zero, by no mask that would keep them so, and get a value."""
    free = (weight == 0) & (delta != 0)
    mask = mask_of(layer)
    return int((free if mask is None else free & mask).sum())
