"""The scaling panel: a law on the runs, refitted while you move the cut-off, drop points by clicking,
and spend a budget.

    import widgets.scaling
    widgets.scaling.ScalingPanel("runs.csv", columns="params=n_params, loss=eval/loss")

Runs below the compute cut-off are fitted, those above are predicted and their error is shown. Clicking a run
leaves it out, clicking it again brings it back. The budget slider moves over the fitted law and its resamples
without refitting. Next run says which run would narrow the loss at the budget most, and draws it as a ghost.
"""

from __future__ import annotations

import html
from typing import Any, ClassVar

import ipywidgets
import numpy as np

from widgets.jobs import Note, guarded
from widgets.next_run import NextRunBox
from widgets.panels import Panel
from widgets.plot import PlotView
from widgets.whole import Whole
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.results import Result
from workbench.scaling import Draws, NextRun, Runs, ScalingFit, compute_optimal, law, laws, load_runs
from workbench.scaling.comparison import compute_of
from workbench.scaling.conclusion import doubt_of
from workbench.scaling.figures import short
from workbench.scaling.law_figures import band_figure
from workbench.scaling.objective import OBJECTIVE
from workbench.scaling.proposing.figures import add_ghosts

STARTS, RESAMPLES = 96, 200  # enough for a live answer: the report fits with more
VIEWS = ("fit", "residuals", "isoflop", "contour", "draws", "laws")
#: Laws that may be right beside the fitted one.
OTHERS = ("chinchilla", "kaplan", "over-training", "power-compute")


