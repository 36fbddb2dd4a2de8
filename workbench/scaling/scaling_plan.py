"""The `scaling-plan` instrument: a fitted law turned into a plan for a budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.results import Result
from workbench.scaling import isoflop
from workbench.scaling.comparison import compute_of
from workbench.scaling.doubt.prediction import PredictionIntervals
from workbench.scaling.fitting import Fit
from workbench.scaling.formulas.laws import Law
from workbench.scaling.hyperparameters import (
    PUBLISHED_ADVICE,
    REQUIRED,
    advice_of,
    best_settings,
    fit_step_law,
    step_law,
)
from workbench.scaling.planning import (
    Draws,
    Plan,
    best_precision,
    compute_optimal,
    data_constrained,
    exponents,
    flops_for,
    inference_aware,
    model_columns,
    over_training,
    trajectory,
)
from workbench.scaling.results import ScalingPlanResult
from workbench.scaling.runs import Runs
from workbench.scaling.scaling_fit import ScalingFit

Array = np.ndarray

#: What a law's size column counts.
COUNTS = {
    "params": "total parameters",
    "non_embedding_params": "non-embedding parameters",
    "active_params": "activated parameters (those a token meets)",
    "average_params": "active parameters averaged over training",
}


def size_meaning(law: Law, on: Any) -> str:
    """Which parameters a plan's size counts: what the law was fitted to, in the words of the runs."""
    column = next((c for c in COUNTS if c in law.columns), "params")
    if column == "params":
        read = next((n for n in getattr(on, "notes", ()) if n.startswith("params read from")), "")
        if read:
            return f"parameters as the runs count them ({read})"
    return COUNTS[column]


def non_embedding(on: Any, params: float) -> tuple[float, str]:
    """Non-embedding parameters of a model of so many, by the runs' own ratio (a straight line between the
    logarithms), and what was done.
    """
    table = getattr(on, "table", on)
    if not {"params", "non_embedding_params"} <= set(table):
        return params, "taken as non-embedding parameters (the runs have no column non_embedding_params)"
    total, inner = (
        np.log(np.asarray(table[c], dtype=np.float64)) for c in ("params", "non_embedding_params")
    )
    if len(np.unique(total)) < 2:
        return float(
            params * np.exp(np.median(inner - total))
        ), "non-embedding parameters, by the runs' ratio"
    slope, offset = np.polyfit(total, inner, 1)
    found = float(np.exp(offset + slope * np.log(params)))
    return min(found, params), "non-embedding parameters, by the runs' ratio"


