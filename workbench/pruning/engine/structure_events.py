"""Pruning of heads and neurons: events of scoring units, sharing out how many each group keeps,
and giving their consumers new weights.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.pruning.axes import (
    COMPENSATION,
    PATTERN,
    SPARSITY_ALLOCATION,
    scores_weights,
    units_of,
)
from workbench.pruning.engine.masked import Masked
from workbench.pruning.engine.structures import (
    Asked,
    Scored,
    groups_of,
    prune_structures,
    score,
    uniform,
)
from workbench.pruning.pattern import Form, Structures
from workbench.subjects import Subject
from workbench.subjects.checkpoint_files import one_line
from workbench.subjects.stored import bytes_of_weights
from workbench.subjects.structure.biases import can_be_given, give_biases
from workbench.subjects.structure.removal import norm_says, remove


class Units(Masked):
    """Masks of whole heads and neurons, which are then taken out of the matrices."""

    pattern: Structures

    def begin(self, on: Subject, progress: Progress) -> None:
        if self.prune.compensation.has("bias"):
            for kind in {group.kind for group in groups_of(on, on.layers(self.prune.layers), self.pattern)}:
                if can_be_given(on.model, kind):
                    give_biases(on.model, kind)
        if self.prune.pattern.options.remove:
            self.try_removal(on)
        self.kept: dict[str, Tensor] = {}
        self.shared: dict[str, float] = {}
        super().begin(on, progress)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"kept": self.kept, "shared": self.shared}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.kept, self.shared = dict(state_dict["kept"]), dict(state_dict["shared"])

    def check(self, on: Any) -> None:
        prune, pattern = self.prune, self.pattern
        saliency, compensation, allocation = prune.saliency, prune.compensation, prune.allocation
        groups = groups_of(on, on.layers(prune.layers), pattern)
        whole = "+".join(pattern.kinds)
        if not compensation.has("structures"):
            others = ", ".join(COMPENSATION.with_trait("structures"))
            raise BadInput(
                f"compensation: {compensation} refits weight by weight along the rows, which whole {whole} "
                f"cut through; use {others}"
            )
        if saliency.entry.needs == "training":
            raise BadInput(
                f"saliency: {saliency} is collected for single weights; use gradient, taylor2 or obs for "
                "heads and neurons"
            )
        if not scores_weights(saliency) and not set(pattern.kinds) <= saliency.entry.traits:
            accepted = " or ".join(sorted(units_of(saliency.entry)))
            raise BadInput(
                f"saliency: {saliency} scores {accepted}, not {whole}; choose another, or that pattern"
            )
        if not allocation.has("structures"):
            others = ", ".join(SPARSITY_ALLOCATION.with_trait("structures"))
            raise BadInput(
                f"allocation: {allocation} is a rule for densities of matrices; for {whole} use {others}"
            )
        if prune.method.has("refines"):
            raise BadInput(
                f"pattern: {prune.method} exchanges single weights, so it needs pattern unstructured"
            )
        for group in groups:
            if group.norm and prune.pattern.options.remove:
                raise BadInput(norm_says(group))
            if group.units == 1 and len(groups) == 1:
                raise BadInput(f"pattern: {group.name} has a single unit of {whole}, which has to stay")
            if saliency.has("one after the other") and len(group.consumers) != 1:
                raise BadInput(
                    f"saliency: {saliency} needs one consumer for each group and {group.name} ties several "
                    "together; use magnitude, wanda or gradient"
                )
            if compensation.has("bias") and any(
                len(m.layer.shape) == 3 or (m.layer.bias is None and not can_be_given(on.model, group.kind))
                for m in group.consumers
            ):
                raise BadInput(
                    f"compensation: bias needs a bias, and the output of {group.name} has none and "
                    f"{type(on.model).__name__} has no place for one; use least-squares or none"
                )

    def try_removal(self, on: Subject) -> None:
        """`BadInput`, before anything is scored or trained, when the model cannot lose the first units of
        every group, as many as are asked for.
        """
        trial = on.copy()
        groups = groups_of(trial, trial.layers(self.prune.layers), self.pattern)
        scored = [
            Scored(g, torch.arange(g.units).expand(g.experts, -1), torch.zeros(g.units + 1)) for g in groups
        ]
        counts = uniform(scored, self.prune.sparsity)
        kept = {s.group.name: s.kept(count) for s, count in zip(scored, counts, strict=True)}
        if not any(counts):
            return
        for group in groups:
            group.mask(kept[group.name])
        remove_alike(trial, kept, self.prune.calibration_split, str(self.prune.pattern))

    def prune_to(self, sparsity: float) -> None:
        prune, progress = self.prune, self.progress
        groups = groups_of(self.on, self.layers, self.pattern)
        scored = [
            score(g, prune.saliency, self.calibration, self.pattern)
            for g in progress.track(groups, f"units by {prune.saliency}")
        ]
        self.kept = {}
        if progress.stopped:
            return
        asked = Asked(
            self.on,
            scored,
            sparsity,
            prune.saliency,
            self.calibration,
            self.pattern.kinds,
            progress,
            self.shared,
        )
        counts = prune.allocation.value.counts(asked, prune.allocation.options)
        self.kept = prune_structures(scored, counts, prune.compensation, self.calibration, progress)

    def removed(self, facts: dict[str, Any]) -> dict[str, pd.DataFrame]:
        prune, on, kept = self.prune, self.on, self.kept
        if not kept:
            return {}
        rows = [{"group": n, "units": k.shape[1], "kept": int(k[0].sum())} for n, k in kept.items()]
        facts |= {
            "units": sum(mask.numel() for mask in kept.values()),
            "units_left": sum(int(mask.sum()) for mask in kept.values()),
        }
        if prune.pattern.options.remove:
            remove_alike(on, kept, prune.calibration_split, str(prune.pattern))
            facts |= self.shared
            facts |= prune.allocation.value.reached(
                self.dense, on, prune.calibration_split, prune.allocation.options
            )
            left = sum(layer.original.numel() for layer in on.layers(prune.layers))
            facts["packed_bytes"] = left * bytes_of_weights(
                on.model, [layer.weight for layer in on.layers(prune.layers)]
            )
        return {"units": pd.DataFrame(rows)}


def remove_alike(on: Subject, kept: dict[str, Tensor], split: str, what: str) -> None:
    """Take the masked units out, and raise `BadInput` when the smaller model does not compute what the
    masked one does on a batch: outputs equal to rounding.
    """
    batch = next(on.batches(split, 2))
    with torch.no_grad():
        masked = on.task.output(on.model, batch)
        try:
            remove(on.model, kept)
            small = on.task.output(on.model, batch)
        except (BadInput, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # another library's model at another size: anything can be raised
            raise BadInput(
                f"pattern: {type(on.model).__name__} cannot compute without the removed {what} "
                f"({one_line(error)}); give pattern.remove false, which masks them"
            ) from error
    if not bool(torch.isfinite(masked).all()):  # says nothing about the removal
        return
    gap, size = float((masked - small).abs().max()), float(masked.abs().max())
    wide = masked.dtype in (torch.float32, torch.float64)
    if not gap <= (1e-3 if wide else 5e-2) * max(size, 1e-6):
        raise BadInput(
            f"pattern: {type(on.model).__name__} without the removed {what} differs from the masked model by "
            f"{gap:.3g} in outputs of up to {size:.3g}; give pattern.remove false, which masks them"
        )


class Removal(Options):
    remove: bool = parameter(
        True, "take what is pruned out of the matrices, so that the model is smaller; otherwise it is masked"
    )


PATTERN.add(
    "heads",
    formula="one attention head in all matrices it spans",
    source="Michel et al. 2019",
    options=Removal,
)(Form(lambda options: Structures(("heads",)), Units))
PATTERN.add(
    "neurons",
    formula="one feed-forward neuron in all matrices it spans",
    source="baseline",
    options=Removal,
)(Form(lambda options: Structures(("neurons",)), Units))
PATTERN.add("heads+neurons", formula="both", source="baseline", options=Removal)(
    Form(lambda options: Structures(("heads", "neurons")), Units)
)
