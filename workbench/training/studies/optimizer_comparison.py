"""The `optimizer-comparison` instrument: optimizers at equal tuning."""

from __future__ import annotations

import json
import time
from typing import Any, Literal

import numpy as np
import pandas as pd

from workbench.axis import Choice, parameter
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.results import Result
from workbench.scaling.hyperparameters import speedup
from workbench.storage import cache_folder, replacing
from workbench.subjects import Subject
from workbench.training.loop import Training, fit
from workbench.training.optimizer.optimizers import OPTIMIZER, usual_learning_rate
from workbench.training.pairs import check_pair
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE
from workbench.training.studies.comparison import (
    Comparison,
    ComparisonResult,
    curve_table,
    leaderboard,
    rank_flips,
    tuning_table,
)
from workbench.training.studies.lists import Texts, labels, listed
from workbench.training.sweep.objective import begun

#: Steps that a step's time is measured on.
TIMED = 20


class OptimizerComparison(Comparison):
    """Optimizers at equal tuning budgets and fully decayed learning rates,
    on the same data order and initial weights.
    """

    summary_line = (
        "optimizers at equal tuning: test loss with intervals, tokens saved against AdamW, rank flips, "
        "state bytes"
    )

    optimizers: Texts = parameter(
        ["adamw", "sgd", "lamb", "lion", "muon", "soap"],
        "optimizers, one with options as 'muon momentum=0.9'",
        min_length=1,
    )
    equal: Literal["examples", "time"] = parameter(
        "examples",
        "what all have the same of: examples; or reference time, what the first optimizer takes for the "
        "examples, each in steps of its own length as timed here first (Kaddour et al. 2023)",
    )
    schedule: Choice = LEARNING_RATE_SCHEDULE.choice("cosine", "learning-rate schedule of every run")
    baseline_budgets: tuple[float, ...] = parameter(
        (),
        "further budgets, as multiples of the examples, at which AdamW is run too, "
        "for the speed-up of the others; at least 3",
        group="Ladder of rates",
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        return ComparisonResult

    def compared(self) -> list[Choice]:
        return listed(OPTIMIZER, self.optimizers, "optimizers")

    def check(self, on: Subject) -> None:
        super().check(on)
        chosen = self.compared()
        for optimizer in chosen:
            rate = usual_learning_rate(optimizer)
            check_pair(optimizer, self.schedule, rate, self.weight_decay, self.warmup)
        if self.storage and self.equal == "time":
            raise BadInput(
                "equal: time is one machine's, and a storage may be shared by several; leave storage out"
            )
        if self.baseline_budgets and self.equal == "time":
            raise BadInput("baseline_budgets: they are budgets of examples, and equal is time; give one")
        if self.baseline_budgets and (
            "adamw" not in labels(chosen)
            or len({1.0, *self.baseline_budgets}) < 4
            or min(self.baseline_budgets) * self.examples < self.batch_size
        ):
            raise BadInput(
                f"baseline_budgets: {self.baseline_budgets} with {', '.join(self.optimizers)} is not "
                "accepted; AdamW must be among the optimizers, and its curve "
                "needs at least three budgets other than 1, each of a step or more"
            )

    def kept_seconds(self, on: Subject, optimizers: list[Choice]) -> list[float]:
        """`seconds_per_step`, measured once: a study that goes on has the budgets it began with."""
        file = cache_folder() / "sweeps" / f"seconds-{self.key(on)}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file, private=True) as draft:
                draft.write_text(json.dumps(self.seconds_per_step(on, optimizers)))
        found: list[float] = json.loads(file.read_text())
        return found

    def seconds_per_step(self, on: Subject, optimizers: list[Choice]) -> list[float]:
        """Processor time of a step of each, the mean of `TIMED` after the first on a copy: an optimizer may
        do more in every tenth.
        """
        found = []
        for optimizer in optimizers:
            clock: list[float] = []

            def told(run: Training, clock: list[float] = clock) -> None:
                clock.append(time.process_time())

            fit(
                begun(on, self.start, self.seed),
                steps=TIMED + 1,
                batch_size=self.batch_size,
                optimizer=optimizer,
                learning_rate=1e-6,
                evaluate_limit=1,
                callbacks=[told],
            )
            found.append(max((clock[-2] - clock[0]) / (len(clock) - 2), 1e-9))
        return found

    def _run(self, on: Subject, progress: Progress) -> Result:
        optimizers = self.compared()
        chosen = labels(optimizers)
        rows = [*chosen, *(f"adamw at {budget:g}" for budget in self.baseline_budgets)]
        candidates: list[dict[str, Any]] = [
            {"optimizer": optimizer, "schedule": self.schedule} for optimizer in optimizers
        ]
        candidates += [
            {
                "optimizer": optimizers[chosen.index("adamw")],
                "schedule": self.schedule,
                "examples": round(budget * self.examples),
            }
            for budget in self.baseline_budgets
        ]
        if self.equal == "time":
            seconds = self.kept_seconds(on, optimizers)
            for candidate, spent in zip(candidates, seconds, strict=False):
                candidate["examples"] = max(self.batch_size, round(self.examples * seconds[0] / spent))
        centres = [usual_learning_rate(candidate["optimizer"]) for candidate in candidates]
        tuning, finals = self.protocol(on, progress, candidates, centres, rows)
        everything = leaderboard(finals, [{"name": name} for name in rows], tuning, self.level)
        facts: dict[str, Any] = {"runs": len(tuning) + len(finals)}
        if self.equal == "time":
            facts |= {f"seconds_per_step_{name}": spent for name, spent in zip(chosen, seconds, strict=True)}
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
                    {"tokens": sizes, "loss": reached[["adamw", *rows[len(chosen) :]]].to_numpy(float)}
                )
                found = speedup(
                    baseline, np.full(len(table), float(self.examples)), table.test.to_numpy(float), self.seed
                )
                table["speedup"], table["extrapolated"] = (
                    found.speedup.to_numpy(),
                    found.extrapolated.to_numpy(),
                )
                facts["best_speedup"] = float(table.speedup[0])
        return self.result(table, facts, tables={"tuning": tuning_table(tuning, rows), "curves": curves})
