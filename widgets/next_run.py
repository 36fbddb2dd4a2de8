"""The next run, asked for beside a fit: which laws may be right, a button, and what the run would teach."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

import ipywidgets

from widgets.jobs import Job
from widgets.whole import Whole
from workbench.progress import Progress
from workbench.results import Result
from workbench.scaling import NextRun, Runs
from workbench.scaling.figures import short


class NextRunBox(Whole, ipywidgets.VBox):
    """Switches of the laws, a Next run button with its bar, and the answer in words.

    question : what is asked with the laws that are switched on, and of which runs
    answered : called when there is an answer, and when an old one no longer holds
        `.result` is the last answer, None when the fit has changed since.
    """

    def __init__(
        self,
        laws: Sequence[str],
        question: Callable[[tuple[str, ...]], tuple[NextRun, Runs]],
        answered: Callable[[], None],
    ) -> None:
        self.result: Result | None = None
        self._question, self._answered = question, answered
        self.laws = {name: ipywidgets.Checkbox(value=True, description=name, indent=False) for name in laws}
        self.job = Job(self._work, self._finished)
        self.job.run.description = "Next run"
        self.job.run.tooltip = "Which run would narrow the loss at the budget most, per unit of cost"
        self.answer = ipywidgets.HTML()
        self.answer.add_class("wb-next-run")
        label = ipywidgets.Label("laws that may be right beside the fitted one")
        super().__init__([ipywidgets.Box([label, *self.laws.values()]), self.job, self.answer])
        for switch in self.laws.values():
            switch.observe(lambda _: self.forget(), "value")

    def forget(self) -> None:
        """The answer is about another fit, or other laws."""
        if self.result is not None:
            self.result, self.answer.value = None, ""
            self._answered()

    def _work(self, progress: Progress) -> Result:
        on = tuple(name for name, switch in self.laws.items() if switch.value)
        asked, runs = self._question(on)
        return asked.run(runs, progress=progress, cache=False)

    def _finished(self, result: Result) -> None:
        self.result = result
        facts = result.facts
        if len(result.table):
            run = result.table.iloc[0]
            told = (
                f"<b>{short(run.params)} parameters, {short(run.tokens)} tokens</b> ({run.cost:.2g} FLOPs) "
                f"would narrow the interval at the budget by {100 * run.narrows:.2g} %, from "
                f"&plusmn;{100 * facts['half_width']:.2g} % to &plusmn;{100 * run.half_width:.2g} %"
            )
        else:
            told = html.escape(str(facts["note"]))
        self.answer.value = f"<p>{told}; {html.escape(str(facts['laws']))}</p>"
        self._answered()
