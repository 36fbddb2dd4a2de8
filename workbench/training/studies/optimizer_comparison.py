"""Fair comparisons of schedules and of optimizers: equal tuning, end-of-schedule losses, seeds,
and costs beside the losses.

Each candidate's peak learning rate is tuned on validation at the first seed with as many runs as every
other's; the best one is run at all seeds, and the test loss of those is what is compared
(Wen et al. 2025; Kaddour et al. 2023).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.results import Result
from workbench.scaling.hyperparameters import speedup
from workbench.subjects import Subject
from workbench.training.optimizer.optimizers import OPTIMIZERS
from workbench.training.studies.comparison import (
    Comparison,
    ComparisonResult,
    curve_table,
    leaderboard,
    rank_flips,
    tuning_table,
)
from workbench.training.studies.train import ScheduleName, names


class OptimizerComparison(Comparison):
    """Optimizers at equal tuning budgets and fully decayed learning rates,
    on the same data order and initial weights.
    """

    summary_line = (
        "optimizers at equal tuning: test loss with intervals, tokens saved against AdamW, rank flips, "
        "state bytes"
    )

    optimizers: str = parameter(
        "adamw,sgd,lamb,lion,muon,soap", f"comma-separated, of {', '.join(OPTIMIZERS)}", min_length=1
    )
    schedule: ScheduleName = parameter("cosine", "learning-rate schedule of every run")
    baseline_budgets: tuple[float, ...] = parameter(
        (),
        "further budgets, as multiples of the examples, at which AdamW is run too, "
        "for the speed-up of the others; at least 3",
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        return ComparisonResult

    def check(self, on: Subject) -> None:
        super().check(on)
        chosen = names(self.optimizers, tuple(OPTIMIZERS), "optimizers")
        if self.baseline_budgets and (
            "adamw" not in chosen
            or len({1.0, *self.baseline_budgets}) < 4
            or min(self.baseline_budgets) * self.examples < self.batch_size
        ):
            raise BadInput(
                f"baseline_budgets: {self.baseline_budgets} with {self.optimizers} is not accepted; "
                "AdamW must be among the optimizers, and its curve "
                "needs at least three budgets other than 1, each of a step or more"
            )

    def _run(self, on: Subject, progress: Progress) -> Result:
        chosen = names(self.optimizers, tuple(OPTIMIZERS), "optimizers")
        labels = [*chosen, *(f"adamw at {budget:g}" for budget in self.baseline_budgets)]
        candidates: list[dict[str, Any]] = [{"optimizer": name, "schedule": self.schedule} for name in chosen]
        candidates += [
            {"optimizer": "adamw", "schedule": self.schedule, "examples": round(budget * self.examples)}
            for budget in self.baseline_budgets
        ]
        tuning, finals = self.protocol(
            on, progress, candidates, [OPTIMIZERS[c["optimizer"]].lr for c in candidates], labels
        )
        everything = leaderboard(finals, [{"name": name} for name in labels], tuning, self.level)
        facts: dict[str, Any] = {"runs": len(tuning) + len(finals)}
        curves = curve_table(finals[finals.candidate < len(chosen)] if len(finals) else finals, chosen)
        table = everything[everything.name.isin(chosen)] if len(everything) else everything
        if len(table):
            table = table.sort_values("test", ignore_index=True)
            facts |= {
                "best": table.name[0],
                "best_test": table.test[0],
                "lr_spread": float(table.lr.max() / table.lr.min()),
                "rank_flips": rank_flips(curves),
            }
            if "adamw" in set(table.name):
                base = float(table.set_index("name").test["adamw"])
                table["above_adamw"] = table.test - base
            if self.baseline_budgets:
                reached = everything.set_index("name").test
                sizes = np.array([1.0, *self.baseline_budgets]) * self.examples
                baseline = pd.DataFrame(
                    {"tokens": sizes, "loss": reached[["adamw", *labels[len(chosen) :]]].to_numpy(float)}
                )
                found = speedup(
                    baseline, np.full(len(table), float(self.examples)), table.test.to_numpy(float), self.seed
                )
                table["speedup"], table["extrapolated"] = (
                    found.speedup.to_numpy(),
                    found.extrapolated.to_numpy(),
                )
                facts["best_speedup"] = float(table.speedup[0])
        return self.result(table, facts, tables={"tuning": tuning_table(tuning, labels), "curves": curves})