class ScalingPlan(ScalingFit):
    """Compute-optimal size, tokens, epochs, precision, learning rate and batch for a budget,
    with intervals from the fit.
    """

    flops: float | None = parameter(
        None, "training budget in FLOPs; or give gpu_hours or money", unit="FLOPs", gt=0
    )
    gpu_hours: float | None = parameter(
        None, "training budget in device hours", unit="hours", gt=0, group="Budget in hours or money"
    )
    money: float | None = parameter(None, "training budget in money", gt=0, group="Budget in hours or money")
    price_per_gpu_hour: float | None = parameter(
        None,
        "price of a device hour, in the same money",
        only_with="money",
        gt=0,
        group="Budget in hours or money",
    )
    peak_flops: float | None = parameter(
        None,
        "FLOP/s of one device",
        only_with="gpu_hours or money",
        unit="FLOP/s",
        gt=0,
        group="Budget in hours or money",
    )
    utilisation: float = parameter(
        0.4,
        "share of the peak that training reaches",
        only_with="gpu_hours or money",
        gt=0,
        le=1,
        group="Budget in hours or money",
    )
    inference_tokens: float = parameter(
        0.0, "tokens that the model will serve in its life", unit="tokens", ge=0, group="Life of the model"
    )
    unique_tokens: float | None = parameter(
        None, "distinct tokens there are", unit="tokens", gt=0, group="Life of the model"
    )
    fixed: dict[str, float] = parameter(
        {}, "values of the law's other columns, for example {bits: 8}", group="Life of the model"
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        return ScalingPlanResult

    def laws_called(self) -> tuple[str, ...]:
        return (*super().laws_called(), "step-law-lr", "step-law-batch")

    def budget(self, on: Any) -> float:
        """The budget in FLOPs; without one, ten times the largest run."""
        if self.flops is None and self.gpu_hours is None and self.money is None:
            return 10.0 * float(compute_of(getattr(on, "table", on)).max())
        return flops_for(
            self.flops, self.gpu_hours, self.money, self.peak_flops, self.utilisation, self.price_per_gpu_hour
        )

    def check(self, on: Any) -> None:
        super().check(on)
        self.budget(on)
        chosen = self.chosen_law()
        if not {"params", "average_params"} & set(chosen.columns) or "tokens" not in chosen.columns:
            raise BadInput(
                f"law: {self.law} knows not both model size and tokens, so it cannot divide a budget; "
                "take chinchilla, kaplan, "
                "over-training, data-constrained or a precision law"
            )
        needed = (
            set(chosen.columns)
            - {"params", "tokens", "average_params", "non_embedding_params", "active_params", "flops"}
            - set(self.fixed)
        )
        if self.unique_tokens is not None:
            needed -= {"unique_tokens"}
        if "bits" in needed:
            needed -= {"bits"}  # chosen by the plan
        if needed:
            raise BadInput(
                f"fixed: the plan needs a value for {', '.join(sorted(needed))}; "
                f"give fixed={{{sorted(needed)[0]}: ...}}"
            )

    def _run(self, on: Runs, progress: Progress) -> Result:
        found, keep = self.fitted(on, progress)
        drawn = self.draws(found, lambda: progress.stopped)
        draws = Draws.of(drawn if drawn is not None else found)
        budget = self.budget(on)
        fixed = dict(self.fixed)
        if self.unique_tokens is not None:
            fixed["unique_tokens"] = self.unique_tokens
        tables: dict[str, pd.DataFrame] = {}
        if "bits" in found.law.columns and "bits" not in fixed:
            precise = best_precision(draws, flops=budget, level=self.level, fixed=fixed)
            fixed["bits"] = precise["bits"]
            tables["precision"] = precise.table
        if "unique_tokens" in found.law.columns and self.unique_tokens is not None:
            plan = data_constrained(
                draws,
                budget,
                self.unique_tokens,
                self.level,
                {k: v for k, v in fixed.items() if k != "unique_tokens"},
            )
        else:
            plan = compute_optimal(draws, budget, self.level, fixed)
        tables["exponents"] = exponents(draws, budget, self.level, fixed=fixed)
        tables["over_training"] = over_training(draws, budget, level=self.level, fixed=fixed)
        coming = self.ahead(found, drawn, on, keep, lambda: progress.stopped)
        length = trajectory(draws, plan["params"], plan["tokens"], level=self.level, fixed=fixed)
        tables["trajectory"] = length.assign(
            **self._loss_band(coming, plan["params"], length.tokens.to_numpy(), fixed)
        )
        tables["frontier"] = self._frontier(draws, coming, budget, fixed, on, progress)
        table = self._doubted(plan, coming, budget, fixed)
        if self.inference_tokens:
            tables["inference"] = inference_aware(
                draws, plan["loss"], self.inference_tokens, self.level, fixed=fixed
            ).table
        tables["advice"] = self._advice(on, found.law, plan["params"], plan["tokens"])
        tables |= self._bias(found, on, budget, fixed)
        facts: dict[str, Any] = {
            "law": found.law.name,
            "budget_flops": budget,
            **{k: float(v[0]) for k, v in plan.draws.items()},
            "size_means": size_meaning(found.law, on),
        }
        for row in table.to_dict("records"):
            facts[f"{row['quantity']}_low"], facts[f"{row['quantity']}_high"] = (
                float(row["low"]),
                float(row["high"]),
            )
        facts["beyond_largest_run"] = budget / float(compute_of(on.table)[keep].max())
        facts["certificate"] = found.certificate.text
        if plan.note:
            facts["note"] = plan.note
        return self.result(table, facts, tables=tables, arrays={"theta": found.theta, "draws": draws.theta})

    def _loss_band(
        self, coming: PredictionIntervals, params: Any, tokens: Any, fixed: dict[str, float]
    ) -> dict[str, Any]:
        """low and high of the loss of new runs of these sizes and lengths."""
        band = coming.band({**fixed, **model_columns(np.asarray(params), np.asarray(tokens))}, self.level)
        return {"low": band.low.to_numpy(), "high": band.high.to_numpy()}

    def _doubted(
        self, plan: Plan, coming: PredictionIntervals, budget: float, fixed: dict[str, float]
    ) -> pd.DataFrame:
        """The plan's table with the loss of a new run in its loss interval, and with size and tokens widened
        to what the law advises when it is fitted below each earlier cut-off of compute.
        """
        table = plan.table.copy()
        loss = self._loss_band(coming, [plan["params"]], [plan["tokens"]], fixed)
        earlier: dict[str, Array] = {}
        if len(coming.answers):
            answers = np.vstack([coming.fit.theta[None], coming.answers])
            earlier = compute_optimal(Draws(coming.fit.law, answers), budget, self.level, fixed).draws
        for i, quantity in enumerate(table.quantity):
            if quantity == "loss":
                table.loc[i, ["low", "high"]] = float(loss["low"][0]), float(loss["high"][0])
            elif quantity in earlier:
                known = earlier[quantity][np.isfinite(earlier[quantity])]
                table.loc[i, "low"] = min(table.low[i], known.min(initial=np.inf))
                table.loc[i, "high"] = max(table.high[i], known.max(initial=-np.inf))
        return table

    def _frontier(
        self,
        draws: Draws,
        coming: PredictionIntervals,
        budget: float,
        fixed: dict[str, float],
        on: Runs,
        progress: Progress,
    ) -> pd.DataFrame:
        lowest = float(compute_of(on.table).min())
        rows = []
        for c in progress.track(np.geomspace(lowest, max(budget, lowest * 10) * 3, 25), "frontier"):
            plan = compute_optimal(draws, float(c), self.level, fixed)
            row: dict[str, float] = {"flops": float(c)}
            for part in plan.table.to_dict("records"):
                name = str(part["quantity"])
                row |= {
                    name: float(part["estimate"]),
                    f"{name}_low": float(part["low"]),
                    f"{name}_high": float(part["high"]),
                }
            rows.append(row)
        table = pd.DataFrame(rows)
        loss = self._loss_band(coming, table.params.to_numpy(), table.tokens.to_numpy(), fixed)
        return table.assign(loss_low=loss["low"], loss_high=loss["high"])

    def _advice(self, on: Runs, law: Law, params: float, tokens: float) -> pd.DataFrame:
        """Learning rate and batch size: fitted to the runs where they hold a grid,
        and the published law beside it; `counts` says which parameters each of them means.
        """
        size, how = non_embedding(on, params)
        rows = [("Step Law (published)", *step_law(size, tokens), size, how)]
        rows += [(name, *told(size, tokens), size, how) for name, told in PUBLISHED_ADVICE.items()]
        if all(c in on.table for c in REQUIRED):
            settings = best_settings(on)
            if (
                settings[["params", "tokens"]].nunique().min() >= 2
                and len(settings) >= 4
                and (settings.runs >= 3).all()
            ):
                fitted = advice_of(fit_step_law(settings))(params, tokens)
                rows.insert(0, ("fitted to these runs", *fitted, params, size_meaning(law, on)))
        return pd.DataFrame(rows, columns=["source", "learning_rate", "batch_tokens", "params", "counts"])

    def _bias(self, found: Fit, on: Runs, budget: float, fixed: dict[str, float]) -> dict[str, pd.DataFrame]:
        """IsoFLOP parabolas on the user's own grid, without noise: their error is the method's alone."""
        table = on.table
        if not {"params", "flops"} <= set(table):
            return {}
        try:
            pairs = isoflop.optima(table)
            bias = isoflop.parabola_bias(
                found.law, found.params, table.params, table.flops, budget, fixed=fixed
            )
        except BadInput:  # the runs form no IsoFLOP grid: nothing to simulate
            return {}
        return {"isoflop": pairs, "isoflop_bias": bias}
