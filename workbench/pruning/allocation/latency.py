"""Pruning to a speed-up: a measured latency table and the search for what each group may keep
(Kurtic et al. 2023, ZipLM).

The table holds, for heads and for neurons, how much faster the whole model runs when every group has lost so
many units, so it contains whatever the device makes of the smaller shapes.
A group's share of that saving is its part in the sum.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.latency import timed
from workbench.progress import Progress
from workbench.pruning.allocation.shares import Allocation
from workbench.pruning.axes import SPARSITY_ALLOCATION
from workbench.pruning.engine.structures import Asked, Scored
from workbench.subjects import Subject
from workbench.subjects.structure.removal import remove
from workbench.subjects.structure.units import Group, discover

SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.95)
BUCKETS = 400


@dataclass
class LatencyTable:
    """Seconds of one forward pass: `dense`, and `seconds[kind][i]` with `removed[kind][i]` of a group's units
    gone everywhere.
    """

    dense: float
    removed: dict[str, list[int]]
    seconds: dict[str, list[float]]
    groups: dict[str, int]

    def saved(self, kind: str) -> np.ndarray:
        """Seconds one group of this kind saves at each level;
        never negative and never falling with more removed.
        """
        gain = (self.dense - np.asarray(self.seconds[kind])) / self.groups[kind]
        return np.maximum.accumulate(np.maximum(gain - gain[0], 0.0))


def levels(group: Group) -> list[int]:
    """The numbers of removed units that are timed."""
    step = 8 if group.experts > 1 else 1
    most = (group.units - 1) // step * step
    return sorted({min(round(share * group.units / step) * step, most) for share in SHARES})


def measure_table(
    on: Subject,
    kinds: Sequence[str],
    batch_size: int = 16,
    repeats: int = 5,
    split: str = "calibration",
    progress: Progress | None = None,
) -> LatencyTable:
    """Time the model with units removed from all groups of one kind;
    all variants take turns, so noise falls on all alike.
    """
    progress = progress or Progress()
    batch = next(on.batches(split, batch_size))
    found = discover(on.model, kinds)
    variants: list[tuple[str, int, torch.nn.Module]] = []
    removed: dict[str, list[int]] = {}
    for kind in kinds:
        mine = [g for g in found if g.kind == kind]
        if len({g.units for g in mine}) != 1:
            raise BadInput(
                "allocation: latency needs groups of equal size to start from, "
                f"and the {kind} of this model differ between layers"
            )
        removed[kind] = levels(mine[0])
        for count in removed[kind]:
            kept = {g.name: torch.arange(g.units).ge(count).expand(g.experts, -1) for g in mine}
            variants.append((kind, count, remove(copy.deepcopy(on.model), kept) if count else on.model))
    samples: dict[tuple[str, int], list[float]] = {(kind, count): [] for kind, count, _ in variants}
    for _ in progress.track(range(repeats), "latency table"):
        for kind, count, model in variants:

            def run(model: torch.nn.Module = model) -> None:
                with torch.inference_mode():
                    on.task.output(model, batch)

            samples[kind, count].append(timed(run, 2, on.device)[-1])
    if progress.stopped:
        raise BadInput("allocation: stopped while the latency table was being measured")
    # The fastest of several runs: whatever else the machine does can only add.
    middle = {key: min(values) for key, values in samples.items()}
    dense = min(t for (_, count), values in samples.items() if count == 0 for t in values)
    seconds = {kind: [middle[kind, count] for count in removed[kind]] for kind in kinds}
    return LatencyTable(dense, removed, seconds, {kind: sum(g.kind == kind for g in found) for kind in kinds})


def choose(
    scored: Sequence[Scored], table: LatencyTable, speedup: float, weights: Sequence[float] | None = None
) -> list[int]:
    """How many units each group loses so that the table's time is at most dense / speedup and the summed
    relative cost is least.

    Dynamic programming over groups and discretised savings; a group's cost is divided by that of removing all
    of it (for `obs` this is the relative output error). `weights` scale the groups' costs (SPDY's
    sensitivities). `BadInput` when even the largest removals are not fast enough.
    """
    needed = table.dense * (1 - 1 / speedup)
    unit = needed / BUCKETS if needed > 0 else 1.0
    best = np.full(BUCKETS + 1, np.inf)
    best[0] = 0.0
    back: list[np.ndarray] = []
    for number, s in enumerate(scored):
        saved, counts = table.saved(s.group.kind), table.removed[s.group.kind]
        cost = (
            s.cost.double().numpy()
            / max(float(s.cost[-1]), 1e-30)
            * (1.0 if weights is None else weights[number])
        )
        new, choice = np.full(BUCKETS + 1, np.inf), np.zeros(BUCKETS + 1, dtype=int)
        for level, (gain, count) in enumerate(zip(saved, counts, strict=True)):
            shift = int(gain / unit)  # rounded down: the chosen removals save at least what is counted
            reached = np.minimum(np.arange(BUCKETS + 1) + shift, BUCKETS)
            candidate = best + cost[min(count, s.most())]
            order = np.argsort(
                -candidate, kind="stable"
            )  # the best of several that reach the same bucket is written last
            better = candidate[order] < new[reached[order]]
            for source in order[better]:
                if candidate[source] < new[reached[source]]:
                    new[reached[source]] = candidate[source]
                    choice[reached[source]] = level * (BUCKETS + 1) + source
        best = new
        back.append(choice)
    if not np.isfinite(best[BUCKETS]):
        most = sum(float(table.saved(s.group.kind)[-1]) for s in scored)
        limit = table.dense / max(table.dense - most, 0.01 * table.dense)
        raise BadInput(
            f"speedup: {speedup:g} cannot be reached by removing {' and '.join(table.seconds)}; "
            f"the most is {limit:.2f}"
        )
    picked, at = [], BUCKETS
    for s, choice in zip(reversed(scored), reversed(back), strict=True):
        level, at = divmod(int(choice[at]), BUCKETS + 1)
        picked.append(min(table.removed[s.group.kind][level], s.most()))
    return picked[::-1]


def expected_seconds(scored: Sequence[Scored], counts: Sequence[int], table: LatencyTable) -> float:
    """What the table says a choice takes."""
    total = table.dense
    for s, count in zip(scored, counts, strict=True):
        total -= float(np.interp(count, table.removed[s.group.kind], table.saved(s.group.kind)))
    return max(total, 0.01 * table.dense)


def reach(
    on: Subject,
    scored: Sequence[Scored],
    table: LatencyTable,
    speedup: float,
    batch_size: int = 16,
    split: str = "calibration",
    rounds: int = 4,
    tolerance: float = 0.03,
) -> tuple[list[int], float]:
    """`choose`, corrected by timing the model it leads to; returns (counts, measured speed-up).

    The table adds up what groups save by themselves, which leaves out what they do together. So the small
    model is timed in turns with the dense one, and the speed-up that is asked of the table is scaled until
    the measured one is within `tolerance` or the rounds are over; the nearest is kept.
    """
    asked, best = speedup, ([0] * len(scored), 1.0)
    for _ in range(rounds):
        try:
            counts = choose(scored, table, asked)
        except BadInput:
            if best[1] > 1.0:  # the correction asks for more than can go; what was found stands
                break
            raise
        kept = {s.group.name: s.kept(min(count, s.most())) for s, count in zip(scored, counts, strict=True)}
        small = on.with_model(remove(copy.deepcopy(on.model), kept))
        measured = measured_speedup(on, small, batch_size, 7, split)
        if abs(measured / speedup - 1) < abs(best[1] / speedup - 1):
            best = (counts, measured)
        if abs(measured / speedup - 1) <= tolerance:
            break
        asked = max(asked * speedup / measured, 1.01)
    return best


def measured_speedup(
    dense: Subject, small: Subject, batch_size: int = 16, repeats: int = 11, split: str = "calibration"
) -> float:
    """Median ratio of the two models' times, run in turns on the same batch."""
    batch = next(dense.batches(split, batch_size))

    def run(on: Subject) -> float:
        def forward() -> None:
            with torch.inference_mode():
                on.task.output(on.model, batch)

        return timed(forward, 2, on.device)[-1]

    return statistics.median([run(dense) / run(small) for _ in range(repeats)])