class ScalingPanel(Whole, ipywidgets.VBox):
    """An interactive scaling-law fit.

    runs : Runs, a DataFrame, or anything `load_runs` opens. law : the law to start with, by name or formula.
        `.result` is the last fit, `.dropped` the rows left out by hand,
        `.instrument` the exact settings for a report.
    """

    caption: ClassVar[str] = "Refit live, drop runs, spend a budget"

    @classmethod
    def beside(cls, panel: Panel) -> ScalingPanel:
        """For a panel's runs, with its law."""
        settings: Any = panel.instrument
        return cls(panel.opened(), law=str(settings.law))

    def __init__(self, runs: Any, columns: Any = None, law: str = "chinchilla") -> None:
        self.runs: Runs = load_runs(runs, columns)
        self.result: Result | None = None
        self.dropped: set[int] = set()
        self.planned: dict[str, float] = {}
        compute = compute_of(self.runs.table)
        low, high = float(np.log10(compute.min())), float(np.log10(compute.max()))
        needed = {name: (*known.columns, known.target) for name, known in laws().items()}
        fits = [name for name, columns in needed.items() if all(c in self.runs.table for c in columns)]
        if law not in fits and law in needed:
            missing = [c for c in needed[law] if c not in self.runs.table]
            raise BadInput(
                f"law {law}: needs column {', '.join(missing)}; "
                f"the runs have {', '.join(map(str, self.runs.table))}"
            )

        wide = {
            "style": {"description_width": "8rem"},
            "layout": ipywidgets.Layout(width="auto", min_width="0"),
        }
        self.law = ipywidgets.Combobox(
            value=law,
            options=fits,
            ensure_option=False,
            description="law or formula",
            continuous_update=False,
            **wide,
        )
        self.objective = ipywidgets.Dropdown(options=list(OBJECTIVE), description="objective", **wide)
        self.view = ipywidgets.Dropdown(options=VIEWS, description="view", **wide)
        step = max((high - low) / 60, 1e-3)
        self.cutoff = ipywidgets.FloatLogSlider(
            min=low,
            max=high + step,
            step=step,
            value=10 ** (high + step),
            description="fit up to (FLOPs)",
            readout_format=".2e",
            continuous_update=False,
            **wide,
        )
        self.budget = ipywidgets.FloatLogSlider(
            min=low,
            max=high + 5,
            step=0.05,
            value=10 ** (high + 1),
            description="budget (FLOPs)",
            readout_format=".2e",
            **wide,
        )
        self.lowest = ipywidgets.Checkbox(
            value=True, description="lowest loss per size and tokens", indent=False
        )
        self.restore = ipywidgets.Button(
            description="Bring back dropped runs",
            disabled=True,
            layout=ipywidgets.Layout(width="auto", min_width="13rem"),
        )
        self.note, self.facts, self.plan = Note("ready"), ipywidgets.HTML(), ipywidgets.HTML()
        self.doubt = ipywidgets.HTML()
        self.note.layout.flex = "0 0 auto"  # below each other, not beside
        self.plot = PlotView()
        for name, control in (
            ("law", self.law),
            ("objective", self.objective),
            ("view", self.view),
            ("cutoff", self.cutoff),
            ("budget", self.budget),
        ):
            control.add_class(f"wb-field-{name}")
        self.facts.add_class("wb-scaling-facts")
        self.plan.add_class("wb-scaling-plan")

        others = [name for name in OTHERS if name in fits]
        self.following = NextRunBox(others, self._question, guarded(self.note, self.draw))
        refit = guarded(self.note, lambda _: self.refit())
        for control in (self.law, self.objective, self.cutoff, self.lowest):
            control.observe(refit, "value")
        self.view.observe(guarded(self.note, lambda _: self.draw()), "value")
        self.budget.observe(guarded(self.note, lambda _: self.spend()), "value")
        self.plot.observe(guarded(self.note, self._clicked), "clicked")
        self.restore.on_click(guarded(self.note, lambda _: self._restore()))
        controls = ipywidgets.Box(
            [self.law, self.objective, self.view, self.cutoff, self.budget, self.lowest, self.restore]
        )
        controls.add_class("wb-controls")
        title = ipywidgets.HTML(
            f"<h3>Scaling law of {html.escape(self.runs.name)}</h3>"
            f"<p>{len(self.runs)} runs; click a run to leave it out, again to bring it back</p>"
        )
        title.add_class("wb-title")
        shown = [title, controls, self.note, self.doubt, self.facts, self.plan, self.following, self.plot]
        super().__init__(shown)
        self.add_class("wb-panel")
        self.add_class("wb-panel-scaling")
        guarded(self.note, self.refit)()

    @property
    def instrument(self) -> ScalingFit:
        """The settings shown, as the instrument that a report runs; `BadInput` when they make no fit."""
        whole = self.cutoff.value >= compute_of(self.runs.table).max()
        return ScalingFit(
            law=self.law.value,
            objective=self.objective.value,
            fit_below=None if whole else self.cutoff.value,
            exclude=tuple(sorted(self.dropped)),
            lowest_per_cell=self.lowest.value,
            starts=STARTS,
            resamples=RESAMPLES,
            checks=False,
            against=(),
        )

    def refit(self) -> None:
        """Fit again with the settings shown and draw."""
        self.note.say("fitting…")
        self.following.forget()
        self.result = self.instrument.run(self.runs, progress=Progress(), cache=False)
        self.restore.disabled = not self.dropped
        facts = self.result.facts
        rows = [
            (row["parameter"], f"{row['estimate']:.4g}", f"{row['low']:.4g} to {row['high']:.4g}")
            for row in self.result.table.to_dict("records")
        ]
        rows += [("relative error (rms)", f"{100 * facts['rmse']:.2f} %", "")]
        if "held_out_error" in facts:
            reach = f"{facts['held_out_runs']} runs, up to {facts['held_out_multiple']:.3g} x the compute"
            rows.append(("held-out error", f"{100 * facts['held_out_error']:.2f} %", reach))
        self.facts.value = (
            '<dl class="wb-facts">'
            + "".join(
                (
                    f"<div><dt>{html.escape(a)}</dt><dd>{html.escape(b)} "
                    f"<small>{html.escape(c)}</small></dd></div>"
                )
                for a, b, c in rows
            )
            + "</dl>"
        )
        dropped = f"; {len(self.dropped)} dropped" if self.dropped else ""
        self.note.say(f"{facts['runs']} runs fitted{dropped}: {facts['certificate']}")
        doubt = doubt_of(facts)
        self.doubt.value = f'<p role="alert" class="wb-doubt">{html.escape(doubt)}</p>' if doubt else ""
        (self.plan.add_class if doubt else self.plan.remove_class)("wb-outdated")
        self.draw()
        self.spend()

    def draw(self) -> None:
        """Draw the last fit in the chosen view; a proposed run is a ghost on the fit's."""
        if self.result is None:
            return
        asked = self.following.result
        if self.view.value == "laws" and asked is not None:
            self.plot.figure = band_figure(asked)
            return
        drawn = self.result.figure(view=self.view.value)
        if self.view.value == "fit" and asked is not None:
            add_ghosts(drawn, asked, str(self.result.tables["curves"].axis.iloc[0]))
        self.plot.figure = drawn

    def _question(self, others: tuple[str, ...]) -> tuple[NextRun, Runs]:
        """What is asked about the budget's plan, of the runs that are fitted."""
        if not self.planned:
            raise BadInput(
                f"law: {self.law.value} cannot divide a budget, so there is no target; take another"
            )
        whole = compute_of(self.runs.table)
        kept = (whole <= self.cutoff.value) & ~np.isin(np.arange(len(whole)), sorted(self.dropped))
        asked = NextRun(
            target=", ".join(f"{name}={value:.6g}" for name, value in self.planned.items()),
            law=self.law.value,
            against=tuple(name for name in others if name != self.law.value),
            objective=self.objective.value,
            lowest_per_cell=self.lowest.value,
            starts=STARTS,
            resamples=RESAMPLES,
        )
        return asked, self.runs.where(kept)

    def spend(self) -> None:
        """Show the compute-optimal size and tokens for the budget, with intervals from the resampled fits."""
        if self.result is None:
            return
        chosen = law(self.law.value)
        self.planned = {}
        if not {"params", "tokens"} <= set(chosen.columns):
            self.plan.value = (
                "<p>this law does not know model size and tokens, so it cannot divide a budget</p>"
            )
            return
        draws = Draws(chosen, np.vstack([self.result.arrays["theta"][None], self.result.arrays["draws"]]))
        other = {
            c: float(np.median(self.runs.table[c])) for c in chosen.columns if c not in ("params", "tokens")
        }
        plan = compute_optimal(draws, self.budget.value, fixed=other)
        shown = {r["quantity"]: r for r in plan.table.to_dict("records")}
        self.planned = {name: float(shown[name]["estimate"]) for name in ("params", "tokens")}
        parts = [
            (
                f"{label} <b>{short(shown[q]['estimate'])}</b> ({short(shown[q]['low'])} to "
                f"{short(shown[q]['high'])})"
            )
            for q, label in (
                ("params", "N*"),
                ("tokens", "D*"),
                ("tokens_per_param", "D*/N*"),
                ("loss", "loss"),
            )
        ]
        note = f"; {html.escape(plan.note)}" if plan.note else ""
        self.plan.value = f"<p>{self.budget.value:.2e} FLOPs: {', '.join(parts)}{note}</p>"

    def drop(self, row: int) -> None:
        """Leave a run out, or bring it back."""
        self.dropped ^= {row}
        self.refit()

    def _clicked(self, change: Any) -> None:
        """A click on a run: its row number came with the figure as `customdata`."""
        clicked = change["new"]
        if not clicked or self.result is None:
            return
        trace = self.plot.figure.data[clicked["trace"]]
        if trace.customdata is None or clicked["point"] is None:
            return
        self.plot.set_trait("clicked", None)  # the same run can be clicked again
        self.drop(int(np.asarray(trace.customdata).reshape(len(trace.x), -1)[clicked["point"], 0]))

    def _restore(self) -> None:
        self.dropped.clear()
        self.refit()
