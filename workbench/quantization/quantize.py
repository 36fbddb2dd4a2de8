"""Quantize: put layers on a number format, and see what that costs beside what curvature predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from workbench.measures.experts_given_back import given_back
from workbench.measures.reference import Reference, distance_facts, measured_beside, reference_of
from workbench.progress import Progress
from workbench.quantization.activations.activations import (
    KeyValueQuant,
    activation_format,
    head_size,
    input_ranges,
    key_value_layers,
    quantize_activations,
)
from workbench.quantization.number.grid import group_of
from workbench.quantization.quantize_check import check
from workbench.quantization.quantize_result import QuantizeResult
from workbench.quantization.quantize_settings import QuantizeSettings
from workbench.quantization.quantized_layer import ranges_for
from workbench.quantization.rounding.feedback import Factors
from workbench.quantization.rounding_order import Inputs, RoundingOrder, Source, round_layers
from workbench.quantization.rounds import Rounds
from workbench.quantization.transform.flatquant import input_rows
from workbench.results import Result
from workbench.statistics.walk_forecast import Planned
from workbench.storage.forecast import Plan
from workbench.subjects import Layer, Subject


class Quantize(QuantizeSettings):
    """Put layers on a number format (integer, minifloat, codebook, block format)
    with a rounding of your choice; returns the quantized subject.
    """

    changes_model: ClassVar[bool] = True
    summary_line: ClassVar[str] = "number format x granularity x rounding, with predicted and measured loss"

    @classmethod
    def result_class(cls) -> type[Result]:
        return QuantizeResult

    @property
    def shares_weights(self) -> bool:
        return self.walks

    def check(self, on: Subject) -> None:
        check(self, on)

    def planned(self, on: Subject) -> Plan | None:
        """The walk, where nothing else is done that takes memory or time worth a word."""
        if not self.in_sequence or not self.walks or self.rounds_inputs or self.kv_bits:
            return None
        if self.transform.has("needs ranges") or self.adapter != "none":
            return None
        layers = on.layers(self.layers)
        grids = sum(
            8 * math.prod(layer.shape[:-1]) * -(-layer.shape[-1] // self.group_for(layer)) for layer in layers
        )
        return Planned(
            on,
            layers,
            "calibration",
            self.calibration_examples,
            "test",
            min(self.test_examples, on.size("test")) if self.test_examples else 0,
            rewritten=True,
            grids=grids,
            predicted=bool(self.predict_examples),
        )

    def group_for(self, layer: Layer) -> int:
        """Columns of a layer that share a scale."""
        return group_of(self.format_for(layer.name), self.granularity, self.group_size, layer.shape[-1])

    def try_part(self, on: Subject, *part: Any) -> None:
        layers, moments = part
        factors, rounds = Factors(), Rounds(self, keeps_dense=False)
        sources = {
            layer.name: Source(moments[layer.name], torch.Generator().manual_seed(self.seed), factors)
            for layer in layers
        }
        for layer, found in zip(layers, round_layers(self, layers, sources), strict=True):
            rounds.add(layer, *found, moments[layer.name])

    def _run(self, on: Subject, progress: Progress) -> Result:
        layers = on.layers(self.layers)
        reference = self._reference(on, progress)
        before = self._losses(on, progress)
        dense = on.copy() if self.in_sequence and not self.walks else on
        run = Rounds(self, keeps_dense=bool(self.predict_examples))
        order = RoundingOrder(self, on, dense, layers, self._inputs(on, layers, progress), run, progress)
        for layer, values, grid, term, moments in order:
            run.add(layer, values, grid, term, moments)
        table = pd.DataFrame(run.rows)
        facts: dict[str, Any] = {"revived": run.revived} if run.revived else {}
        if self.reads_inputs:
            facts |= run.experts.facts(progress, "rounded as if every input feature were alike")
        if self.predict_examples and run.rows:
            deltas = run.deltas()
            with run.dense_weights(on):
                facts |= self._predict(on, table, deltas, progress)
            del deltas
        run.finish()
        self._round_activations(on, run, progress)
        near = measured_beside(reference, on, "test", progress=progress) if reference else {}
        after = self._losses(on, progress)
        facts = summary_facts(table, before, after) | facts | distance_facts(near)
        facts |= given_back(reference, on, run.layers, run.experts.dense, "test", progress)
        if self.predict_examples:
            facts["measured_change"] = after["calibration"]["loss"] - before["calibration"]["loss"]
        return self.result(table, facts, tables=run.experts.tables(), subject=on)

    def _inputs(self, on: Subject, layers: Sequence[Layer], progress: Progress) -> Inputs:
        """What the transform asks of the layers' inputs."""
        examples = self.calibration_examples
        asked = self.transform.has("needs ranges")
        ranges = ranges_for(on, layers, examples, progress) if asked else {}
        if not self.rounds_rows:
            return Inputs(ranges, {})
        return Inputs(ranges, input_rows(on, layers, examples, torch.Generator().manual_seed(self.seed)))

    def _round_activations(self, on: Subject, run: Rounds, progress: Progress) -> None:
        layers = run.layers
        if self.kv_bits:
            size = head_size(on)
            for layer in key_value_layers(layers):
                layer.attach(KeyValueQuant(format=activation_format("int", self.kv_bits).name, group=size))
        if not self.rounds_inputs:
            return
        options = self.activations.options
        format = options.format().name
        static = {}
        if self.activations.has("ranges"):
            static = input_ranges(
                on, layers, examples=self.calibration_examples, progress=progress, transforms=run.transforms
            )
        for layer in layers:
            name = layer.name
            quantize_activations(
                layer, static.get(name), format, self.activations, run.transforms[name], run.wide.get(name)
            )

    def _reference(self, on: Subject, progress: Progress) -> Reference | None:
        if not self.test_examples:
            return None
        changing = self.layers != "blocks"
        return reference_of(on, "test", self.test_examples, progress, changing=changing)

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
