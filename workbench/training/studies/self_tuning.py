"""The `self-tuning` instrument: weight penalty and dropout learned while the weights are
(MacKay et al. 2019).
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from torch import nn

from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.figures import figure, line
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Batch, Subject
from workbench.training.models.self_tuning import (
    Hyperparameter,
    Loss,
    Setting,
    TunedDropout,
    self_tuning,
    settled,
    squared_weights,
    tune,
)
from workbench.training.sweep.objective import Start, reinitialised


class SelfTuningResult(Result):
    def figure(self, column: str = "l2", **view: Any) -> go.Figure:
        fig = figure("Hyperparameters while they are learned", "round", column.replace("_", " "))
        for name in ("l2", "dropout") if column == "l2" else (column,):
            if name in self.table:
                line(fig, self.table["round"].to_numpy(), self.table[name].to_numpy(), name)
        return fig


class SelfTuning(SubjectInstrument):
    """Train with an L2 penalty and, where the model drops units, their share, both learned on the validation
    split while the weights are; the model comes back at the values it ended on.
    """

    summary_line = "weight penalty and dropout learned in one run, by a best response linear in them"
    changes_model = True

    rounds: int = parameter(300, "rounds of steps on the weights and one on the hyperparameters", ge=1)
    inner_steps: int = parameter(2, "steps on the weights in a round", ge=1)
    warmup_rounds: int = parameter(50, "rounds that leave the hyperparameters alone", ge=0, group="Training")
    batch_size: int = parameter(32, "examples per step", ge=1, le=65536, scale="log")
    learning_rate: float = parameter(1e-3, "learning rate of the weights (Adam)", gt=0, scale="log")
    setting_learning_rate: float = parameter(
        1e-2, "learning rate of the hyperparameters (Adam)", gt=0, scale="log", group="Training"
    )
    l2: float = parameter(1e-4, "weight penalty to begin with", gt=0, scale="log", group="What is tuned")
    dropout: float = parameter(0.1, "share of dropped units to begin with", gt=0, lt=1, group="What is tuned")
    entropy: float = parameter(1e-3, "weight of the entropy of what is tried", ge=0, group="What is tuned")
    start: Start = parameter(
        "random", "start from the subject's weights or from random ones", group="Training"
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        return SelfTuningResult

    def check(self, on: Subject) -> None:
        for split in ("train", "validation"):
            on.split(split)
        if not any(type(module) is nn.Linear for module in on.model.modules()):
            raise BadInput(
                "subject: self-tuning needs nn.Linear layers without masks or number formats, and there are "
                "none; take digits-vit"
            )

    def _run(self, on: Subject, progress: Progress) -> Result:
        mine = reinitialised(on, self.seed) if self.start == "random" else on
        dropped = [
            (parent, name)
            for parent in mine.model.modules()
            for name, child in parent.named_children()
            if type(child) is nn.Dropout
        ]
        wanted = [Hyperparameter("l2", self.l2)]
        wanted += [Hyperparameter("dropout", self.dropout, "fraction")] if dropped else []
        setting = Setting(wanted).to(mine.device)
        before = {place: place[0].get_submodule(place[1]) for place in dropped}
        for parent, name in dropped:
            setattr(parent, name, TunedDropout(setting, "dropout"))
        self_tuning(mine.model, setting)
        mine.model.to(mine.device)

        def task(model: nn.Module, batch: Batch, values: dict[str, Any]) -> Any:
            return mine.loss({k: v.to(mine.device) for k, v in batch.items()})

        def penalised(model: nn.Module, batch: Batch, values: dict[str, Any]) -> Any:
            return task(model, batch, values) + 0.5 * values["l2"] * squared_weights(model)

        training: Loss = penalised
        table = tune(
            mine.model,
            setting,
            mine.split("train"),
            mine.split("validation"),
            training,
            task,
            steps=self.rounds,
            batch_size=self.batch_size,
            lr=self.learning_rate,
            setting_lr=self.setting_learning_rate,
            train_steps=self.inner_steps,
            warmup=self.warmup_rounds,
            entropy_weight=self.entropy,
            seed=self.seed,
            progress=progress,
        )
        settled(mine.model)
        for (parent, name), module in before.items():
            setattr(parent, name, module)
        mine.model.eval()
        facts: dict[str, Any] = {name: float(v.detach()) for name, v in setting.values().items()}
        facts |= {
            f"{split}_{k}": v
            for split in ("validation", "test")
            if split in mine.splits
            for k, v in mine.evaluate(split).items()
        }
        return self.result(table, facts, subject=mine.with_model(mine.model))
