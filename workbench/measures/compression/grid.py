"""Which runs a compression report makes of a model of this size.

grid = grid_for(on, "blocks")          # or with what somebody chose: grid_for(on, "blocks", bits=[3])
grid.on                                # the subject, with as many test examples as the grid takes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from workbench.subjects import Subject

#: Weights in the chosen layers from which on a model is large: gradients of all of them take hours.
LARGE = 50_000_000
OBERT = {"magnitude": "magnitude", "Wanda": "wanda", "oBERT": "obert"}
SPARSEGPT = {"magnitude": "magnitude", "Wanda": "wanda", "SparseGPT": "sparsegpt"}


@dataclass(frozen=True)
class RunGrid:
    """methods : label -> method of pruning, the last of which goes before a quantization
    combined : [sparsity, bits] of prune, then quantize
    gradients : of the Fisher;  curvature_layers : whose Hessian's spectrum is drawn
    curvature_examples, predict_examples : of the spectrum, and of the predicted loss changes; 0 for none
    curvature_batch : examples of the spectrum in memory at a time
    budget_examples : of the error budget
    jobs : worker processes, each of which holds the model; 0 for one per core
    """

    on: Subject
    methods: Mapping[str, str]
    sparsities: list[float]
    bits: list[int]
    combined: list[list[float]]
    calibration_examples: int
    test_examples: int
    gradients: int
    curvature_layers: str
    curvature_examples: int
    curvature_batch: int
    predict_examples: int
    budget_examples: int
    jobs: int

    def _repr_html_(self) -> str:
        shown = {
            "pruning": f"{', '.join(self.methods)} at {listed(self.sparsities, 'none')}",
            "rounding": f"to nearest, GPTQ at {listed(self.bits, 'no')} bits",
            "pruned, then rounded": listed([f"{s:g} at {b:g} bits" for s, b in self.combined], "none"),
            "calibration, test": f"{self.calibration_examples}, {self.test_examples} examples",
            "curvature": f"of {self.curvature_layers}, on {self.curvature_examples} examples",
            "predicted loss changes": f"on {self.predict_examples} examples"
            if self.predict_examples
            else "none",
        }
        table = pd.DataFrame({"": shown.keys(), "this report": shown.values()})
        return str(table.to_html(index=False, border=0, escape=True))


def listed(values: list[Any], otherwise: str) -> str:
    return ", ".join(v if isinstance(v, str) else f"{v:g}" for v in values) or otherwise


def grid_for(on: Subject, layers: str = "blocks", **chosen: Any) -> RunGrid:
    """The usual grid for a model of this size, with what is `chosen` and neither empty nor 0 in its place.

    A large model is not measured at every width, nor predicted from gradients of the whole; the spectrum is
    of the last block; the runs come one after the other, in this process.
    """
    test = on.size("test")
    if sum(layer.original.numel() for layer in on.layers(layers)) < LARGE:
        found = RunGrid(
            on,
            OBERT,
            [0.5, 0.7, 0.8, 0.9, 0.95],
            [2, 3, 4, 8],
            [[0.5, 8], [0.5, 4], [0.7, 4]],
            calibration_examples=128,
            test_examples=test,
            gradients=128,
            curvature_layers=layers,
            curvature_examples=16,
            curvature_batch=8,
            predict_examples=16,
            budget_examples=48,
            jobs=0,
        )
    else:
        last = on.blocks()[-1][0]  # its second derivatives need no other block's activations
        found = RunGrid(
            on,
            SPARSEGPT,
            [0.5],
            [3, 4],
            [],
            calibration_examples=32,
            test_examples=min(32, test),
            gradients=128,
            curvature_layers=f"{last}.*",
            curvature_examples=4,
            curvature_batch=1,  # the probabilities of a text's words take more than the block
            predict_examples=0,
            budget_examples=8,
            jobs=1,  # its products are large enough for all threads, and nobody else holds the model
        )
    found = replace(found, **{name: value for name, value in chosen.items() if value})
    if found.test_examples >= test:
        return replace(found, test_examples=test)
    fewer = {name: column[: found.test_examples] for name, column in on.split("test").items()}
    return replace(found, on=on.with_split("test", fewer))
