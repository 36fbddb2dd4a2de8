"""The axis of batch-size rules: how many examples the next step takes.

An entry is a function (options) -> callback that sets `run.batch_size` when gradients are complete and before
they are clipped, or None for a size that stays.
"""

from __future__ import annotations

from workbench.axis import Axis, Options

BATCH_RULE = Axis(
    "batch-rule",
    "how the batch size changes over a run",
    found_in=("workbench.training.batch.rules", "workbench.training.batch.batch_size"),
)


@BATCH_RULE.add("fixed", formula="B", source="")
def fixed(options: Options) -> None:
    """The batch size stays."""
