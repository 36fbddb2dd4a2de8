"""The panel of an instrument: its fields as controls, Run and Stop, its figure live,
and the way into a report.

    import widgets, workbench
    from workbench.pruning import Prune

    widgets.panel(Prune, workbench.subject("digits-vit"), sparsity=0.7)
    widgets.panel(Prune, "digits-vit")                        # opened on the first run
    widgets.panel.from_parameters("reports/prune.yaml")
        # exactly the settings that were sent to a report

Everything is derived: fields give the controls, the result gives the figure and what can be changed about its
view. In a headless report the same cell runs at once and shows the result.
"""

from __future__ import annotations

import copy
import html
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ipywidgets

import workbench
import workbench.reports
from widgets.compare import Comparison, can_overlay, differences, facts_html, on_shared_axes, overlay
from widgets.jobs import Job, Note, guarded
from widgets.keeping import Kept
from widgets.plot import PlotView
from widgets.sending import Report, check_known_elsewhere, source_of
from widgets.settings.controls import Controls, help_html
from widgets.settings.parameters import read_parameters, settings_html, what_decides
from widgets.toolbar import Tools, code_of, named
from widgets.whole import Whole, take_down
from workbench.commands.as_typed import command_of
from workbench.errors import BadInput
from workbench.instruments import Instrument
from workbench.progress import Progress, TextProgress
from workbench.results import Result

QUICK = 0.2  # seconds that a check may take to be asked after every change
KEPT = 12  # earlier results of a panel that can be compared with


