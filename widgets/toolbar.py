"""A panel's settings as code or as a command, to be copied, and the ways back to others.

command_of(Prune(sparsity=0.7), "digits-vit")
    # workbench run prune --subject digits-vit --sparsity 0.7
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import traitlets

from widgets.jobs import Note, guarded
from widgets.sending import source_of
from widgets.settings.controls import Controls
from widgets.settings.parameters import published, what_decides
from widgets.whole import Whole
from workbench.commands.as_typed import plain
from workbench.errors import BadInput
from workbench.instruments import Instrument
from workbench.results import Result

ANY = "a published method"
KINDS = {"code": "Copy as code", "command": "Copy as command"}


def named(on: Any) -> str:
    """What opens this subject or these runs again; saved first where they have no name."""
    return on if isinstance(on, str) else source_of(on)


def code_of(instrument: Instrument, on: Any) -> str:
    """A cell that makes the same result."""
    cls = type(instrument)
    fields = ", ".join(f"{name}={plain(value)!r}" for name, value in instrument.given().items())
    opened = f"workbench.subject({named(on)!r})"
    imports = "import workbench\n"
    if instrument.on == "runs":
        opened, imports = f"load_runs({named(on)!r})", "from workbench.scaling import load_runs\n"
    return (
        f"{imports}from {cls.__module__} import {cls.__name__}\n\n"
        f"result = {cls.__name__}({fields}).run({opened})\nresult.figure()"
    )


class Toolbar(Whole, anywidget.AnyWidget):
    """Buttons that copy what `texts` make: kind -> a function that gives the text when it is asked for."""

    _esm = Path(__file__).with_name("toolbar.js").read_text(encoding="utf-8")
    kinds: traitlets.List[Any] = traitlets.List().tag(sync=True)

    def __init__(self, texts: Mapping[str, Callable[[], str]]) -> None:
        self._texts = dict(texts)
        super().__init__(kinds=[[kind, KINDS[kind]] for kind in texts])
        self.on_msg(lambda _, message, __: self.send(self.answer(message)))

    def answer(self, message: Mapping[str, Any]) -> dict[str, str]:
        """The text that was asked for, or why there is none."""
        try:
            return {"text": self._texts[str(message.get("kind"))]()}
        except (BadInput, OSError) as error:
            return {"error": str(error)}
        except KeyError:
            return {"error": f"{message.get('kind')!r} is none of {', '.join(self._texts)}"}


class Tools(Whole, ipywidgets.HBox):
    """Settings as a whole: published methods to start from, the way back, and what copies them.

    texts : as for `Toolbar`;  shown() : the result whose settings "Back to the run shown" brings back
    """

    def __init__(
        self,
        kind: type[Instrument],
        controls: Controls,
        note: Note,
        texts: Mapping[str, Callable[[], str]],
        shown: Callable[[], Result | None],
    ) -> None:
        self._kind, self._controls, self._shown = kind, controls, shown
        known = [] if os.environ.get("WORKBENCH_HEADLESS") else list(published(kind))
        self.preset = ipywidgets.Dropdown(
            description="start from",
            options=[ANY, *known],
            style={"description_width": "initial"},
            tooltip="the settings of a published method",
            layout=ipywidgets.Layout(width="auto", display="" if known else "none"),
        )
        self.reset = self._button("Reset", "Every setting as it began")
        self.back = self._button("Back to the run shown", "The settings of the figure")
        self.back.disabled = True
        self.preset.observe(guarded(note, lambda change: self._as_published(change["new"])), "value")
        self.reset.on_click(guarded(note, lambda _: controls.replace({})))
        self.back.on_click(guarded(note, lambda _: self._as_shown()))
        self.toolbar = Toolbar(texts)
        row = ipywidgets.Layout(flex_flow="row wrap", align_items="center")
        super().__init__([self.preset, self.reset, self.back, self.toolbar], layout=row)
        self.add_class("wb-section")

    def _button(self, description: str, tooltip: str) -> ipywidgets.Button:
        auto = ipywidgets.Layout(width="auto")
        return ipywidgets.Button(description=description, tooltip=tooltip, layout=auto)

    def _as_published(self, name: str) -> None:
        if name != ANY:
            self._controls.replace(what_decides(published(self._kind)[name]))
            self.preset.value = ANY

    def _as_shown(self) -> None:
        result = self._shown()
        if result is not None:
            self._controls.replace(what_decides(result.instrument))  # type: ignore[arg-type]
