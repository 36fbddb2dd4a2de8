"""What the engines that leave masks have in common: the dense model beside the pruned one, statistics,
recovery and the tables of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import Tensor

from workbench.measures.reference import measured_beside, reference_of
from workbench.progress import Progress
from workbench.pruning.error_table import add_prediction, layer_table, packed_bytes
from workbench.pruning.pattern import Pattern
from workbench.pruning.recovery.recovery import Recovery
from workbench.results import Result
from workbench.subjects import Layer, Mask, Subject
from workbench.subjects.layers import weights_in_turn
from workbench.subjects.stored import bytes_of_weights, dense_size

if TYPE_CHECKING:
    from workbench.pruning.plan import PrunePlan


class Masked:
    """An engine whose events mask weights; a subclass says how (`prune_to`) and what follows (`removed`)."""

    def __init__(self, prune: PrunePlan, pattern: Pattern) -> None:
        self.prune, self.pattern = prune, pattern

    def begin(self, on: Subject, progress: Progress) -> None:
        self.on, self.progress = on, progress
        self.layers = on.layers(self.prune.layers)
        reference_of(on, self.prune.test_split, progress=progress)
        self.dense_test = on.evaluated(self.prune.test_split, progress=progress)
        self.dense = on.copy()
        self.before = {layer.name: layer.weight.detach() for layer in self.dense.layers(self.prune.layers)}
        self.calibration = self.prune.calibration(on, self.layers, progress)
        self.changed = False
        self.history: list[dict[str, float]] = []
        self.extra: dict[str, float] = {}
        self.brought = 0  # events that a checkpoint has brought and nobody has asked for yet
        self.recovery: Recovery | None = self.prune.recovery(
            on,
            self.layers,
            self.dense,
            seed=self.prune.seed,
            progress=progress,
            watch=self.draw,
            owner=self,
        )

    def state_dict(self) -> dict[str, Any]:
        """What the events have done so far."""
        masks = {
            layer.name: change.mask
            for layer in self.layers
            for change in layer.changes
            if isinstance(change, Mask)
        }
        return {"history": self.history, "extra": self.extra, "changed": self.changed, "masks": masks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.extra = list(state_dict["history"]), dict(state_dict["extra"])
        self.changed, self.brought = state_dict["changed"], len(self.history)
        for layer in self.layers:
            if (mask := state_dict["masks"].get(layer.name)) is not None:
                layer.attach(Mask(mask.to(layer.original.device)))

    def draw(self, run: Recovery) -> None:
        if self.progress.watched:
            tables = {"recovery": pd.DataFrame(run.curve)}
            shown = self.prune.result(pd.DataFrame(), {"steps": run.done}, tables=tables, partial=True)
            self.progress.preview(shown)

    def train(self, steps: int) -> None:
        if self.recovery is not None:
            self.recovery.advance(steps)
            self.changed = True

    @property
    def trained(self) -> int:
        return self.recovery.done if self.recovery else 0

    def event(self, sparsity: float) -> bool:
        if self.brought:
            self.brought -= 1
            return True
        if self.changed:
            self.calibration = self.prune.calibration(self.on, self.layers, self.progress)
        self.prune_to(sparsity)
        if self.progress.stopped:  # perhaps half done: no checkpoint holds it
            return False
        self.changed = True
        self.history.append(
            {
                "step": len(self.history) + 1,
                "trained": self.trained,
                "sparsity": zero_share(self.layers),
            }
        )
        if self.recovery is not None:
            self.recovery.changed()
        return True

    def prune_to(self, sparsity: float) -> None:
        raise TypeError(f"{type(self).__name__} has no prune_to")

    def removed(self, facts: dict[str, Any]) -> dict[str, pd.DataFrame]:
        """Take out what is masked as a whole, if that is asked for; further facts, and tables."""
        return {}

    def finish(self) -> Result:
        prune, on, progress, layers = self.prune, self.on, self.progress, self.layers
        if self.recovery is not None:
            self.recovery.finish()
        # The dense model's statistics: still held when they fit in memory,
        # otherwise measured on the copy again, a group of layers at a time.
        gram = prune.calibration(self.dense, self.dense.layers(prune.layers), progress).gram
        table = layer_table(layers, self.before, None if progress.stopped else gram)
        facts = self.facts()
        if revived := sum(revived_in(layer, self.before[layer.name]) for layer in layers):
            facts["revived"] = revived
        if prune.predict_examples and not progress.stopped:
            deltas = {layer.name: layer.weight.detach() - self.before[layer.name] for layer in layers}
            add_prediction(
                table, facts, self.dense, deltas, prune.calibration_split, prune.predict_examples, progress
            )
        arrays = {
            layer.name: np.packbits((layer.weight.detach() != 0).cpu().numpy(), axis=-1) for layer in layers
        }
        more = self.removed(facts)
        if not progress.stopped:
            reference = reference_of(self.dense, prune.test_split, progress=progress)
            facts |= measured_beside(reference, on, prune.test_split, progress=progress)
        tables = {"schedule": pd.DataFrame(self.history)} if len(self.history) > 1 else {}
        if self.recovery is not None:
            tables["recovery"] = pd.DataFrame(self.recovery.curve)
            facts["trained_share"] = self.recovery.trainable_share
        return prune.result(table, facts, tables=tables | more, arrays=arrays, subject=on)

    def facts(self) -> dict[str, Any]:
        prune, layers = self.prune, self.layers
        weights = sum(layer.original.numel() for layer in layers)
        zeros = zeros_in(layers)
        return {
            "sparsity": zeros / weights,
            **{f"dense_{k}": v for k, v in self.dense_test.items()},
            "weights": weights,
            "nonzero": weights - zeros,
            "dense_bytes": weights * dense_size(self.on.model),
            "packed_bytes": packed_bytes(
                weights,
                weights - zeros,
                self.pattern,
                bytes_of_weights(self.on.model, weights_in_turn(layers)),
            ),
            "composition": (
                f"{prune.saliency} x {prune.pattern} x {prune.allocation} x {prune.compensation} x "
                f"{prune.sparsity_schedule} x {prune.recovery}"
            ),
        }


def revived_in(layer: Layer, before: Tensor) -> int:
    """Weights that were zero before a run and are not any more."""
    return int(((before == 0) & (layer.weight.detach() != 0)).sum())


def zeros_in(layers: Sequence[Layer]) -> int:
    return sum(int((weight == 0).sum()) for weight in weights_in_turn(layers))


def zero_share(layers: Sequence[Layer]) -> float:
    return zeros_in(layers) / sum(layer.original.numel() for layer in layers)
