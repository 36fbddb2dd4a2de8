"""One pruning event of heads and neurons: scores of units, how many each group keeps,
and the new weights of their consumers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.pruning.allocation.latency import expected_seconds, measure_table, reach
from workbench.pruning.calibration import Calibration
from workbench.pruning.engine.structures import (
    UNIT_SALIENCIES,
    across,
    adaptive,
    groups_of,
    loss_like,
    prune_structures,
    score,
    uniform,
)
from workbench.pruning.pattern import Structures
from workbench.subjects import Layer, Subject


def check_structures(
    on: Subject,
    layers: Sequence[Layer],
    pattern: Structures,
    saliency: str,
    compensation: str,
    allocation: str,
) -> None:
    """Say why a combination with heads or neurons makes no sense, before anything is computed."""
    groups = groups_of(on, layers, pattern)
    if compensation == "fisher":
        raise BadInput(
            "compensation: fisher updates blocks along a row, which whole heads and neurons cut through; "
            "use least-squares, bias or none"
        )
    if compensation == "obs":
        raise BadInput(
            "compensation: obs chooses weight by weight; for heads and neurons the same optimum is called "
            "least-squares"
        )
    if saliency == "movement":
        raise BadInput(
            "saliency: movement is collected for single weights; "
            "use gradient, taylor2 or obs for heads and neurons"
        )
    if saliency in UNIT_SALIENCIES and not set(pattern.kinds) <= set(UNIT_SALIENCIES[saliency].kinds):
        accepted = " or ".join(UNIT_SALIENCIES[saliency].kinds)
        raise BadInput(
            f"saliency: {saliency} scores {accepted}, not {'+'.join(pattern.kinds)}; "
            "choose another saliency or that pattern"
        )
    if allocation == "erdos-renyi":
        raise BadInput(
            "allocation: erdos-renyi is a rule for densities of matrices; "
            "use layer or global for heads and neurons"
        )
    for group in groups:
        if saliency == "obs" and len(group.consumers) != 1:
            raise BadInput(
                f"saliency: obs needs one consumer for each group and {group.name} ties several together; "
                "use magnitude, wanda or gradient"
            )
        if compensation == "bias" and any(
            m.layer.bias is None or len(m.layer.shape) == 3 for m in group.consumers
        ):
            raise BadInput(
                f"compensation: bias needs a bias and the output of {group.name} has none; "
                "use least-squares or none"
            )


def prune_units(
    on: Subject,
    layers: Sequence[Layer],
    calibration: Calibration,
    pattern: Structures,
    sparsity: float,
    saliency: str,
    compensation: str,
    allocation: str,
    progress: Progress,
    speedup: float = 1.0,
    amplitude: float = 0.1,
    batch_size: int = 16,
    facts: dict[str, float] | None = None,
) -> dict[str, Tensor]:
    """The same event for heads and neurons; returns what each group keeps.
    A speed-up's expectation is put into `facts`.
    """
    groups = groups_of(on, layers, pattern)
    scored = [
        score(g, saliency, calibration, pattern) for g in progress.track(groups, f"units by {saliency}")
    ]
    if progress.stopped:
        return {}
    if allocation == "latency":
        key = ("latency table", pattern.kinds, batch_size, calibration.split)
        table = on.memo(
            key,
            lambda: measure_table(on, pattern.kinds, batch_size, split=calibration.split, progress=progress),
        )
        counts, _ = reach(on, scored, table, speedup, batch_size, calibration.split)
        if facts is not None:
            facts |= {
                "target_speedup": speedup,
                "expected_speedup": table.dense / expected_seconds(scored, counts, table),
            }
    elif allocation == "global":
        counts = across(scored, sparsity, standardise=not loss_like(saliency))
    elif allocation == "adaptive":
        counts = adaptive(scored, sparsity, amplitude, calibration)
    else:
        counts = uniform(scored, sparsity)
    return prune_structures(scored, counts, compensation, calibration, progress)
