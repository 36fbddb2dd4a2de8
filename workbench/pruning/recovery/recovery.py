"""Recovery: training after and between pruning steps, with the masks in force,
so that what is zero stays zero.

finetune   all weights but the embeddings, on the task's loss
distil     the same, plus Kullback-Leibler to the dense model's softened outputs (Hinton et al. 2015) and, for
           models that show them, squared distance of hidden states
low-rank   masked adapters, biases and norms only: W = M * (W_p + B A), merged at the end without losing a
           zero (Zimmer et al. 2023, PERP; Munoz et al. 2024, SQFT's SparsePEFT)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.progress import Progress
from workbench.pruning.recovery.trainable import set_trainable
from workbench.pruning.sparse_training.side_terms import add_low_rank
from workbench.statistics.inputs import block_positions
from workbench.subjects import Batch, Layer, LowRank, Subject
from workbench.subjects.vocabulary import Unspoken
from workbench.training.data_order import WholeBatches
from workbench.training.loop import Training
from workbench.training.optimizer.adamw import adamw as adamw  # what recovery steps with by default
from workbench.training.resume import Stateful
from workbench.training.schedule.rise_and_fall import rise_and_fall as rise_and_fall

#: How recovery trains unless its `settings` say otherwise.
SETTINGS: dict[str, Any] = {
    "optimizer": {"name": "adamw", "betas": (0.9, 0.999), "fused": False},
    "schedule": "rise-and-fall",
    "weight_decay": 0.0,
    "clip": 1.0,
}


@dataclass
class Recovery:
    """A training run that is advanced a few steps at a time, between pruning events.

    settings : of the run (`workbench.training.loop.Settings`), where they differ from `SETTINGS`.
    """

    on: Subject
    layers: Sequence[Layer]
    kind: str
    total: int
    learning_rate: float
    batch_size: int = 16
    split: str = "train"
    seed: int = 0
    rank: int = 8
    teacher: Subject | None = None
    temperature: float = 2.0
    progress: Progress = field(default_factory=Progress)
    watch: Callable[[Recovery], None] | None = (
        None  # called about fifty times a run, for whoever wants to see it
    )
    settings: Mapping[str, Any] = field(default_factory=dict)
    owner: Stateful | None = None  # what is between the parts of the run: its state goes with the run's

    def __post_init__(self) -> None:
        self._was = {name: p.requires_grad for name, p in self.on.model.named_parameters()}
        if self.kind == "low-rank":
            add_low_rank(
                self.layers, self.rank, beside=False, generator=torch.Generator().manual_seed(self.seed)
            )
        self.parameters = set_trainable(self.on, "adapters" if self.kind == "low-rank" else "body")
        given: dict[str, Any] = {
            "steps": self.total,
            "batch_size": min(self.batch_size, self.on.size(self.split)),
            "learning_rate": self.learning_rate,
            "split": self.split,
            "order": WholeBatches(self.seed),
            "own_generator": False,
            "evaluate_split": "",
            "loss": self.loss,
            "callbacks": [self._watched],
            "keeps": [] if self.owner is None else [self.owner],
            "progress": self.progress,
            "label": f"recovery {self.kind}",
        }
        self.run = Training.start(self.on, **(SETTINGS | given | dict(self.settings)))

    def changed(self) -> None:
        """The model was pruned between two parts of the run."""
        self.run.changed()

    @property
    def done(self) -> int:
        """Steps done, those skipped included, but not those that a checkpoint has brought too early."""
        return self.run.step - self.run.ahead

    def skip(self, steps: int) -> None:
        """Go on with the schedule of a run whose first steps another recovery has done."""
        self.run.skip(steps)

    @property
    def curve(self) -> list[dict[str, float]]:
        """Step and loss of every step."""
        return [{"step": float(row["step"]), "loss": row["loss"]} for row in self.run.rows]

    @property
    def trainable_share(self) -> float:
        """Trained parameters as a share of all."""
        return sum(p.numel() for p in self.parameters) / sum(p.numel() for p in self.on.model.parameters())

    def loss(self, on: Subject, batch: Batch) -> Tensor:
        if self.kind != "distil" or self.teacher is None:
            return on.loss(batch)
        return distilled_loss(on, self.teacher, batch, self.temperature)

    def advance(self, steps: int) -> None:
        """Train so many steps more; stops early, keeping the state, when asked to."""
        self.run.advance(steps)

    def _watched(self, run: Training) -> None:
        if self.watch is not None and run.step % max(self.total // 50, 1) == 0:
            self.watch(self)

    def finish(self) -> None:
        """Merge the adapters into the weights below the masks and leave training mode."""
        self.run.finish()
        if self.kind == "low-rank":
            for layer in self.layers:
                merge(layer)
        for name, parameter in self.on.model.named_parameters():
            parameter.requires_grad_(self._was.get(name, True))
        self.on.model.eval()


def distilled_loss(
    on: Subject, teacher: Subject, batch: Batch, temperature: float = 2.0, hidden_states: bool = True
) -> Tensor:
    """Task's loss + t^2 KL(teacher || student) of outputs softened by t (Hinton et al. 2015)
    + mean relative squared distance of hidden states.
    """
    hidden, taught = HiddenStates(on.model), HiddenStates(teacher.model)
    with hidden:
        output = on.task.deferred(on.model, batch)
    with torch.no_grad(), taught:
        target = teacher.task.deferred(teacher.model, batch)
    t = temperature

    def divergence(rows: Tensor, goals: Tensor) -> Tensor:
        taught_logs = F.log_softmax(goals / t, -1)
        return F.kl_div(F.log_softmax(rows / t, -1), taught_logs, log_target=True, reduction="sum")

    if isinstance(output, Unspoken) and isinstance(target, Unspoken):
        soft = output.total(lambda rows, _, goals: divergence(rows, goals), target) / output.items
    else:
        rows, goals = (on.task.flat(each, batch)[0] for each in (output, target))
        soft = divergence(rows, goals) / len(rows)
    found = on.task.criterion(output, batch) + soft * t * t
    pairs = []
    if hidden_states:
        for name, (a, b) in zip(hidden.names, zip(hidden.states, taught.states, strict=False), strict=False):
            keep = block_positions(on, name, batch)
            if a.shape == b.shape and (keep is None or keep.shape != a.shape[:2]):
                pairs.append((a, b))
            elif a.shape == b.shape:
                pairs.append((a[keep], b[keep]))  # what stands at padding is nobody's
    if pairs:
        match = sum(
            (F.mse_loss(a, b) / b.square().mean().clamp_min(1e-8) for a, b in pairs),
            torch.zeros((), device=found.device),
        )
        found = found + match / len(pairs)
    return found


@torch.no_grad()
def merge(layer: Layer) -> None:
    """Fold a low-rank term into the weight underneath; number formats and masks stay on top,
    so no zero is lost.
    """
    for term in [c for c in layer.changes if type(c) is LowRank]:
        stored = layer.original.detach()
        weight = term.change(stored.mT if layer.transposed else stored)
        layer.detach(term)
        layer.write(weight)


class HiddenStates:
    """Collects the outputs of a model's repeated blocks while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        from workbench.subjects import blocks

        self.blocks = blocks(model)
        self.names: list[str] = []  # of the block that gave each state
        self.states: list[Tensor] = []

    def __enter__(self) -> HiddenStates:
        def watch(name: str, block: nn.Module) -> Any:
            def keep(module: nn.Module, inputs: object, output: object) -> None:
                state = output[0] if isinstance(output, tuple) else output
                if isinstance(state, Tensor):
                    self.names.append(name)
                    self.states.append(state)

            return block.register_forward_hook(keep)

        self._handles = [watch(name, block) for name, block in self.blocks]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
