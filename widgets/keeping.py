"""What a panel shows, kept in the notebook's file: its figure and facts as outputs that need no kernel.

They stand below the panel and are hidden while it lives (workbench.css); a notebook that is opened without a
kernel, exported or shown by another viewer has them.
"""

from __future__ import annotations

from typing import Any

from widgets.plot import PlotView

#: Hides the panel's own output where its kernel is gone: JupyterLab says there that a model is not found.
DEAD = (
    "<style>.jp-OutputArea-child:has(.jupyter-widgets):not(:has(.jupyter-widgets *))"
    ":has(+ .jp-OutputArea-child + .jp-OutputArea-child .wb-kept) { display: none; }</style>"
)
#: Outputs below a panel: the figure; facts, table and the next step.
COUNT = 2


class Kept:
    """Two outputs below the cell's panel; `keep` writes them over."""

    def __init__(self) -> None:
        from IPython.display import display

        self._places = [display({"text/plain": ""}, raw=True, display_id=True) for _ in range(COUNT)]

    def keep(self, plot: PlotView, facts: str, text: str) -> None:
        """The figure as Plotly's JSON and, once the page has drawn it, as a picture; `facts` is HTML."""
        figure = {"text/plain": text, **plot.static_twin()}
        self._write(0, figure)
        self._write(1, {"text/html": f'{DEAD}<div class="wb-kept">{facts}</div>', "text/plain": text})
        plot.ask_picture(lambda png: self._write(0, figure | {"image/png": png}))

    def _write(self, number: int, bundle: dict[str, Any]) -> None:
        place = self._places[number]
        if place is not None:  # else there is no page
            place.update(bundle, raw=True)
