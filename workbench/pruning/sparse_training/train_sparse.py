"""The `train-sparse` instrument: masks x schedule x trainable parameters x terms x objective x backward,
on one subject.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.pruning.pattern import NM, Tiles, parse
from workbench.pruning.recovery.trainable import parse_blocks
from workbench.pruning.saliency.weights import SALIENCIES
from workbench.pruning.schedule import sparsities
from workbench.pruning.sparse_training import block_movement
from workbench.pruning.sparse_training.plan import SparsePlan
from workbench.pruning.sparse_training.run import Course
from workbench.pruning.sparse_training.trained_masks import Selection, mask_in_force
from workbench.results import Result
from workbench.subjects import Mask, Subject
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
        masks, schedule, terms = self.axis("masks"), self.axis("schedule"), self.axis("terms")
        layers = on.layers(self.layers)
        for split in ("train", self.test_split):
            on.split(split)
        if self.axis("saliency") not in SALIENCIES:
            raise BadInput(
                f"saliency: {self.saliency!r} is not accepted; "
                f"it should be preset or one of {', '.join(SALIENCIES)}"
            )
        if masks == "adaptive" and self.axis("saliency") not in ("magnitude", "wanda"):
            raise BadInput(
                f"saliency: {self.saliency} cannot follow the weights at every step; "
                "adaptive masks take magnitude or wanda"
            )
        if (
            self.allocation == "global"
            and masks in ("static", "regrow")
            and self.axis("saliency") in ("wanda", "obs", "fluctuation", "random")
        ):
            raise BadInput(
                f"allocation: global compares scores across layers and {self.axis('saliency')} scores do "
                "not compare; use layer or a loss-like saliency"
            )
        if masks == "gates":
            block_movement.gate_pattern(self.pattern)
        elif masks not in ("none", "kept", "lifted"):
            form = parse(self.pattern)
            if not isinstance(form, (NM, Tiles)):
                raise BadInput(
                    f"pattern: {self.pattern} spans several matrices; "
                    "prune it with `prune`, or train gates with pattern hybrid 16x16"
                )
            if isinstance(form, NM) and abs(self.sparsity - form.sparsity) > 1e-6 and self.sparsity != 0.5:
                raise BadInput(
                    f"sparsity: {self.sparsity:g} contradicts pattern {self.pattern}, "
                    f"which fixes it at {form.sparsity:g}; leave sparsity out"
                )
            if masks == "regrow" and (isinstance(form, NM) or not form.single):
                raise BadInput(
                    f"pattern: regrow exchanges single weights, so it needs unstructured, not {self.pattern}"
                )
            if (
                isinstance(form, NM)
                and schedule != "from-start"
                and not (schedule == "late" and self.stages > 1)
            ):
                raise BadInput(
                    f"schedule: an N:M pattern has one sparsity, so {schedule} cannot reach it; "
                    "use from-start"
                )
        masked = [
            layer.name for layer in layers if any(isinstance(c, (Mask, Selection)) for c in layer.changes)
        ]
        if masks in ("kept", "lifted") and not masked:
            raise BadInput(
                f"masks: {masks} needs a subject with masks and this one has none; "
                "prune it first, or use static"
            )
        if masks in ("adaptive", "gates", "scores") and masked:
            raise BadInput(
                f"masks: {masked[0]} is masked already; {masks} chooses masks of its own, "
                "so start from the dense subject"
            )
        if (schedule == "cubic") and masks not in ("adaptive", "scores"):
            raise BadInput(
                f"schedule: cubic rises inside the run, which masks {masks} cannot; "
                "use geometric with stages, or `prune` with schedule cubic"
            )
        if schedule in ("geometric", "late") and (masks != "static" or self.stages < 2):
            raise BadInput(
                f"stages: schedule {schedule} prunes from stage to stage; "
                f"it needs masks static and at least 2 stages, not {self.stages}"
            )
        if (self.axis("trainable") == "blocks") != bool(self.blocks):
            raise BadInput(
                f"blocks: {self.blocks!r} with trainable {self.axis('trainable')}; give both or neither"
            )
        if self.blocks:
            parse_blocks(self.blocks, len(on.blocks()))
        if self.axis("backward") == "double-pruned" and not (
            masks in ("static", "kept") and isinstance(parse(self.pattern), NM)
        ):
            raise BadInput(
                "backward: double-pruned needs static masks of an N:M pattern such as 2:4, "
                f"not masks {masks} of {self.pattern}"
            )
        if self.stages > self.steps or (
            self.axis("data") == "megabatches" and self.stages > on.size("train")
        ):
            raise BadInput(f"stages: {self.stages} stages need at least as many steps and training examples")
        if (
            self.axis("backward") == "double-pruned" or terms.endswith("entries") or masks == "scores"
        ) and any(len(a.shape) > 2 for a in layers):
            raise BadInput("layers: stacked experts are not accepted here; choose plain matrices by a glob")

    def _run(self, on: Subject, progress: Progress) -> Result:
        teacher = on.copy() if self.axis("objective") == "distil" else None
        if self.start == "random":
            on = reinitialised(on, self.seed)
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
            if (
                self.axis("masks") == "static"
                and sparsity > 0
                and (stage == 0 or sparsity != planned[stage - 1])
            ):
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
            facts |= on.evaluate(self.test_split, progress=progress)
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
        schedule, form = (
            self.axis("schedule"),
            None if self.axis("masks") in ("none", "kept", "lifted", "gates") else parse(self.pattern),
        )
        target = form.sparsity if isinstance(form, NM) else self.sparsity
        return (
            sparsities(schedule, target, self.stages)
            if schedule in ("geometric", "late")
            else [target] * self.stages
        )
