"""The schedule panel: draw and compare learning-rate schedules over a budget, and train with the one chosen.

import widgets.training
widgets.training.SchedulePanel()                       # drawing only
widgets.training.SchedulePanel("digits-vit")
    # and a training panel below, with the chosen schedule's settings
"""

from __future__ import annotations

from typing import Any, ClassVar

import ipywidgets

from widgets.jobs import Note, guarded
from widgets.panels import Panel
from widgets.plot import PlotView
from widgets.whole import Whole
from workbench.errors import BadInput
from workbench.training import Train
from workbench.training.schedule.drawings import schedule_areas, schedule_figure, schedule_table
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE

STARTS_WITH = ("cosine", "linear", "rex", "uba", "wsd")


def drawn() -> tuple[str, ...]:
    """Schedules that have a curve of their own and need nothing but their defaults."""
    return tuple(
        name
        for name, entry in LEARNING_RATE_SCHEDULE.entries.items()
        if "no-curve" not in entry.traits
        and not any(info.is_required() for info in entry.options.model_fields.values())
    )


class SchedulePanel(Whole, ipywidgets.VBox):
    """Schedules drawn from the schedulers themselves. `.table` holds what is drawn: name, step, lr."""

    caption: ClassVar[str] = "Draw and compare schedules"

    @classmethod
    def beside(cls, panel: Panel) -> SchedulePanel:
        """Schedules to draw; the one of the panel among them."""
        settings: Any = panel.instrument
        chosen = str(settings.schedule)
        known = drawn()
        return cls(names=tuple(dict.fromkeys(name for name in (chosen, *STARTS_WITH) if name in known)))

    def __init__(
        self,
        on: Any = None,
        names: tuple[str, ...] = STARTS_WITH,
        steps: int = 1000,
    ) -> None:
        wide = {
            "style": {"description_width": "8rem"},
            "layout": ipywidgets.Layout(width="auto", min_width="0"),
        }
        self.names = ipywidgets.SelectMultiple(
            value=names, options=drawn(), rows=8, description="schedules", **wide
        )
        self.steps = ipywidgets.FloatLogSlider(
            value=steps,
            min=1.3,
            max=5,
            step=0.05,
            description="budget (steps)",
            readout_format=".0f",
            continuous_update=False,
            **wide,
        )
        self.lr = ipywidgets.FloatLogSlider(
            value=1e-3, min=-5, max=0, step=0.05, description="peak rate", readout_format=".2e", **wide
        )
        self.warmup = ipywidgets.FloatSlider(
            value=0.05, min=0.0, max=0.5, step=0.01, description="warm-up", **wide
        )
        self.sampling = ipywidgets.IntSlider(value=1, min=1, max=500, description="sampled every", **wide)
        self.phi = ipywidgets.FloatLogSlider(
            value=0.5, min=-1, max=1.5, step=0.05, description="UBA phi", readout_format=".2f", **wide
        )
        self.note, self.areas, self.plot = Note("ready"), ipywidgets.HTML(), PlotView()
        self.note.layout.flex = "0 0 auto"  # below each other, not beside
        self.areas.add_class("wb-table")
        title = ipywidgets.HTML(
            "<h3>learning-rate schedules</h3><p>Choose several (Ctrl or Shift); "
            "the area is the mean rate over the peak.</p>"
        )
        title.add_class("wb-title")
        controls = [self.names, self.steps, self.lr, self.warmup, self.sampling, self.phi]
        for name, control in zip(
            ("schedules", "steps", "lr", "warmup", "sampling", "phi"), controls, strict=True
        ):
            control.add_class(f"wb-field-{name}")
            control.observe(guarded(self.note, lambda _: self.draw()), "value")
        box = ipywidgets.Box(controls)
        box.add_class("wb-controls")
        children: list[ipywidgets.Widget] = [title, box, self.note, self.plot, self.areas]
        self.training: Panel | None = None
        if on is not None:
            first = next(iter(names), "cosine")
            self.training = Panel(Train, on, schedule=first, warmup=self.warmup.value, start="random")
            children.append(self.training)
        super().__init__(children)
        self.add_class("wb-panel")
        guarded(self.note, self.draw)()

    def draw(self) -> None:
        """Sample the chosen schedules again and draw them."""
        if not self.names.value:
            raise BadInput(f"schedules: choose at least one of {', '.join(drawn())}")
        steps = round(self.steps.value)
        chosen = [{"name": n, "phi": self.phi.value} if n == "uba" else n for n in self.names.value]
        self.table = schedule_table(chosen, steps, self.lr.value, self.warmup.value, self.sampling.value)
        self.plot.figure = schedule_figure(self.table)
        shown = schedule_areas(self.table).rename(columns=lambda name: name.replace("_", " "))
        self.areas.value = shown.to_html(index=False, border=0, float_format=lambda v: f"{v:.3g}")
        self.note.say(f"{len(self.names.value)} schedules over {steps} steps")
