"""A widget that takes down with it what it is made of: `close()` of ipywidgets closes one widget, and the
list of all widgets keeps every other one, with what its callbacks hold, for as long as the kernel lives.

    class MyPanel(Whole, ipywidgets.VBox): ...
    take_down(controls)                      # the same for a widget of any class
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import ipywidgets


class Whole(ipywidgets.Widget):
    """Closed as a whole. `unseen` names what it made and does not show; `everybodys` is true of what all
    share, which goes with none of them.
    """

    everybodys: ClassVar[bool] = False

    @property
    def unseen(self) -> tuple[ipywidgets.Widget, ...]:
        return ()

    def close(self) -> None:
        parts = list(made_of(self))
        super().close()
        for part in parts:
            take_down(part)


def take_down(widget: ipywidgets.Widget) -> None:
    """Close a widget and everything that it is made of."""
    parts = [] if isinstance(widget, Whole) else list(made_of(widget))  # that one closes its own
    widget.close()
    for part in parts:
        take_down(part)


def made_of(widget: ipywidgets.Widget) -> Iterator[ipywidgets.Widget]:
    """Children, layouts and styles of a widget, and what it keeps unseen; not what all share."""
    values: Any = widget._trait_values
    for name in widget.keys:
        held = values.get(name)
        for part in held if isinstance(held, (list, tuple)) else (held,):
            if isinstance(part, ipywidgets.Widget) and not getattr(part, "everybodys", False):
                yield part
    if isinstance(widget, Whole):
        yield from widget.unseen
