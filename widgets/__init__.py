"""Interactive views: `panel` for any instrument, `Bench` to pick one, `PlotView` for figures,
`Bitmap` for large matrices.
"""

from widgets.bench import Bench
from widgets.bitmap import Bitmap
from widgets.panels import Panel
from widgets.plot import PlotView

#: `widgets.panel(Prune, subject)` and `widgets.panel.from_parameters(file)`.
panel = Panel

__all__ = ["Bench", "Bitmap", "Panel", "PlotView", "panel"]
