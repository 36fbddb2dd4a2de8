"""Recovery: training after and between pruning steps, with the masks in force,
so that what is zero stays zero.

finetune   all weights but the embeddings, on the task's loss
distil     the same, plus Kullback-Leibler to the dense model's softened outputs (Hinton et al. 2015) and, for
           models that show them, squared distance of hidden states
low-rank   masked adapters, biases and norms only: W = M * (W_p + B A), merged at the end without losing a
           zero (Zimmer et al. 2023, PERP; Munoz et al. 2024, SQFT's SparsePEFT)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.progress import Progress
from workbench.pruning.recovery.trainable import set_trainable
from workbench.pruning.sparse_training.side_terms import add_low_rank
from workbench.subjects import Batch, Layer, LowRank, Subject
from workbench.subjects.subject import trim
from workbench.subjects.vocabulary import Unspoken

RECOVERIES = ("none", "finetune", "distil", "low-rank")


def random_batches(on: Subject, split: str, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches without end: every example once in an order drawn from `seed`, then again in another order."""
    columns, size = on.split(split), on.size(split)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(size, generator=generator)
        for start in range(0, max(size - batch_size, 0) + 1, batch_size):
            index = order[start : start + batch_size]
            yield {k: v.to(on.device) for k, v in trim({k: v[index] for k, v in columns.items()}).items()}


@dataclass
class Recovery:
    """A training run that is advanced a few steps at a time, between pruning events."""

    on: Subject
    layers: Sequence[Layer]
    kind: str
    total: int
    lr: float
    batch_size: int = 16
    split: str = "train"
    seed: int = 0
    rank: int = 8
    teacher: Subject | None = None
    temperature: float = 2.0
    movement: bool = False
    progress: Progress = field(default_factory=Progress)
    watch: Callable[[Recovery], None] | None = (
        None  # called about fifty times a run, for whoever wants to see it
    )
    curve: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.done = 0
        self.scores: dict[str, Tensor] = {}
        self._was = {name: p.requires_grad for name, p in self.on.model.named_parameters()}
        if self.kind == "low-rank":
            add_low_rank(
                self.layers, self.rank, beside=False, generator=torch.Generator().manual_seed(self.seed)
            )
        self.parameters = set_trainable(self.on, "adapters" if self.kind == "low-rank" else "body")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.lr, weight_decay=0.0)
        self._batches = random_batches(
            self.on, self.split, min(self.batch_size, self.on.size(self.split)), self.seed
        )

    @property
    def trainable_share(self) -> float:
        """Trained parameters as a share of all."""
        return sum(p.numel() for p in self.parameters) / sum(p.numel() for p in self.on.model.parameters())

    def rate(self) -> float:
        """Linear warm-up over a twentieth of the run, then linear decay to zero."""
        warm = max(self.total // 20, 1)
        return min((self.done + 1) / warm, max(self.total - self.done, 0) / max(self.total - warm, 1), 1.0)

    def loss(self, batch: Batch) -> Tensor:
        if self.kind != "distil" or self.teacher is None:
            return self.on.loss(batch)
        return distilled_loss(self.on, self.teacher, batch, self.temperature)

    def advance(self, steps: int) -> None:
        """Train so many steps more; stops early, keeping the state, when asked to."""
        self.on.model.train()
        for _ in self.progress.track(range(steps), f"recovery {self.kind}"):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * self.rate()
            with torch.enable_grad():
                loss = self.loss(next(self._batches))
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            if self.movement:
                self._accumulate()
            self.optimizer.step()
            self.done += 1
            self.curve.append({"step": float(self.done), "loss": float(loss.detach())})
            if self.watch is not None and self.done % max(self.total // 50, 1) == 0:
                self.watch(self)
        self.on.model.eval()

    def _accumulate(self) -> None:
        """Movement scores S = -sum of lr g w over the steps (Sanh et al. 2020):
        weights that move away from zero grow.
        """
        for layer in self.layers:
            parameter = layer.original
            if parameter.grad is not None:
                grown = -self.optimizer.param_groups[0]["lr"] * (parameter.grad * parameter.detach())
                grown = grown.mT if layer.transposed else grown
                self.scores[layer.name] = (
                    self.scores[layer.name] + grown if layer.name in self.scores else grown
                )

    def finish(self) -> None:
        """Merge the adapters into the weights below the masks and leave training mode."""
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
    pairs = (
        [(a, b) for a, b in zip(hidden.states, taught.states, strict=False) if a.shape == b.shape]
        if hidden_states
        else []
    )
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

        self.blocks = [module for _, module in blocks(model)]
        self.states: list[Tensor] = []

    def __enter__(self) -> HiddenStates:
        def keep(module: nn.Module, inputs: object, output: object) -> None:
            state = output[0] if isinstance(output, tuple) else output
            if isinstance(state, Tensor):
                self.states.append(state)

        self._handles = [block.register_forward_hook(keep) for block in self.blocks]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