class Speedup(Options):
    speedup: float = parameter(1.0, "measured speed-up to reach", ge=1, step=0.1)
    batch_size: int = parameter(16, "examples in the batch that is timed", ge=1, unit="examples")


@SPARSITY_ALLOCATION.add(
    "latency",
    formula="min cost with time <= dense / speedup",
    source="Kurtic, Frantar and Alistarh 2023 (ZipLM); Frantar and Alistarh 2022 (SPDY)",
    options=Speedup,
    traits="structures",
    beside={"pattern": "neurons", "allocation.speedup": 1.5},
)
class Latency(Allocation):
    @staticmethod
    def counts(asked: Asked, options: Speedup) -> list[int]:
        on, split, batch_size = asked.on, asked.calibration.split, options.batch_size
        table = on.memo(
            ("latency table", asked.kinds, batch_size, split),
            lambda: measure_table(on, asked.kinds, batch_size, split=split, progress=asked.progress),
        )
        counts, _ = reach(on, asked.scored, table, options.speedup, batch_size, split)
        expected = table.dense / expected_seconds(asked.scored, counts, table)
        asked.facts.update({"target_speedup": options.speedup, "expected_speedup": expected})
        return counts

    @staticmethod
    def check(prune: Any, options: Speedup) -> None:
        if options.speedup <= 1 or not prune.pattern.options.model_dump().get("remove"):
            raise BadInput(
                f"allocation.speedup: {options.speedup:g} with allocation latency and {prune.pattern}; "
                "a speed-up above 1, allocation latency and removed heads or neurons belong together"
            )
        if not prune.sparsity_schedule.has("at once"):
            raise BadInput(
                "sparsity_schedule: allocation latency is one-shot; prune again with a larger speed-up to "
                "go on gradually"
            )

    @staticmethod
    def reached(dense: Subject, small: Subject, split: str, options: Speedup) -> dict[str, float]:
        return {"speedup": measured_speedup(dense, small, options.batch_size, split=split)}
