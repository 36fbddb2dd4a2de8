"""The two scaling instruments: `ScalingFit` fits a law to runs and says how far to trust it,
`ScalingPlan` turns it into a plan.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd

from workbench.axis import Choice, entries_in, parameter
from workbench.code_version import code_version
from workbench.errors import BadInput
from workbench.instruments import Instrument
from workbench.progress import Progress
from workbench.results import Result
from workbench.scaling.comparison import compare, compute_of, extrapolation, held_out, information
from workbench.scaling.doubt.law_band import beside, law_tables
from workbench.scaling.doubt.prediction import PredictionIntervals, prediction_intervals
from workbench.scaling.doubt.uncertainty import Bootstrap, bootstrap, influence, profile
from workbench.scaling.fitting import Fit, columns_of, fit
from workbench.scaling.formulas.lawbook import LAW, law
from workbench.scaling.formulas.laws import Law
from workbench.scaling.objective import OBJECTIVE, Objective
from workbench.scaling.results import ScalingFitResult, curve_tables
from workbench.scaling.runs import Runs

Array = np.ndarray


class ScalingFit(Instrument):
    """Fit a scaling law to finished runs, with intervals, a convergence certificate and held-out error."""

    on: ClassVar[Literal["subject", "runs"]] = "runs"

    law: Choice = LAW.choice("chinchilla")
    objective: Choice = OBJECTIVE.choice("huber", group="Fit")
    space: Literal["auto", "log", "linear"] = parameter(
        "auto", "compare logarithms or plain values; auto: logarithms for losses", group="Fit"
    )
    starts: int = parameter(512, "starting points of the search", ge=1, le=100_000, scale="log", group="Fit")
    fit_below: float | None = parameter(
        None, "fit only runs with at most this much compute, predict the rest", unit="FLOPs", gt=0
    )
    drop_highest: int = parameter(
        0,
        "leave out this many runs with the highest loss (ties with the last one go too)",
        ge=0,
        group="Runs that are left out",
    )
    lowest_per_cell: bool = parameter(
        False,
        "of runs that differ only in what the law does not see (learning rate, seed), "
        "fit only the lowest loss",
    )
    exclude: tuple[int, ...] = parameter(
        (), "rows to leave out, counted from 0", group="Runs that are left out"
    )
    intervals: Literal["runs", "residuals", "profile"] = parameter(
        "runs",
        "resample whole runs (no assumption on the scatter) or residuals (keeps the grid of runs), "
        "or profile the objective",
        group="Intervals",
    )
    resamples: int = parameter(500, "bootstrap refits", ge=20, le=20_000, scale="log", group="Intervals")
    level: float = parameter(0.9, "probability content of every interval", gt=0, lt=1, group="Intervals")
    against: tuple[str, ...] = parameter(
        ("kaplan", "over-training", "power-compute"),
        "other laws to compare with on the same runs",
        only_with="checks",
    )

    checks: bool = parameter(
        True,
        "also calibrate the bands on held-out compute, leave runs out one by one, predict held-out runs and "
        "compare with other laws (slower)",
        group="Fit",
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        return ScalingFitResult

    def chosen_law(self) -> Law:
        return law(self.law)

    def laws_called(self) -> tuple[str, ...]:
        """Laws that a run fits besides the chosen one."""
        return self.against

    def code(self) -> str:
        """Also the code of the laws that are called by name."""
        called = [LAW.chosen(name, "against").entry for name in self.laws_called()]
        return code_version(type(self), [entry.value for entry in (*entries_in(self), *called)])

    def objective_for(self, chosen: Law) -> Objective:
        space: Literal["log", "linear"] = (
            ("log" if chosen.positive else "linear") if self.space == "auto" else self.space
        )
        return self.objective(space)

    def check(self, on: Any) -> None:
        """Raise `BadInput` for a missing column, too few runs, or a cut-off that leaves nothing to fit."""
        chosen = self.chosen_law()
        for other in self.against:
            law(other)
        columns, _ = columns_of(chosen, on)
        keep = self.kept(on)
        if keep.sum() < len(chosen.free):
            raise BadInput(
                f"runs: {int(keep.sum())} of {len(keep)} rows remain (fit_below, drop_highest, exclude), "
                f"law {chosen.name} has "
                f"{len(chosen.free)} parameters; keep more runs or take a smaller law"
            )
        for name, values in columns.items():
            if len(np.unique(values[keep])) == 1 and not chosen.fixed:
                raise BadInput(
                    f"{name}: every fitted run has {values[keep][0]:g}, "
                    f"so law {chosen.name} cannot learn how the loss depends on it; "
                    "add runs that differ or take a law without it"
                )

    def kept(self, on: Any) -> Array:
        """Boolean mask of the rows that are fitted."""
        table = getattr(on, "table", on)
        rows = len(table)
        bad = [r for r in self.exclude if not 0 <= r < rows]
        if bad:
            raise BadInput(f"exclude: row {bad[0]} does not exist, there are rows 0 to {rows - 1}")
        keep = np.ones(rows, dtype=bool)
        keep[list(self.exclude)] = False
        target = np.asarray(table[self.chosen_law().target], dtype=np.float64)
        if self.drop_highest:
            if self.drop_highest >= rows:
                raise BadInput(
                    f"drop_highest: {self.drop_highest} is not accepted, there are only {rows} runs"
                )
            keep &= target < np.sort(target)[-self.drop_highest]
        if self.fit_below is not None:
            keep &= compute_of(table) <= self.fit_below
        if self.lowest_per_cell:
            cells = pd.DataFrame({c: np.asarray(table[c]) for c in self.chosen_law().columns}).assign(
                target=target
            )[keep]
            lowest = cells.groupby(list(self.chosen_law().columns)).target.idxmin()
            keep &= np.isin(np.arange(rows), lowest.to_numpy())
        return keep

    def fitted(self, on: Any, progress: Progress) -> tuple[Fit, Array]:
        chosen = self.chosen_law()
        keep = self.kept(on)
        columns, target = columns_of(chosen, on)
        data = {c: v[keep] for c, v in columns.items()} | {chosen.target: target[keep]}
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # as many rows as parameters: said in the facts below
            return fit(
                chosen,
                data,
                self.objective_for(chosen),
                self.starts,
                seed=self.seed,
                stop=lambda: progress.stopped,
            ), keep

    def draws(self, found: Fit, stop: Callable[[], bool]) -> Bootstrap | None:
        """Bootstrap draws, or None when there are no spare rows to resample."""
        if found.problem.rows <= found.problem.size:
            return None
        kind: Literal["runs", "residuals"] = "residuals" if self.intervals == "residuals" else "runs"
        return bootstrap(found, self.resamples, self.seed, kind, stop)

    def ahead(
        self, found: Fit, drawn: Bootstrap | None, on: Any, keep: Array, stop: Callable[[], bool]
    ) -> PredictionIntervals:
        """Bands for runs to come, calibrated on the fitted ones if `checks`."""
        table = getattr(on, "table", on)
        fitted = {c: np.asarray(table[c])[keep] for c in table if c in ("flops", "params", "tokens")}
        return prediction_intervals(found, fitted, drawn, self.seed, stop, calibrate=self.checks)

    def _run(self, on: Runs, progress: Progress) -> Result:
        steps = iter(
            progress.track(
                ["fit", "intervals", "influence", "held out", "comparison", "laws", "curves"], "scaling fit"
            )
        )
        next(steps)
        found, keep = self.fitted(on, progress)
        next(steps, None)
        drawn = self.draws(found, lambda: progress.stopped)
        table, tables = self.intervals_of(found, drawn)
        tables["optima"] = found.optima
        coming = self.ahead(found, drawn, on, keep, lambda: progress.stopped)
        if len(coming.backtests):
            tables["backtests"] = coming.backtests
        next(steps, None)
        if self.checks and not progress.stopped and found.problem.rows > found.problem.size + 1:
            rows = np.flatnonzero(keep)
            tables["influence"] = (
                influence(found).rename_axis("row").reset_index().assign(row=lambda t: rows[t["row"]])
            )
        next(steps, None)
        facts = self.facts(found, drawn)
        table_all = pd.DataFrame({c: np.asarray(on.table[c]) for c in on.table})
        predicted = found.predict(table_all)
        observed = table_all[found.law.target].to_numpy(dtype=np.float64)
        band = coming.band(table_all, self.level)
        runs = table_all.select_dtypes("number").assign(
            predicted=predicted,
            low=band.low.to_numpy(),
            high=band.high.to_numpy(),
            error=predicted / observed - 1,
            fitted=keep,
        )
        facts["scatter"], facts["band_factor"] = coming.scatter, coming.factor(self.level)
        tables["runs"] = runs
        left = np.isin(np.arange(len(keep)), np.array(self.exclude, dtype=int), invert=True)
        ahead = left if self.fit_below is None else left & (compute_of(table_all) > self.fit_below)
        if self.fit_below is not None:
            facts["held_out_runs"] = int(ahead.sum())
        if self.fit_below is not None and ahead.any():
            facts["held_out_error"] = float(np.mean(np.abs(runs.error[ahead])))
            inside = (runs.low <= observed) & (observed <= runs.high)
            facts["held_out_inside_band"] = float(np.mean(inside[ahead]))
            facts["held_out_multiple"] = float(
                compute_of(table_all)[ahead].max() / compute_of(table_all)[keep].max()
            )
        self._extrapolate(on, keep, found, tables, facts, progress)
        next(steps, None)
        if self.checks and self.against and not progress.stopped:
            self._compare(on, keep, found, tables)
        next(steps, None)
        if self.checks and self.against and drawn is not None and not progress.stopped:
            others = [law(n) for n in self.against if n != self.law]
            kept = on.where(keep).table
            weighed = beside(coming, others, kept, min(self.starts, 128), self.seed, progress)
            tables |= law_tables(weighed, kept, self.level)
            facts["laws"] = weighed.said
        next(steps, None)
        arrays = {"theta": found.theta, "draws": drawn.theta if drawn is not None else found.theta[None]}
        tables |= curve_tables(found, coming, runs, self.level)
        for _ in steps:
            pass
        return self.result(table, facts, tables=tables, arrays=arrays)

    def intervals_of(
        self, found: Fit, drawn: Bootstrap | None
    ) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
        names = [p.name for p in found.law.free]
        tables: dict[str, pd.DataFrame] = {}
        if drawn is None:
            table = pd.DataFrame(
                {
                    "parameter": names,
                    "estimate": [found.params[n] for n in names],
                    "low": np.nan,
                    "high": np.nan,
                    "sd": np.nan,
                }
            )
        else:
            table = drawn.interval(self.level)
            tables["correlation"] = drawn.correlation().rename_axis("parameter").reset_index()
        if self.intervals == "profile" and drawn is not None:
            profiles = {n: profile(found, n, self.level) for n in names}
            table["low"], table["high"] = (
                [p.interval[0] for p in profiles.values()],
                [p.interval[1] for p in profiles.values()],
            )
            table["open"] = [p.open_low or p.open_high for p in profiles.values()]
            shown = ["profiled", "value", "objective", "deviance"]
            tables["profiles"] = pd.concat(
                [p.table.assign(profiled=n, value=p.table[n])[shown] for n, p in profiles.items()]
            )
        table["meaning"] = [found.law.parameter(n).meaning for n in names]
        return table, tables

    def facts(self, found: Fit, drawn: Bootstrap | None) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "law": found.law.name,
            "runs": found.problem.rows,
            **{n: float(v) for n, v in found.params.items()},
            "objective": float(found.objective_value),
            "certificate": found.certificate.text,
            "converged": found.certificate.converged,
            "rmse": found.rmse,
            "r_squared": found.r_squared,
        }
        if found.problem.rows > found.problem.size:
            facts |= {k: float(v) for k, v in information(found).items() if k in ("aic", "bic")}
        else:
            facts["note"] = (
                "as many parameters as runs: the fit passes through the points and nothing can be said "
                "about error"
            )
        if drawn is not None and drawn.unsettled:
            facts["resamples_not_settled"] = drawn.unsettled
        return facts

    def _extrapolate(
        self,
        on: Runs,
        keep: Array,
        found: Fit,
        tables: dict[str, pd.DataFrame],
        facts: dict[str, Any],
        progress: Progress,
    ) -> None:
        if (
            not self.checks
            or progress.stopped
            or not ({"flops"} <= set(on.table) or {"params", "tokens"} <= set(on.table))
        ):
            return
        kept = on.where(keep)
        try:
            ahead = held_out(
                found.law,
                kept,
                None,
                found.objective,
                min(self.starts, 128),
                self.seed,
                lambda: progress.stopped,
            )
        except (
            BadInput
        ):  # too few runs below any cut-off: there is nothing to hold out, which is no failure of the fit
            return
        tables["held_out"], tables["extrapolation"] = ahead, extrapolation(ahead)
        facts["extrapolation_error"] = float(ahead.error.abs().mean())

    def _compare(self, on: Runs, keep: Array, found: Fit, tables: dict[str, pd.DataFrame]) -> None:
        others = [law(n) for n in self.against if n != self.law and law(n).target == found.law.target]
        try:
            tables["comparison"] = compare(
                [found.law, *others],
                on.where(keep),
                found.objective,
                starts=min(self.starts, 128),
                seed=self.seed,
            )
        except BadInput:  # fewer runs than bands need
            return
