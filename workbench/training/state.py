"""The state of a training run, as callbacks and optimizers see it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from workbench.subjects import Batch, Subject


@dataclass
class TrainingState:
    """What callbacks see of a run, after every optimizer step; they may set `batch_size` and `stop`."""

    subject: Subject
    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler | ReduceLROnPlateau
    steps: int
    batch_size: int
    step: int = 0
    #: Steps among them that another run has done.
    skipped: int = 0
    position: int = 0  # examples seen
    items: int = 0  # targets seen: examples, or tokens of a language model
    stop: bool = False
    diverged: bool = False
    averaged: AveragedModel | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    split: str = "train"
    chosen: Tensor = field(
        default_factory=lambda: torch.empty(0, dtype=torch.int64)
    )  # the examples of the step in progress, of this process

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def batch(self, limit: int | None = None) -> Batch:
        """The examples of the step in progress, on the device; the first `limit` of them."""
        columns = self.subject.split(self.split)
        return {
            k: v.to(self.subject.device)
            for k, v in self.subject.task.trimmed(
                {k: v[self.chosen[:limit]] for k, v in columns.items()}
            ).items()
        }

    @property
    def history(self) -> pd.DataFrame:
        """One row a step: step, examples, items, lr, batch_size, loss, gradient_norm, seconds,
        and validation_* when evaluated.
        """
        return pd.DataFrame(self.rows)

    @property
    def validation(self) -> float:
        """The last validation loss; infinite when the run diverged, NaN when it was never evaluated."""
        if self.diverged:
            return math.inf
        values = [row["validation_loss"] for row in self.rows if "validation_loss" in row]
        return values[-1] if values else math.nan
