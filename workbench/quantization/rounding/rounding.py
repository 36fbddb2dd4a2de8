"""The axes of roundings: how a weight chooses its grid point, and what the learned ones minimise."""

from __future__ import annotations

from workbench.axis import Axis

#: `entry(problem, options)` gives values on a grid and that grid; with the trait "learned" it gives a
#: `LearnedRounding`. Further traits say what a format must have ("needs equal steps", "needs zero points",
#: "needs real scales"), or what goes with it ("any grid": asks a grid for nothing but its values;
#: "column factors": has a transform of its own; "rows apart": a row's values depend on no other row).
ROUNDING = Axis(
    "rounding",
    "how weights are put on the grid",
    found_in="workbench.quantization.rounding",
    home="quantize.rounding",
)

#: What a learned rounding reconstructs.
OBJECTIVE = Axis(
    "rounding-objective",
    "what is reconstructed: each layer's output, or that of a window of blocks",
    found_in="workbench.quantization.rounding",
)
