"""The `train-sparse` instrument: masks x schedule x trainable parameters x terms x objective x backward,
on one subject.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from workbench.errors import BadInput
from workbench.measures.reference import measured_beside, reference_of
from workbench.progress import Progress
from workbench.pruning.axes import SALIENCY, SPARSITY_ALLOCATION, SPARSITY_SCHEDULE, scores_weights
from workbench.pruning.pattern import NM, Tiles
from workbench.pruning.recovery.trainable import parse_blocks
from workbench.pruning.sparse_training import block_movement
from workbench.pruning.sparse_training.plan import SparsePlan
from workbench.pruning.sparse_training.run import Course
from workbench.pruning.sparse_training.trained_masks import Selection, mask_in_force
from workbench.results import Result
from workbench.subjects import Layer, Mask, Subject
from workbench.training.sweep.objective import reinitialised


class TrainSparse(SparsePlan):
    """Train with masks: kept, lifted, chosen at every step, learned, or pruned and regrown;
    all parameters or a part of them.
    """

    changes_model: ClassVar[bool] = True
    summary_line: ClassVar[str] = (
        "train with masks that stay, move or are learned; choose what is trainable and what stands beside "
        "the sparse weights"
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        from workbench.pruning.sparse_training.train_sparse_result import TrainSparseResult

        return TrainSparseResult

    def check(self, on: Any) -> None:
        layers = on.layers(self.layers)
        for split in ("train", self.test_split):
            on.split(split)
        self._check_saliency()
        self._check_pattern()
        self._check_masks(layers)
        self._check_schedule()
        if self.trainable == "blocks":
            if not self.trainable.options.blocks:
                raise BadInput("trainable.blocks: is empty with trainable blocks; give numbers such as 0,2")
            parse_blocks(self.trainable.options.blocks, len(on.blocks()))
        if self.stages > self.steps or (self.portion.has("parts") and self.stages > on.size("train")):
            raise BadInput(f"stages: {self.stages} stages need at least as many steps and training examples")

    def _check_saliency(self) -> None:
        saliency, masks = self.saliency, self.masks
        if not scores_weights(saliency) or saliency.entry.needs == "training":
            known = [
                name
                for name, entry in SALIENCY.entries.items()
                if scores_weights(SALIENCY.chosen(name)) and entry.needs != "training"
            ]
            raise BadInput(f"saliency: {saliency} chooses no mask before training; choose {', '.join(known)}")
        if masks == "adaptive" and not saliency.has("follows weights"):
            raise BadInput(
                f"saliency: {saliency} cannot follow the weights at every step; adaptive masks take "
                f"{' or '.join(SALIENCY.with_trait('follows weights'))}"
            )
        if self.allocation.has("structures") and not self.allocation.has("weights"):
            raise BadInput(
                f"allocation: {self.allocation} shares out heads and neurons; choose "
                f"{', '.join(SPARSITY_ALLOCATION.with_trait('weights'))}"
            )
        if masks.has("made") and saliency.has("not across layers") and self.compares_layers_by_itself():
            raise BadInput(
                f"allocation: {self.allocation} compares scores across layers and {saliency} scores do "
                "not compare; use layer or a loss-like saliency"
            )

    def _check_pattern(self) -> None:
        masks, form = self.masks, self.pattern()
        if masks.has("tiles"):
            block_movement.gate_pattern(str(self.pattern))
            return
        if masks.has("given"):
            return
        if not isinstance(form, (NM, Tiles)):
            raise BadInput(
                f"pattern: {self.pattern} spans several matrices; "
                "prune it with `prune`, or train gates with pattern hybrid 16x16"
            )
        if form.fixed is not None and not math.isclose(self.sparsity, form.fixed, abs_tol=1e-6):
            raise BadInput(
                f"sparsity: {self.sparsity:g} contradicts pattern {self.pattern}, "
                f"which fixes it at {form.fixed:g}; leave sparsity out"
            )
        if masks == "regrow" and (form.fixed is not None or not form.single):
            raise BadInput(
                f"pattern: regrow exchanges single weights, so it needs unstructured, not {self.pattern}"
            )
        late = self.sparsity_schedule == "late" and self.stages > 1
        if form.fixed is not None and not self.sparsity_schedule.has("at once") and not late:
            raise BadInput(
                f"sparsity_schedule: an N:M pattern has one sparsity, not a {self.sparsity_schedule} one; "
                "use from-start"
            )

    def _check_masks(self, layers: Sequence[Layer]) -> None:
        masks = self.masks
        masked = [
            layer.name for layer in layers if any(isinstance(c, (Mask, Selection)) for c in layer.changes)
        ]
        if masks in ("kept", "lifted") and not masked:
            raise BadInput(
                f"masks: {masks} needs a subject with masks and this one has none; "
                "prune it first, or use static"
            )
        if masks.has("moving") and masked:
            raise BadInput(
                f"masks: {masked[0]} is masked already; {masks} chooses masks of its own, "
                "so start from the dense subject"
            )
        if self.backward.has("n:m") and not (masks in ("static", "kept") and isinstance(self.pattern(), NM)):
            raise BadInput(
                f"backward: {self.backward} needs static masks of an N:M pattern such as 2:4, "
                f"not masks {masks} of {self.pattern}"
            )
        if (self.backward.has("n:m") or self.terms.has("entries") or masks == "scores") and any(
            len(a.shape) > 2 for a in layers
        ):
            raise BadInput("layers: stacked experts are not accepted here; choose plain matrices by a glob")

    def _check_schedule(self) -> None:
        masks, schedule = self.masks, self.sparsity_schedule
        if not schedule.has("stages") and not schedule.has("inside a stage"):
            raise BadInput(
                f"sparsity_schedule: {schedule} counts the events of `prune`; choose "
                f"{', '.join(SPARSITY_SCHEDULE.with_trait('stages'))} or cubic"
            )
        if schedule.has("inside a stage"):
            if not masks.has("moving") or masks.has("tiles"):
                raise BadInput(
                    f"sparsity_schedule: {schedule} rises inside the run, which masks {masks} cannot; "
                    "use geometric with stages, or `prune` with sparsity_schedule cubic"
                )
            if schedule.options != type(schedule.options)():
                raise BadInput(
                    f"sparsity_schedule.events: here {schedule} rises at every step; leave its options out"
                )
        elif not schedule.has("at once") and (masks != "static" or self.stages < 2):
            raise BadInput(
                f"stages: sparsity_schedule {schedule} prunes from stage to stage; "
                f"it needs masks static and at least 2 stages, not {self.stages}"
            )

    def _run(self, on: Subject, progress: Progress) -> Result:
        teacher = on.copy() if self.objective.has("teacher") else None
        reference = None
        if self.start == "random":
            on = reinitialised(on, self.seed)
        else:
            reference = reference_of(on, self.test_split, progress=progress, changing=True)
        was = {name: p.requires_grad for name, p in on.model.named_parameters()}
        layers = on.layers(self.layers)
        generator = torch.Generator().manual_seed(self.seed)
        planned = self._planned()
        course = Course(self, on, layers, teacher, generator)
        course.prepare(planned[0])
        learned: list[dict[str, Any]] = []
        for stage, sparsity in enumerate(planned):
            if progress.stopped or (learned and learned[-1].get("diverged")):
                break
            if self.masks == "static" and sparsity > 0 and (stage == 0 or sparsity != planned[stage - 1]):
                course.prune(sparsity, progress)
            course.add_terms(stage)
            learned.append(course.train(stage, progress))
        course.finish()
        for name, weight in on.model.named_parameters():
            weight.requires_grad_(was.get(name, True))
        table = (
            pd.concat([pd.DataFrame(row.pop("history")) for row in learned], ignore_index=True)
            if learned
            else pd.DataFrame()
        )
        facts = course.facts() | {"diverged": any(row["diverged"] for row in learned)}
        stages = pd.DataFrame(learned)
        if not progress.stopped and not facts["diverged"]:
            facts |= measured_beside(reference, on, self.test_split, progress=progress)
        if self.stages > 1 and "accuracy" in stages:
            facts["cumulative_error"] = float((1 - stages.accuracy).sum())
        final = {layer.name: mask_in_force(layer) for layer in on.layers(self.layers)}
        arrays = {
            name: np.packbits(mask.cpu().numpy(), axis=-1) for name, mask in final.items() if mask is not None
        }
        return self.result(
            table,
            facts,
            tables={
                "stages": stages,
                "masks": pd.DataFrame(course.records),
                "layers": course.densities(final),
            },
            arrays=arrays,
            subject=on,
        )

    def _planned(self) -> list[float]:
        """The sparsity of plain masks in every stage."""
        inside = self.sparsity_schedule.has("inside a stage")
        return [self.sparsity] * self.stages if inside else self.sparsity_schedule(self.sparsity, self.stages)
