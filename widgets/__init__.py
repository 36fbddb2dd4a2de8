"""Interactive views: `panel` for any instrument, `Bench` to pick one, `PlotView` for figures,
`Bitmap` for large matrices, `Results` for every stored run. `PANELS` names the panels that are made for one
instrument.
"""

from widgets.bench import Bench
from widgets.bitmap import Bitmap
from widgets.opening import PANELS, panel
from widgets.panels import Panel
from widgets.plot import PlotView
from widgets.results import Results

__all__ = ["PANELS", "Bench", "Bitmap", "Panel", "PlotView", "Results", "panel"]
