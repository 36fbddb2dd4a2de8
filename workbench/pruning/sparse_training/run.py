"""One run of `train-sparse`: what happens to a subject's masks, terms and trainable parameters,
stage by stage and step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from workbench.progress import Progress
from workbench.pruning.axes import COMPENSATION
from workbench.pruning.calibration import Calibration
from workbench.pruning.engine.weights import prune_once
from workbench.pruning.pattern import NM, Tiles
from workbench.pruning.recovery.recovery import merge
from workbench.pruning.schedule import annealed, cubic
from workbench.pruning.sparse_training import block_movement, regrow, side_terms
from workbench.pruning.sparse_training.slope import DoublePruned
from workbench.pruning.sparse_training.trained_masks import (
    AdaptiveMask,
    freeze,
    mask_in_force,
    selection_of,
)
from workbench.subjects import Batch, Layer, Mask, Subject, all_layers
from workbench.training.chosen import chosen_settings
from workbench.training.loop import Training, fit
from workbench.training.optimizer.optimizers import make_optimizer
from workbench.training.resume import remembered

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
        self.masks, self.records = plan.masks, []
        self.last: dict[str, Tensor] = {}
        self.done, self.learning, self.removed = 0, 0, {}  # type: ignore[var-annotated]
        self.backward: DoublePruned | None = None

    records: list[dict[str, float]]
    progress: Progress

    # ---- masks ---------------------------------------------------------------------------------------------
    def prepare(self, sparsity: float) -> None:
        """Put the masks of this run on the layers."""
        self.masks(self, sparsity)

    def prune(self, sparsity: float, progress: Progress) -> None:
        found = remembered("masks", lambda: self.pruned(sparsity, progress))
        for layer in self.layers:
            if layer.name in found:
                layer.attach(Mask(found[layer.name].to(layer.original.device)))

    def pruned(self, sparsity: float, progress: Progress) -> dict[str, Tensor]:
        """The masks of the layers at this sparsity, which are on them."""
        plan, form = self.plan, self.plan.pattern()
        assert isinstance(form, (Tiles, NM))
        prune_once(
            self.layers,
            self.calibration(progress),
            form,
            sparsity,
            plan.saliency,
            COMPENSATION.chosen("none"),
            plan.allocation,
            progress,
        )
        return {
            layer.name: change.mask
            for layer in self.layers
            for change in layer.changes
            if isinstance(change, Mask)
        }

    def calibration(self, progress: Progress) -> Calibration:
        plan = self.plan
        split = "calibration" if "calibration" in self.on.splits else "train"
        return Calibration(self.on, self.layers, split, plan.calibration_examples, plan.seed, progress)

    # ---- terms ---------------------------------------------------------------------------------------------
    @property
    def late(self) -> bool:
        """Whether adapters wait until the last steps of a double-pruned run."""
        return self.backward is not None

    def add_terms(self, stage: int) -> None:
        """Attach the terms before the first stage; the second mask of a double-pruned backward pass is chosen
        then as well.
        """
        if stage:
            return
        self.backward = self.plan.backward(self.layers, self.plan.pattern())
        self.plan.terms(self)

    # ---- training ------------------------------------------------------------------------------------------
    def train(self, stage: int, progress: Progress) -> dict[str, Any]:
        """One stage; returns its row of the table of stages, with the history of its steps."""
        plan, self.progress = self.plan, progress
        learning = plan.trainable(self.on, plan.seed + stage)
        self.learning = sum(p.numel() for p in learning)
        steps = [len(part) for part in np.array_split(np.arange(plan.steps), plan.stages)][stage]
        on = plan.portion(self.on, stage, plan.stages)
        before = [self.exchange] if self.masks == "regrow" else []
        before += [self.lead_adapters] if self.lazy_adapters() else []
        run = fit(
            on,
            steps=steps,
            batch_size=plan.batch_size,
            loss=self.loss,
            clipped=lambda: learning,
            seed=plan.seed + stage,
            before_step=before,
            callbacks=[self.after_step],
            keeps=[self],
            progress=progress,
            weight_decay=0.0,
            **(chosen_settings(plan) | {"optimizer": self.optimizer, "learning_rate": plan.learning_rate}),
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
        """AdamW without decay unless another is chosen; trained scores and lazy adapters have rates of their
        own.
        """
        rate = self.plan.learning_rate
        scores = {
            id(p) for layer in self.layers if (s := selection_of(layer)) is not None for p in s.parameters()
        }
        lazy = {id(p) for p in self.lazy_adapters()}
        learning = [p for p in model.parameters() if p.requires_grad]
        own = [
            (
                [p for p in learning if id(p) in scores],
                getattr(self.plan.masks.options, "learning_rate", rate),
            ),
            ([p for p in learning if id(p) in lazy], rate),
        ]
        apart = [p for parameters, _ in own for p in parameters]
        for parameter in apart:  # so that the optimizer is built on the others
            parameter.requires_grad_(False)
        made = make_optimizer(self.plan.optimizer, rate)(model)
        for parameter in apart:
            parameter.requires_grad_(True)
        first = {key: value for key, value in made.param_groups[0].items() if key != "params"}
        for parameters, peak in own:
            if parameters:
                made.add_param_group({**first, "params": parameters, "lr": peak, "weight_decay": 0.0})
        return made

    def lazy_adapters(self) -> list[nn.Parameter]:
        """What waits for the last steps of a double-pruned run."""
        if not self.late:
            return []
        return [
            p
            for layer in self.layers
            for change in layer.changes
            if isinstance(change, side_terms.SideLowRank)
            for p in change.parameters()
        ]

    def lead_adapters(self, run: Training) -> None:
        """Before a step: lazy adapters wait, with nothing in the optimizer, and then learn at a rate that
        falls from the run's peak to zero over their own steps. The run's own rate has fallen by then.
        """
        waiting = self.lazy_adapters()
        left = side_terms.lazy_share(self.done, self.plan.steps, self.plan.backward.options.lazy)
        if not left:
            for parameter in waiting:
                parameter.grad = None
        known = {id(p) for p in waiting}
        for group in run.optimizer.param_groups:
            if any(id(p) in known for p in group["params"]):
                group["lr"] = self.plan.learning_rate * left

    def loss(self, on: Subject, batch: Batch) -> Tensor:
        plan = self.plan
        if self.backward is not None:
            with self.backward:
                return plan.objective(on, self.teacher, batch)
        found: Tensor = plan.objective(on, self.teacher, batch)
        if self.masks == "gates":
            found = found + self.masks.options.penalty * block_movement.open_share(self.layers)
        return found

    def exchange(self, run: Training) -> None:
        """Prune and regrow before a step: at every period, none in the last quarter,
        so that what came back can learn.
        """
        plan, last = self.plan, max(int(0.75 * self.plan.steps), 1)
        if self.done == 0 or self.done % self.masks.options.period or self.done >= last:
            return
        columns, generator = (
            run.subject.split("train"),
            torch.Generator().manual_seed(plan.seed * 1_000_003 + self.done),
        )
        index = torch.randperm(run.subject.size("train"), generator=generator)[: plan.batch_size]
        if self.masks.options.regrow_by == "gradient":
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
            self.layers,
            wanted,
            regrow.exchanged_share(self.masks.options.exchanged, self.done, last),
            run.optimizer,
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
                selection.decay = annealed(self.masks.options.decay, share)
            if selection is not None and plan.sparsity_schedule.has("inside a stage"):
                selection.sparsity = cubic(
                    0.0, plan.sparsity, min(round(share * 1000), 700), 700
                )  # the last three tenths at full sparsity
        if self.backward is not None and side_terms.lazy_share(
            self.done, plan.steps, plan.backward.options.lazy
        ):
            side_terms.let_in(self.layers)
        if self.done % max(plan.steps // RECORDS, 1) == 0 or self.done == plan.steps:
            self.record()
            if self.progress.watched:
                self.progress.preview(
                    plan.result(
                        run.history,
                        {"steps": self.done},
                        tables={"masks": pd.DataFrame(self.records)},
                        partial=True,
                    )
                )

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "records": self.records, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done, self.records = state_dict["done"], list(state_dict["records"])
        self.last = {name: mask.to(self.on.device) for name, mask in state_dict["last"].items()}

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
        if self.masks == "gates" and block_movement.hybrid_tiles(str(self.plan.pattern)) is not None:
            self.removed = block_movement.remove_dead(self.on)

    def facts(self) -> dict[str, Any]:
        plan = self.plan
        mean = float(np.mean([r["sparsity"] for r in self.records])) if self.records else self.final
        if self.backward is not None:  # one product of three, dX, sees the zeros of the second mask as well
            mean += sum(int(gone.sum()) for gone in self.backward.dropped.values()) / self.weights / 3
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
                str(getattr(plan, name))
                for name in ("masks", "sparsity_schedule", "trainable", "terms", "objective", "backward")
            ),
        }
        for kind in ("heads", "neurons"):
            gone = sum(
                int((~kept).sum())
                for name, kept in self.removed.items()
                if (("att" in name.lower()) == (kind == "heads"))
            )
            if self.masks == "gates" and block_movement.hybrid_tiles(str(plan.pattern)) is not None:
                found[f"removed_{kind}"] = gone
        return found
