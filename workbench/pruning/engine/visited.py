"""Pruning block after block: what is held beside the model is the statistics and the dense weights of one
block, and the hidden states of the calibration examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from workbench.curvature.operators.weights import Place, place_of, with_weights
from workbench.measures.experts_given_back import given_back
from workbench.measures.reference import measured_beside, reference_of
from workbench.progress import Progress
from workbench.pruning.calibration import Calibration
from workbench.pruning.engine.masked import Masked
from workbench.pruning.engine.weights import check_weights, prune_once, uniform
from workbench.pruning.error_table import add_prediction, layer_table
from workbench.pruning.pattern import NM, Tiles, make_mask
from workbench.results import Result
from workbench.statistics import ExpertsSeen, InputMoments, Visit, Walk
from workbench.subjects import Layer, Subject
from workbench.subjects.layers import weights_in_turn

KEPT = 256 << 20  # bytes of second moments that are kept with a subject, for the next run on it


class Visited(Masked):
    """One event, without recovery, of masks that follow from each layer's own weights and inputs."""

    pattern: Tiles | NM

    def check(self, on: Any) -> None:
        check_weights(self.prune, self.pattern, on)

    def begin(self, on: Subject, progress: Progress) -> None:
        prune = self.prune
        self.on, self.progress = on, progress
        self.layers = on.layers(prune.layers)
        changing = prune.layers != "blocks"
        self.reference = reference_of(on, prune.test_split, progress=progress, changing=changing)
        self.dense_test = on.evaluated(prune.test_split, progress=progress)
        self.rows: list[pd.DataFrame] = []
        self.experts = ExpertsSeen()
        self.weights: dict[str, Tensor] = {}  # weights (..., out, in), for a prediction at them
        self.biases: dict[str, Tensor] = {}

    def train(self, steps: int) -> None:
        """Nothing: such a pruning has no recovery."""

    @property
    def trained(self) -> int:
        return 0

    def event(self, sparsity: float) -> bool:
        prune, progress = self.prune, self.progress
        shares = uniform(self.layers, sparsity)
        if self.pattern.fixed is None:
            options = prune.allocation.options
            shares = prune.allocation.value.shares(self.layers, {}, self.pattern, sparsity, options)
        calibration = prune.calibration(self.on, self.layers, progress)
        for visit in self.visits(calibration):
            layers = visit.layers
            if visit.done:
                self.rows.append(pd.DataFrame(visit.record["rows"]))
                self.experts.take(visit.record)
                continue
            seen = replace(calibration, given=visit.moments)
            for layer in layers:
                self.experts.add(layer.name, seen.moments(layer))
            before = {layer.name: held(layer) for layer in layers}
            if prune.predict_examples:
                self.weights |= before
                self.biases |= {a.name: a.bias.detach().clone() for a in layers if a.bias is not None}
            prune_once(
                layers,
                seen,
                self.pattern,
                sparsity,
                prune.saliency,
                prune.compensation,
                prune.allocation,
                progress,
                fixed=shares,
            )
            if progress.stopped:
                break
            rows = layer_table(layers, before, seen.gram)
            self.rows.append(rows)
            for layer in layers:
                self.unreached(layer, before[layer.name], seen, shares[layer.name])
            visit.record = {"rows": rows.to_dict("records")} | self.experts.record(layers)
        return not progress.stopped

    def unreached(self, layer: Layer, before: Tensor, calibration: Calibration, sparsity: float) -> None:
        """What pruning by the others' inputs costs experts without tokens, beside pruning by magnitude."""
        moments = calibration.moments(layer)
        reads = "inputs" in (self.prune.saliency.entry.needs, self.prune.compensation.entry.needs)
        if not reads or before.ndim != 3 or bool(moments.tokens.all()):
            return
        mask = make_mask(before.abs(), self.pattern, sparsity, self.prune.allocation.value.within)

        def by_magnitude(expert: int) -> Tensor:
            return before[expert].float() * mask[expert]

        after = layer.weight.detach()
        self.experts.measure(layer.name, moments, before, after, "pruned by magnitude", by_magnitude)

    def visits(self, calibration: Calibration) -> Iterator[Visit]:
        """Layers that are pruned on the same state of the model, with what they read: all of them on the
        dense inputs while that is little, else block by block.
        """
        prune = self.prune
        if not prune.in_sequence and gram_bytes(self.layers) <= KEPT:
            yield Visit("", self.layers, {layer.name: calibration.moments(layer) for layer in self.layers})
            return
        yield from Walk(
            self.on,
            self.layers,
            prune.calibration_examples,
            prune.calibration_split,
            sequential=prune.in_sequence,
            resumes=not prune.predict_examples,
            progress=self.progress,
        )

    def tried(self, on: Subject, layers: Sequence[Layer], moments: Mapping[str, InputMoments]) -> None:
        """What a visit of these layers does to them, for how long it takes."""
        prune = self.prune
        calibration = replace(prune.calibration(on, layers, Progress()), given=moments)
        before = {layer.name: held(layer) for layer in layers}
        chosen = (prune.saliency, prune.compensation, prune.allocation)
        shares = {layer.name: prune.sparsity for layer in layers}
        prune_once(layers, calibration, self.pattern, prune.sparsity, *chosen, Progress(), fixed=shares)
        layer_table(layers, before, calibration.gram)

    def finish(self) -> Result:
        prune, on, progress, layers = self.prune, self.on, self.progress, self.layers
        table = self.table()
        facts = self.facts()
        if prune.predict_examples and not progress.stopped:
            self.predict(table, facts)
        arrays = {
            layer.name: np.packbits((weight != 0).cpu().numpy(), axis=-1)
            for layer, weight in zip(layers, weights_in_turn(layers), strict=True)
        }
        if not progress.stopped:
            facts |= measured_beside(self.reference, on, prune.test_split, progress=progress)
        if "inputs" in (prune.saliency.entry.needs, prune.compensation.entry.needs):
            facts |= self.experts.facts(progress, "pruned by what the other experts read")
            split, dense = prune.test_split, self.experts.dense
            facts |= given_back(self.reference, on, layers, dense, split, progress)
        return prune.result(table, facts, tables=self.experts.tables(), arrays=arrays, subject=on)

    def table(self) -> pd.DataFrame:
        """One row a layer, in the model's order; of those that a stop has left out, as they are."""
        known = {name for rows in self.rows for name in rows["layer"]}
        left = [layer for layer in self.layers if layer.name not in known]
        rest = layer_table(left, {layer.name: layer.weight.detach() for layer in left}, None)
        rows = pd.concat([part for part in (*self.rows, rest) if len(part)]).set_index("layer")
        return rows.loc[[layer.name for layer in self.layers]].reset_index()

    def predict(self, table: pd.DataFrame, facts: dict[str, Any]) -> None:
        """At the dense weights and biases, in their place for as long."""
        prune = self.prune
        deltas = {layer.name: layer.weight.detach() - self.weights[layer.name] for layer in self.layers}
        places, values = [], []
        for layer in self.layers:
            weight = self.weights[layer.name]
            places.append(place_of(layer))
            values.append(weight.mT if layer.transposed else weight)
            if layer.name in self.biases:
                places.append(Place(f"{layer.name}.bias", layer.module, "bias"))
                values.append(self.biases[layer.name])
        split, examples = prune.calibration_split, prune.predict_examples
        with with_weights(self.on.model, places, values):
            add_prediction(table, facts, self.on, deltas, split, examples, self.progress)
        self.weights, self.biases = {}, {}


def held(layer: Layer) -> Tensor:
    """A layer's weight (..., out, in) as it is, which writing to the layer will not change."""
    weight = layer.weight.detach()
    return weight if layer.shared or layer.changes else weight.clone()


def gram_bytes(layers: Sequence[Layer]) -> int:
    """Bytes of the second moments of all these layers' inputs."""
    return sum(4 * math.prod(layer.shape[:-2]) * layer.shape[-1] ** 2 for layer in layers)
