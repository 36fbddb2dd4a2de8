"""Which panel an instrument gets: the general one, or one made for it.

    widgets.panel(Prune, "digits-vit", sparsity=0.7)
    widgets.panel.from_parameters("reports/prune.yaml")
    widgets.PANELS["my-instrument"] = MyPanel

A subclass of `Panel` stands in the general panel's place: it is called as `MyPanel(on, instrument=...,
**options)`. Any other widget is a view of its own that the general panel offers by a button: it has a
`caption` for the button and `beside(panel)`, which makes it for the panel's subject and settings.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from widgets.panels import Panel
from widgets.settings.parameters import read_parameters
from workbench.instruments import Instrument

#: Instrument's command-line name -> its special panel: a class, or "module:Class" (imported when needed).
PANELS: dict[str, Any] = {
    "spectrum": "widgets.spectrum:SpectrumPanel",
    "saliency-map": "widgets.sparsity:SparsityPanel",
    "quantize": "widgets.quantization:FormatPanel",
    "allocate": "widgets.quantization:AllocationPanel",
    "allocation-scores": "widgets.quantization:AllocationPanel",
    "train": "widgets.training:SchedulePanel",
    "scaling-fit": "widgets.scaling:ScalingPanel",
}


def special(name: str) -> Any:
    """The class registered for the instrument called so; None when there is none."""
    found = PANELS.get(name)
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = getattr(importlib.import_module(module), attribute)
    return found


class Opener:
    """`panel(instrument, on, **options)`, options as for `Panel`; `panel.from_parameters(file)`."""

    def __call__(self, instrument: type[Instrument] | Instrument, on: Any, **options: Any) -> Panel:
        view = special(instrument.name())
        if isinstance(view, type) and issubclass(view, Panel):
            made: Any = view
            return made(on, instrument=instrument, **options)
        panel = Panel(instrument, on, **options)
        if view is not None and not os.environ.get("WORKBENCH_HEADLESS"):
            panel.offer(view)
        return panel

    def from_parameters(self, source: str | os.PathLike[str] | Mapping[str, Any]) -> Panel:
        """The panel that these parameters (a YAML or JSON file, or a mapping) were sent from."""
        instrument, on, view = read_parameters(source)
        return self(instrument, on, view=view)


panel = Opener()
