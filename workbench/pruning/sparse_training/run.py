"""One run of `train-sparse`: what happens to a subject's masks, terms and trainable parameters,
stage by stage and step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from workbench.progress import Progress
from workbench.pruning.calibration import Calibration
from workbench.pruning.engine.matrices import prune_once
from workbench.pruning.pattern import NM, Tiles, parse
from workbench.pruning.recovery.recovery import distilled_loss, merge
from workbench.pruning.recovery.trainable import parse_blocks, set_trainable
from workbench.pruning.schedule import annealed, cubic
from workbench.pruning.sparse_training import block_movement, regrow, side_terms
from workbench.pruning.sparse_training.slope import DoublePruned
from workbench.pruning.sparse_training.trained_masks import (
    AdaptiveMask,
    LowRankScores,
    freeze,
    mask_in_force,
    selection_of,
)
from workbench.subjects import Batch, Layer, Mask, Subject, all_layers
from workbench.training.loop import Training, fit

if TYPE_CHECKING:
    from workbench.pruning.sparse_training.plan import SparsePlan

RECORDS = 50  # times a run that its masks are looked at


class Course:
    """What happens to one subject over a run: its masks, its terms, what learns,
    and the records of all that.
    """

    def __init__(
        self,
        plan: SparsePlan,
        on: Subject,
        layers: Sequence[Layer],
        teacher: Subject | None,
        generator: torch.Generator,
    ) -> None:
        self.plan, self.on, self.layers, self.teacher, self.generator = plan, on, layers, teacher, generator
        self.masks, self.records = plan.axis("masks"), []
        self.last: dict[str, Tensor] = {}
        self.done, self.learning, self.removed = 0, 0, {}  # type: ignore[var-annotated]
        self.backward: DoublePruned | None = None

    records: list[dict[str, float]]
    progress: Progress

    # ---- masks ---------------------------------------------------------------------------------------------
    def prepare(self, sparsity: float) -> None:
        """Put the masks of this run on the layers."""
        plan, form = self.plan, self.masks
        if form == "gates":
            block_movement.attach_gates(self.on, self.layers, plan.pattern, plan.threshold)
        elif form == "adaptive":
            calibration = self._calibration(Progress())
            for layer in self.layers:
                wanda = plan.axis("saliency") == "wanda"
                norm = (
                    calibration.norm(layer)
                    if wanda
                    else torch.ones(1, layer.shape[-1], device=layer.original.device)
                )
                layer.attach(
                    AdaptiveMask(
                        norm[:, None] if len(layer.shape) == 3 and wanda else norm[0], plan.pattern, sparsity
                    )
                )
        elif form == "scores":
            for layer in self.layers:
                out, width = layer.shape
                rank = min(plan.rank, out, width)
                # The product starts at zero and can still learn, as in an adapter; the lines start at zero.
                device, right = (
                    layer.original.device,
                    torch.randn(rank, width, generator=self.generator) / width**0.5,
                )
                zeros = [torch.zeros(shape, device=device) for shape in ((out, rank), (out, 1), (1, width))]
                layer.attach(
                    LowRankScores(zeros[0], right.to(device), zeros[1], zeros[2], plan.pattern, sparsity)
                )
        elif form == "lifted":
            for layer in self.layers:
                for change in [c for c in layer.changes if isinstance(c, Mask)]:
                    layer.write(layer.weight.detach())
                    layer.detach(change)
        elif form == "regrow":
            self.prune(sparsity, Progress())

    def prune(self, sparsity: float, progress: Progress) -> None:
        plan = self.plan
        form = parse(plan.pattern)
        assert isinstance(form, (Tiles, NM))
        prune_once(
            self.layers,
            self._calibration(progress),
            form,
            sparsity,
            plan.axis("saliency"),
            "none",
            plan.axis("allocation"),
            progress,
        )

    def _calibration(self, progress: Progress) -> Calibration:
        plan = self.plan
        split = "calibration" if "calibration" in self.on.splits else "train"
        return Calibration(
            self.on,
            self.layers,
            split,
            plan.calibration_examples,
            plan.gradients,
            seed=plan.seed,
            progress=progress,
        )

    # ---- terms ---------------------------------------------------------------------------------------------
    def add_terms(self, stage: int) -> None:
        """Attach the terms before the first stage; the second mask of a double-pruned backward pass is chosen
        then as well.
        """
        if stage:
            return
        plan, terms = self.plan, self.plan.axis("terms")
        if plan.axis("backward") == "double-pruned":
            form = parse(plan.pattern)
            assert isinstance(form, NM)
            self.backward = DoublePruned(self.layers, form.keep, form.of)
        for layer in self.layers:
            if terms == "side-blocks":
                mask = mask_in_force(layer)
                weight = (layer.original.mT if layer.transposed else layer.original).detach()
                side_terms.add_blocks(
                    layer,
                    torch.ones_like(weight, dtype=torch.bool) if mask is None else mask,
                    weight,
                    plan.group,
                )
            if terms == "side-low-rank+entries":
                side_terms.add_entries(layer, plan.rank, plan.entries, plan.support, self.generator)
        if terms in ("low-rank", "side-low-rank", "side-low-rank+entries"):
            side_terms.add_low_rank(
                self.layers, plan.rank, terms != "low-rank", self.generator, off=self.backward is not None
            )

    # ---- training ------------------------------------------------------------------------------------------
    def train(self, stage: int, progress: Progress) -> dict[str, Any]:
        """One stage; returns its row of the table of stages, with the history of its steps."""
        plan, self.progress = self.plan, progress
        chosen = parse_blocks(plan.blocks, len(self.on.blocks())) if plan.blocks else ()
        learning = set_trainable(self.on, plan.axis("trainable"), chosen, plan.seed + stage)
        self.learning = sum(p.numel() for p in learning)
        steps = [len(part) for part in np.array_split(np.arange(plan.steps), plan.stages)][stage]
        on = (
            megabatch(self.on, stage, plan.stages, plan.replay)
            if plan.axis("data") == "megabatches"
            else self.on
        )
        before = [self.exchange] if self.masks == "regrow" else []
        run = fit(
            on,
            steps=steps,
            batch_size=plan.batch_size,
            learning_rate=plan.lr,
            optimizer=self.optimizer,
            weight_decay=0.0,
            loss=self.loss,
            seed=plan.seed + stage,
            before_step=before,
            callbacks=[self.after_step],
            progress=progress,
        )
        history = run.history.assign(stage=stage)
        if len(history):
            history["step"] += self.done - run.step
        row = {
            "stage": stage,
            "sparsity": self.sparsity(),
            "learning": self.learning,
            "diverged": run.diverged,
            "history": history.to_dict("list"),
        }
        return (
            row
            if run.diverged or plan.stages == 1 or progress.stopped
            else row | self.on.evaluate(plan.test_split)
        )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW without decay; trained scores have a rate of their own."""
        scores = {
            id(p) for layer in self.layers if (s := selection_of(layer)) is not None for p in s.parameters()
        }
        every = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in every if id(p) not in scores], "lr": self.plan.lr},
            {"params": [p for p in every if id(p) in scores], "lr": self.plan.score_lr},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)

    def loss(self, on: Subject, batch: Batch) -> Tensor:
        plan = self.plan
        compute: Callable[[], Tensor] = (
            (lambda: on.loss(batch))
            if self.teacher is None
            else (lambda: distilled_loss(on, self.teacher, batch, hidden_states=False))  # type: ignore[arg-type]
        )
        if self.backward is not None:
            with self.backward:
                return compute()
        return (
            compute() + plan.penalty * block_movement.open_share(self.layers)
            if self.masks == "gates"
            else compute()
        )

    def exchange(self, run: Training) -> None:
        """Prune and regrow before a step: at every period, none in the last quarter,
        so that what came back can learn.
        """
        plan, last = self.plan, max(int(0.75 * self.plan.steps), 1)
        if self.done == 0 or self.done % plan.period or self.done >= last:
            return
        columns, generator = (
            run.subject.split("train"),
            torch.Generator().manual_seed(plan.seed * 1_000_003 + self.done),
        )
        index = torch.randperm(run.subject.size("train"), generator=generator)[: plan.batch_size]
        if plan.regrow_by == "gradient":
            batch = {k: v[index].to(run.subject.device) for k, v in columns.items()}
            wanted = {
                name: g.abs() for name, g in regrow.dense_gradients(run.subject, self.layers, batch).items()
            }
        else:
            wanted = {
                layer.name: torch.rand(layer.shape, generator=generator).to(layer.original.device)
                for layer in self.layers
            }
        regrow.exchange(
            self.layers, wanted, regrow.exchanged_share(plan.exchanged, self.done, last), run.optimizer
        )

    def after_step(self, run: Training) -> None:
        """Move what moves with the step: the ramp of chosen masks, the pull on what they prune,
        lazy adapters; keep a record.
        """
        plan = self.plan
        self.done += 1
        share = self.done / plan.steps
        for layer in self.layers:
            selection = selection_of(layer)
            if isinstance(selection, AdaptiveMask):
                selection.decay = annealed(plan.decay, share)
            if selection is not None and plan.axis("schedule") == "cubic":
                selection.sparsity = cubic(
                    0.0, plan.sparsity, min(round(share * 1000), 700), 700
                )  # the last three tenths at full sparsity
        if self.backward is not None and share >= 1 - plan.lazy:
            side_terms.let_in(self.layers)
        if self.done % max(plan.steps // RECORDS, 1) == 0 or self.done == plan.steps:
            self.record()
            if type(self.progress).preview is not Progress.preview:
                self.progress.preview(
                    plan.result(
                        run.history,
                        {"steps": self.done},
                        tables={"masks": pd.DataFrame(self.records)},
                        partial=True,
                    )
                )

    # ---- records -------------------------------------------------------------------------------------------
    def record(self) -> None:
        now = {layer.name: mask for layer in self.layers if (mask := mask_in_force(layer)) is not None}
        weights = max(sum(m.numel() for m in now.values()), 1)
        moved = sum(
            int((m != self.last[n]).sum())
            for n, m in now.items()
            if n in self.last and self.last[n].shape == m.shape
        )
        self.records.append({"step": self.done, "sparsity": self.sparsity(now), "moved": moved / weights})
        self.last = {name: mask.clone() for name, mask in now.items()}

    def sparsity(self, masks: dict[str, Tensor] | None = None) -> float:
        """Share of the layers' weights that their masks remove now."""
        masks = (
            masks
            if masks is not None
            else {layer.name: m for layer in self.layers if (m := mask_in_force(layer)) is not None}
        )
        return sum(int((~m).sum()) for m in masks.values()) / sum(
            layer.original.numel() for layer in self.layers
        )

    def densities(self, masks: dict[str, Tensor | None]) -> pd.DataFrame:
        return pd.DataFrame(
            [
                {
                    "layer": n,
                    "weights": m.numel() if m is not None else 0,
                    "density": float(m.float().mean()) if m is not None else 1.0,
                }
                for n, m in masks.items()
            ]
        )

    def finish(self) -> None:
        """Masks become plain ones, adapters under them are merged,
        and what gates have emptied is taken out.
        """
        for layer in self.layers:
            freeze(layer)
            merge(layer)
        self.final = self.sparsity()
        self.weights = sum(layer.original.numel() for layer in self.layers)
        self.side = side_terms.side_parameters(self.layers)
        if self.masks == "gates" and block_movement.hybrid_tiles(self.plan.pattern) is not None:
            self.removed = block_movement.remove_dead(self.on)

    def facts(self) -> dict[str, Any]:
        plan = self.plan
        mean = float(np.mean([r["sparsity"] for r in self.records])) if self.records else self.final
        found: dict[str, Any] = {
            "sparsity": self.final,
            "steps": self.done,
            "weights": self.weights,
            "nonzero": round(self.weights * (1 - self.final)),
            "side_parameters": self.side,
            "trained_parameters": self.learning,
            # Multiply-adds of the matrices in training as a share of the dense model's,
            # were every masked product skipped.
            "matmul_share": 1
            - mean * self.weights / max(sum(layer.original.numel() for layer in all_layers(self.on.model)), 1)
            if not self.removed
            else 1 - mean,
            "composition": " x ".join(
                f"{plan.axis(name)}"
                for name in ("masks", "schedule", "trainable", "terms", "objective", "backward")
            ),
        }
        for kind in ("heads", "neurons"):
            gone = sum(
                int((~kept).sum())
                for name, kept in self.removed.items()
                if (("att" in name.lower()) == (kind == "heads"))
            )
            if self.masks == "gates" and block_movement.hybrid_tiles(plan.pattern) is not None:
                found[f"removed_{kind}"] = gone
        return found


def megabatch(on: Subject, index: int, count: int, replay: bool) -> Subject:
    """The same model with one of `count` consecutive parts of the training split,
    or with all parts up to it.
    """
    bounds = np.linspace(0, on.size("train"), count + 1).round().astype(int)
    first = 0 if replay else int(bounds[index])
    part = {key: value[first : int(bounds[index + 1])] for key, value in on.split("train").items()}
    return on.with_split("train", part)