class Panel(Whole, ipywidgets.VBox):
    """An interactive view of one instrument on one subject.

    instrument : an `Instrument` class, or an instance whose settings to start from. on : a Subject, what
        `workbench.subject` opens, or Runs. view : settings of the figure.
        reports : folder for what is sent to a report. fields : settings.

    `.instrument` holds the settings now (validated), `.result` the last result, `.results` all of them,
    `.parameters` what Send to report writes.
    """

    children: Any

    def __init__(
        self,
        instrument: type[Instrument] | Instrument,
        on: Any,
        *,
        view: Mapping[str, Any] | None = None,
        reports: str | os.PathLike[str] = "reports",
        **fields: Any,
    ) -> None:
        start = instrument.with_fields(**fields) if isinstance(instrument, Instrument) else None
        self.special: ipywidgets.VBox | None = None
        self.kind: type[Instrument] = type(instrument) if isinstance(instrument, Instrument) else instrument
        if start is None and fields:
            start = self.kind(**fields)
        self.on, self._name = on, on if isinstance(on, str) else getattr(on, "name", type(on).__name__)
        self.results: list[Result] = []
        self._runs = 0  # how many there were, kept or not
        self._folder = Path(reports)
        self._wanted_view = dict(view or {})
        self._quiet = False

        self.controls = Controls(
            self.kind, what_decides(start) if start is not None else None, changed=self._settings_changed
        )
        self.job = Job(self._work, self._finished, self._preview)
        self.summary = ipywidgets.HTML()
        self.view_controls: Controls | None = None
        self.view_box = ipywidgets.Box(layout=ipywidgets.Layout(display="none"))
        self.plot, self.beside = PlotView(), PlotView()
        self.views = ipywidgets.Box([self.plot, self.beside])
        self.views.add_class("wb-views")
        self.comparison = Comparison(guarded(self.job.note, self._draw))
        self.beside.layout.display = "none"
        self._make_report_row()
        texts = {
            "code": lambda: code_of(self.instrument, self.on),
            "command": lambda: command_of(self.instrument, named(self.on)),
        }
        self.tools = Tools(self.kind, self.controls, self.job.note, texts, lambda: self.result)
        self._kept: Kept | None = None
        self._patient = True
        self.job.add_class("wb-section")
        super().__init__(
            [
                ipywidgets.HTML(self._title()),
                self.controls,
                self.job,
                self.view_box,
                self.views,
                self.summary,
                self.comparison,
                self.tools,
                self.report_row,
                ipywidgets.HTML(help_html(self.controls.fields)),
            ]
        )
        self.children[0].add_class("wb-title")
        self.add_class("wb-panel")
        self.add_class(f"wb-panel-{self.kind.name()}")
        if os.environ.get("WORKBENCH_HEADLESS"):
            self.job.now(TextProgress())
        elif not isinstance(on, str):
            self._offer_names()
            if self.kind.cached:
                self.job.start(self._stored, "looking for a stored result of these settings")

    # ---- settings ------------------------------------------------------------------------------------------
    @property
    def instrument(self) -> Instrument:
        """The instrument with the settings shown; `BadInput` when they contradict each other.
        What nobody chose is left to the method.
        """
        return self.kind(**self.controls.given)

    @property
    def result(self) -> Result | None:
        return self.results[-1] if self.results else None

    @property
    def view(self) -> dict[str, Any]:
        """Settings of the figure."""
        return self.view_controls.values if self.view_controls is not None else dict(self._wanted_view)

    @property
    def parameters(self) -> dict[str, Any]:
        """The exact settings as parameters of the report notebook."""
        found: dict[str, Any] = {
            "instrument": self.kind.name(),
            "subject": self.on,
            "settings": self.instrument.model_dump(mode="json"),
        }
        if not isinstance(self.on, str):
            found |= {"subject": source_of(self.on), "fingerprint": self.on.fingerprint}
        if self.view:
            found["view"] = self.view
        return found

    @classmethod
    def from_parameters(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> Panel:
        """The panel that these parameters (a YAML or JSON file, or a mapping) were sent from."""
        instrument, on, view = read_parameters(source)
        return cls(instrument, on, view=view)

    def _settings_changed(self) -> None:
        if self.job.running:
            return
        try:
            instrument = self.instrument
            self._check(instrument)
        except BadInput as error:
            self.job.note.complain(error)
            self.controls.mark(str(error).split(":")[0].split(".")[0])
            self._outdated(True)
            return
        self.controls.mark()
        old = self.result is not None and instrument != self.result.instrument
        self._outdated(old)
        idle = "; ".join(instrument.idle())
        state = "settings changed since the run shown: press Run" if old else "ready"
        self.job.note.say(f"{state} ({idle})" if idle else state)

    def _check(self, instrument: Instrument) -> None:
        """What can be seen to fail on the subject; asked after every change while the answer is quick."""
        if isinstance(self.on, str) or not self._patient or not getattr(self.on, "made", True):
            return
        began = time.monotonic()
        instrument.check(self.on)
        self._patient = time.monotonic() - began < QUICK

    def _outdated(self, old: bool) -> None:
        """Dim what is shown when it is not of the settings above it."""
        for widget in (self.views, self.summary):
            (widget.add_class if old else widget.remove_class)("wb-outdated")
        self.tools.back.disabled = not old

    def _offer_names(self) -> None:
        """The subject's own layers and splits, in the fields that ask for them."""
        if not hasattr(self.on, "splits") or not getattr(self.on, "made", True):
            return  # runs, or a model that would have to be computed to be asked
        splits = list(self.on.splits)
        layers = ["blocks", "all", *(layer.name for layer in self.on.layers("*"))]
        fields = self.controls.fields
        self.controls.suggest({name: splits for name in fields if name == "split" or name.endswith("_split")})
        self.controls.suggest({"layers": layers})

    # ---- running -------------------------------------------------------------------------------------------
    def _work(self, progress: Progress) -> Result:
        instrument = self.instrument
        if isinstance(self.on, str):
            self.job.note.say(f"opening {Path(self.on).name}")
            self.opened(progress)
            self.job.note.say("starting")
        self._offer_names()
        return instrument.run(self.on, progress=progress)

    def _stored(self, progress: Progress) -> Result | None:
        """The result that these settings have in the cache, if they have one."""
        instrument = self.instrument
        if not instrument.stored(self.on):
            return None
        result = instrument.run(self.on, progress=progress)
        self.job.note.say(f"stored result of {str(result.provenance.get('date', ''))[:16].replace('T', ' ')}")
        return result

    def _preview(self, result: Result) -> None:
        self.plot.figure = result.figure(**self._valid_view(result))

    def _finished(self, result: Result) -> None:
        if self.results:  # earlier models are not kept in memory
            earlier = copy.copy(self.results[-1])
            earlier.subject = None
            self.results[-1] = earlier
        self.results = [*self.results, result][-KEPT:]
        self._runs += 1
        self.summary.value = facts_html(result)
        self._show_view_controls(result)
        self._offer_comparisons()
        self._draw()
        self._outdated(self._changed_meanwhile(result))
        if self._kept is not None:
            self._kept.keep(self.plot, self._facts_kept(), self.result.summary() if self.result else "")

    def _changed_meanwhile(self, result: Result) -> bool:
        try:
            return self.instrument != result.instrument
        except BadInput:
            return True

    # ---- the figure ----------------------------------------------------------------------------------------
    def _show_view_controls(self, result: Result) -> None:
        """Controls for what this result lets the viewer change;
        choices made before stay where they still exist.
        """
        model = result.view_model()
        before = self.view_controls
        if model is None:
            self.view_controls = None
            self.view_box.children = ()
            self.view_box.layout.display = "none"
            if before is not None:
                take_down(before)
            return
        kept = self._valid_view(result)
        schema = model.model_json_schema()
        if before is None or before.model.model_json_schema() != schema:
            self.view_controls = Controls(model, kept, changed=guarded(self.job.note, self._draw), live=True)
            self.view_box.children = [self.view_controls]
            self.view_box.layout.display = ""
            if before is not None:
                take_down(before)

    def _valid_view(self, result: Result) -> dict[str, Any]:
        model = result.view_model()
        if model is None:
            return {}
        chosen = {
            **self._wanted_view,
            **(self.view_controls.values if self.view_controls is not None else {}),
        }
        settings: dict[str, Any] = {}
        for name, value in chosen.items():
            if name in model.model_fields:
                try:
                    settings |= model(**{name: value}).model_dump(mode="json", include={name})
                except ValueError:  # a choice this result does not have
                    continue
        return model(**settings).model_dump(mode="json")

    def _draw(self) -> None:
        result = self.result
        if result is None:
            return
        figure = result.figure(**self._valid_view(result))
        other = self._compared()
        table, second = "", None
        if other is not None:
            name, earlier = other
            table = differences(result, earlier, name)
            drawn = earlier.figure(**self._valid_view(earlier))
            if self.comparison.how.value == "over it" and can_overlay(figure, drawn):
                figure = overlay(figure, drawn, name)
            else:
                second = drawn
                second.update_layout(title_text=f"{name}: {drawn.layout.title.text or ''}")
                on_shared_axes(figure, second)
        self.plot.figure = figure
        if second is not None or self.beside.spec["data"]:
            self.beside.figure = second
        self.beside.layout.display = "" if second is not None else "none"
        self.comparison.say(table)

    def _offer_comparisons(self) -> None:
        earlier = {self._runs - back: result for back, result in enumerate(reversed(self.results))}
        del earlier[self._runs]
        self.comparison.offer(earlier, self.results[-1])

    def _compared(self) -> tuple[str, Result] | None:
        number = self.comparison.pick.value
        return (f"run {number}", self.results[number - self._runs - 1]) if number else None

    # ---- report --------------------------------------------------------------------------------------------
    def _make_report_row(self) -> None:
        self.sender = ipywidgets.Button(
            description="Send to report",
            icon="file-text-o",
            layout=ipywidgets.Layout(width="auto"),
            tooltip="Write these settings as report parameters and make the report in the background",
        )
        self.report_note = Note()
        self.report: Report | None = None
        self.sender.on_click(guarded(self.report_note, lambda _: self.send_to_report()))
        self.report_row = ipywidgets.HBox(
            [self.sender, self.report_note],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"),
        )
        self.report_row.add_class("wb-section")

    def send_to_report(self) -> Report:
        """Write the settings as a file of parameters and start the headless report;
        returns it without waiting.
        """
        check_known_elsewhere(self.instrument)
        self.report = Report(self.parameters, self._folder, guarded(self.report_note, self._told))
        return self.report

    def _told(self, report: Report) -> None:
        settings = f"settings: <code>{html.escape(str(report.parameters))}</code>"
        if report.state == "done":
            self.report_note.value = f'<span role="status">report: {report.link()} &nbsp; {settings}</span>'
        elif report.error:
            text = (
                '<span role="alert" class="wb-error">report failed: '
                f"{html.escape(report.error)}</span> {settings}"
            )
            self.report_note.value = text + (
                f" &nbsp; partial: {report.link()}" if report.html.exists() else ""
            )
        else:
            self.report_note.value = f'<span role="status">{html.escape(report.state)}</span>'

    # ---- a view of its own --------------------------------------------------------------------------------
    def opened(self, progress: Progress | None = None) -> Any:
        """What the panel works on, opened if it is still a name."""
        if isinstance(self.on, str):
            self.on = workbench.reports.reopen(self.kind, self.on, progress=progress)
        return self.on

    def offer(self, view: Any) -> None:
        """A button that opens `view.beside(self)` under the panel, and closes it again."""
        button = ipywidgets.ToggleButton(
            description=view.caption, tooltip=view.caption, layout=ipywidgets.Layout(width="auto")
        )
        note, place = Note(), ipywidgets.VBox()

        def show(change: Mapping[str, Any]) -> None:
            before, place.children = place.children, ()
            for shown in before:
                take_down(shown)
            note.say("opening" if change["new"] else "")
            if change["new"]:
                place.children = (view.beside(self),)
                note.say("")

        button.observe(guarded(note, show), "value")
        row = ipywidgets.HBox([button, note], layout=ipywidgets.Layout(flex_flow="row wrap"))
        self.special = ipywidgets.VBox([row, place])
        self.special.add_class("wb-section")
        self.special.add_class("wb-special")
        self.children = (*self.children, self.special)

    # ---- elsewhere -----------------------------------------------------------------------------------------
    def _title(self) -> str:
        about = (self.kind.__doc__ or "").strip().split("\n\n")[0]
        return (
            f"<h3>{html.escape(self.kind.name())} on "
            f"{html.escape(Path(self._name).name)}</h3><p>{html.escape(' '.join(about.split()))}</p>"
        )

    def _ipython_display_(self) -> None:
        """The live panel, and below it what stays in the saved notebook."""
        from IPython.display import display

        if os.environ.get("WORKBENCH_HEADLESS"):
            display(self._repr_mimebundle_(), raw=True)
            return
        bundle = super()._repr_mimebundle_()
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        display(data, raw=True, metadata=metadata)
        self._kept = Kept()
        self.add_class("wb-kept-below")
        if self.result is not None:
            self._kept.keep(self.plot, self._facts_kept(), self.result.summary())

    def _facts_kept(self) -> str:
        """Facts with the settings, the table and the next step, as HTML that needs no style sheet."""
        if self.result is None:
            return self._title() + settings_html(self.controls.values)
        code = html.escape(code_of(self.result.instrument, self._name))  # type: ignore[arg-type]
        return f"{self._title()}{self.result._repr_html_()}<p>Again:</p><pre>{code}</pre>"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any] | tuple[dict[str, Any], dict[str, Any]]:
        """The live view, and beside it what other viewers, reports and the exporter show:
        figure, summary and table.
        """
        twin = {"text/plain": f"panel of {self.kind.name()} on {self._name}", **self.plot.static_twin()}
        twin["text/html"] = (
            self.result._repr_html_()
            if self.result is not None
            else self._title() + settings_html(self.controls.values)
        )
        if os.environ.get("WORKBENCH_HEADLESS"):
            return twin
        bundle = super()._repr_mimebundle_(**options)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        return {**data, **twin}, metadata
