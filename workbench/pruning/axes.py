"""The axes of pruning: what is chosen, and where the entries are found.

Entries of an axis have one signature; `options` are the entry's own.

saliency            of single weights: (layer, calibration, pattern, options) -> scores (..., out, in), larger
                    stays, summed over any unit. Of whole units (it has their names as traits): (calibration,
                    groups, options) -> group name -> (experts, units) for heads and neurons; with no groups
                    (hidden,) for channels, (layers, experts) for experts, a score (L,) for each stack of
                    layers.
compensation        (layer, mask, calibration, options) -> new weight (..., out, in)
sparsity-allocation a class, see `workbench.pruning.allocation.shares.Allocation`
sparsity-schedule   (final sparsity, events, options) -> the sparsity after each event
recovery            (on, layers, teacher, options, **fields of a Recovery) -> Recovery or None
pattern             a `workbench.pruning.pattern.Form`
pruning-method      (pattern, options) -> fields that the method fixes unless they are given
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from workbench.axis import Axis, Choice, Entry, Options, parameter
from workbench.errors import BadInput

STRUCTURES = ("heads", "neurons")
DIMENSIONS = ("channels", "layers", "experts")


def units_of(entry: Entry) -> list[str]:
    """The patterns that an entry for whole units has among its traits; none of one for single weights."""
    return [kind for kind in (*STRUCTURES, *DIMENSIONS) if kind in entry.traits]


def such_a_pattern(entry: Entry) -> Mapping[str, Any]:
    return {"pattern": units[0]} if (units := units_of(entry)) else {}


SALIENCY = Axis(
    "saliency",
    "what a weight's removal is thought to cost",
    found_in="workbench.pruning.saliency",
    home="prune.saliency",
    beside=such_a_pattern,
)
COMPENSATION = Axis(
    "compensation",
    "what the survivors do about the removed weights",
    found_in="workbench.pruning.compensation",
)
SPARSITY_ALLOCATION = Axis(
    "sparsity-allocation",
    "how the sparsity is shared among layers or groups",
    found_in="workbench.pruning.allocation",
    home="prune.allocation",
)
SPARSITY_SCHEDULE = Axis(
    "sparsity-schedule",
    "at once, or over several events with the statistics measured anew at each",
    found_in="workbench.pruning.schedule",
    home="prune.sparsity_schedule",
)
RECOVERY = Axis(
    "recovery",
    "training after and between the pruning events, with the masks in force",
    found_in="workbench.pruning.recovery.kinds",
)
PRUNING_METHOD = Axis(
    "pruning-method",
    "published method: fixes saliency, compensation and allocation unless they are given",
    found_in="workbench.pruning.methods",
    home="prune.method",
    beside=such_a_pattern,
)


def pattern_shorthand(text: str) -> Mapping[str, Any] | None:
    """`2:4`, `2:4 outputs`, `block 16x4`, `hybrid 16x16` and `neurons+heads` as name and options."""
    text = text.strip().lower()
    if match := re.fullmatch(r"(\d+):(\d+)( outputs)?", text):
        keep, of = int(match[1]), int(match[2])
        if not 0 < keep < of:
            raise BadInput(f"pattern: {text!r} keeps {keep} of {of}; N:M needs 0 < N < M, such as 2:4")
        return {"name": "n:m", "keep": keep, "of": of, "along": "outputs" if match[3] else "inputs"}
    if match := re.fullmatch(r"(block|hybrid) (\d+)x(\d+)", text):
        rows, columns = int(match[2]), int(match[3])
        if not rows or not columns:
            raise BadInput(
                f"pattern: {text!r} has an empty block; give positive sizes, such as {match[1]} 16x16"
            )
        return {"name": match[1], "rows": rows, "columns": columns}
    name = "heads+neurons" if text == "neurons+heads" else text
    return {"name": name} if name in PATTERN else None


PATTERN = Axis(
    "pattern",
    "what goes together: unstructured, 2:4, 2:4 outputs, block 16x16, row, column, heads, neurons, "
    "heads+neurons, channels, layers, experts",
    found_in=("workbench.pruning.engine", "workbench.pruning.sparse_training.block_movement"),
    shorthand=pattern_shorthand,
    home="prune.pattern",
)


class Gradients(Options):
    """Options of everything that is measured with gradients of the calibration examples."""

    gradients: int = parameter(256, "gradients that are measured", ge=1)
    gradient_batch: int = parameter(
        1, "examples averaged in each gradient (1: per-example gradients)", ge=1, unit="examples"
    )


class Damped(Options):
    """Options of everything that inverts a layer's second moment of inputs."""

    damp: float = parameter(
        0.01, "added to the diagonal of the Hessian, as a share of its mean diagonal", gt=0, scale="log"
    )


class BlockFisher(Gradients):
    """Options of everything that inverts the block-diagonal empirical Fisher."""

    damp: float = parameter(
        0.01, "added to the diagonal of the Fisher, as a share of its mean diagonal", gt=0, scale="log"
    )
    block: int = parameter(50, "weights in one block of the Fisher", ge=1)


def scores_weights(saliency: Choice) -> bool:
    """True for a saliency of single weights, False for one that scores only whole units."""
    return not units_of(saliency.entry)
