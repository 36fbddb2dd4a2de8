"""Pruning of channels, layers and experts: units are chosen, the model is built smaller,
and training goes on with it.

There are no masks: a norm's statistics change with its channels, and a block that is left out is not a block
of zeros where the norm follows the sum. So every event of a schedule makes a smaller model, and the optimizer
of the recovery starts anew with it (its learning rate goes on along one schedule). The second-order
prediction that stands beside other prunings is of changes of weights and has no meaning here;
the loss on the calibration examples is measured before and after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.latency import count_flops
from workbench.measures.reference import measured_beside, reference_of
from workbench.progress import Progress
from workbench.pruning.axes import PATTERN
from workbench.pruning.pattern import Dimension, Form
from workbench.pruning.recovery.recovery import Recovery, distilled_loss
from workbench.pruning.saliency.dimensions import check_saliency, keep
from workbench.results import Result
from workbench.subjects import Batch, Subject
from workbench.subjects.stored import bytes_of_weights, dense_size
from workbench.subjects.structure.depth import stacks
from workbench.subjects.structure.dimensions import (
    cannot,
    check_shrinkable,
    extent,
    left_after,
    names_of,
    shrink,
    try_shrinking,
)
from workbench.subjects.structure.removal import record_of
from workbench.training.resume import remembered

if TYPE_CHECKING:
    from workbench.pruning.plan import PrunePlan


class ShrunkRecovery(Recovery):
    """Recovery of a model with fewer blocks: the teacher's hidden states belong to other blocks,
    so only its outputs are matched.
    """

    def loss(self, on: Subject, batch: Batch) -> Tensor:
        if self.kind != "distil" or self.teacher is None:
            return on.loss(batch)
        return distilled_loss(on, self.teacher, batch, self.temperature, hidden_states=False)


def check_dimension(prune: PrunePlan, on: Any, kind: str) -> None:
    """Say why a combination with channels, layers or experts makes no sense, before anything is computed."""
    saliency, compensation = prune.saliency, prune.compensation
    check_shrinkable(on.model, kind)
    total, step = extent(on.model, kind)
    check_saliency(kind, saliency)
    if not compensation.has("nothing") or compensation.has("bias"):
        raise BadInput(
            f"compensation: {compensation} refits single matrices, and {kind} go from all of them at once; "
            "leave it out"
        )
    if prune.allocation != prune.parts()["allocation"]:
        raise BadInput(
            f"allocation: {prune.allocation} makes no sense for {kind}, "
            "which are compared over the whole model (experts: in each layer); leave it out"
        )
    if prune.layers != "blocks":
        raise BadInput(
            f"layers: {prune.layers!r}: {kind} are cut from the whole model; leave layers at blocks"
        )
    if record_of(on.model):
        raise BadInput(
            f"pattern: {kind} have to go before heads or neurons: "
            "this model has removed some that its configuration cannot express"
        )
    if prune.sparsity > 0 and left_at(on, kind, prune.sparsity) == total:
        raise BadInput(
            f"sparsity: {prune.sparsity:g} of {total} {kind} in steps of {step} is none; "
            f"the smallest is about {step / total:.2f}"
        )
    if prune.sparsity > 0:
        try_shrinking(on.model, kind, left_at(on, kind, prune.sparsity))
    if saliency.entry.needs == "training" and (
        prune.recovery not in ("finetune", "low-rank") or not prune.sparsity_schedule.has("at once")
    ):
        raise BadInput(
            f"saliency: {saliency} channels are found by training; "
            "give recovery finetune or low-rank, recovery.steps and sparsity_schedule one-shot"
        )


def left_at(on: Any, kind: str, sparsity: float) -> int:
    """Units of the model that stay at a sparsity; every list of blocks keeps at least one."""
    total, step = extent(on.model, kind)
    return left_after(total, sparsity, step, len(stacks(on.model)) if kind == "layers" else 1)


class Dimensions:
    """Events of choosing and rebuilding, with recovery before, between and after."""

    def __init__(self, prune: PrunePlan, pattern: Dimension) -> None:
        self.prune, self.kind = prune, pattern.kind

    def check(self, on: Any) -> None:
        check_dimension(self.prune, on, self.kind)

    def begin(self, on: Subject, progress: Progress) -> None:
        prune = self.prune
        self.on, self.progress = on, progress
        reference_of(on, prune.test_split, progress=progress)
        self.dense_test = on.evaluated(prune.test_split, progress=progress)
        self.dense = on.copy()
        size = min(prune.pattern.options.batch_size, 16)
        self.batch = next(self.dense.batches(prune.test_split, size))
        self.total = extent(on.model, self.kind)[0]
        self.alive = [layer.name for layer in on.layers(prune.layers)]
        # the dense layers, by the names they have by now ("" when gone)
        self.history: list[dict[str, float]] = []
        self.curve: list[dict[str, float]] = []
        self.lost: list[dict[str, Any]] = []
        self.distances: pd.DataFrame | None = None
        self.share: float | None = None

    @property
    def trained(self) -> int:
        return len(self.curve)

    def train(self, steps: int) -> None:
        """Recovery after that of earlier events, on one learning-rate schedule."""
        prune = self.prune
        if prune.saliency.entry.needs == "training":  # its training is the event itself
            return
        run: Recovery | None = prune.recovery(
            self.on,
            self.on.layers(prune.layers),
            self.dense,
            made=ShrunkRecovery,
            seed=prune.seed + self.trained,
            progress=self.progress,
        )
        if run is None:
            return
        run.skip(self.trained)
        run.advance(steps)
        run.finish()
        self.curve += run.curve
        self.share = run.trainable_share

    def event(self, sparsity: float) -> bool:
        prune, kind = self.prune, self.kind
        left = left_at(self.dense, kind, sparsity)
        if prune.saliency.entry.needs == "training":
            kept, self.curve = prune.saliency(self.on, left, prune.recovery, prune.seed, self.progress)
        else:
            kept = remembered(f"event-{len(self.history)}", lambda: self.chosen(left))
            if kind == "layers" and self.distances is None:
                self.distances = pd.DataFrame(
                    remembered(
                        "distances", lambda: distance_table(self.on, prune, self.progress).to_dict("list")
                    )
                )
        if self.progress.stopped:
            return False
        number = len(self.history) + 1
        self.lost += gone_units(self.on, kind, kept, number)
        self.alive = renamed(self.on, kind, kept, self.alive)
        self.on = self.smaller(kept)
        self.history.append(
            {"step": number, "trained": self.trained, "left": left, "sparsity": 1 - left / self.total}
        )
        return True

    def smaller(self, kept: Tensor) -> Subject:
        """The subject with the units that stay; `BadInput` when its model does not compute."""
        try:
            small = self.on.with_model(shrink(self.on.model, self.kind, kept))
            with torch.no_grad():
                small.task.output(small.model, next(small.batches(self.prune.test_split, 2)))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # another library's model at another size: anything can be raised
            raise cannot(self.on.model, f"compute without the removed {self.kind}", error) from error
        return small

    def chosen(self, left: int) -> Tensor:
        """The units that stay, by their saliency."""
        prune = self.prune
        calibration = prune.calibration(self.on, self.on.layers(prune.layers), self.progress)
        return keep(self.kind, prune.saliency, left, calibration)

    def finish(self) -> Result:
        prune, on, progress = self.prune, self.on, self.progress
        table = layer_sizes(self.dense, on, self.alive, prune.layers)
        sizes = shrunk_facts(prune, self.dense, on, self.batch, table, self.kind, self.total, self.history)
        facts = sizes | {f"dense_{k}": v for k, v in self.dense_test.items()}
        if prune.predict_examples and not progress.stopped:
            before, after = (
                s.evaluate(prune.calibration_split, limit=prune.predict_examples)["loss"]
                for s in (self.dense, on)
            )
            facts["measured_change"] = after - before
        if not progress.stopped:
            reference = reference_of(self.dense, prune.test_split, progress=progress)
            facts |= measured_beside(reference, on, prune.test_split, progress=progress)
        tables = {"units": pd.DataFrame(self.lost, columns=["event", "group", "unit"])}
        if len(self.history) > 1:
            tables["schedule"] = pd.DataFrame(self.history)
        if self.curve:
            tables["recovery"] = pd.DataFrame(self.curve)
        if self.share is not None:
            facts["trained_share"] = self.share
        if self.distances is not None:
            tables["distances"] = self.distances
        return prune.result(table, facts, tables=tables, subject=on)


def distance_table(on: Subject, prune: PrunePlan, progress: Progress) -> pd.DataFrame:
    """Angular distance over every run of blocks of the model as it was given."""
    from workbench.pruning.saliency.depth import measure_stacks, table_of

    return table_of(
        measure_stacks(on, prune.calibration_split, prune.calibration_examples, progress=progress)
    )


def gone_units(on: Subject, kind: str, kept: Tensor, event: int) -> list[dict[str, Any]]:
    """One row for every unit that goes: its number in the model as it is at this event."""
    rows = kept if kept.ndim == 2 else kept[None]
    names = names_of(on.model, kind) if kind != "layers" else ["layers"]
    return [
        {"event": event, "group": name, "unit": int(u)}
        for name, row in zip(names, rows, strict=True)
        for u in (~row).nonzero().flatten()
    ]


def renamed(on: Subject, kind: str, kept: Tensor, alive: list[str]) -> list[str]:
    """The layers' names after the blocks in front of them have gone; "" for a layer that goes itself."""
    if kind != "layers":
        return alive
    found: dict[str, str] = {}
    at = 0
    for path, names in stacks(on.model).items():
        stay = [i for i in range(len(names)) if bool(kept[at + i])]
        at += len(names)
        found |= {
            f"{path}.{old}.": f"{path}.{stay.index(old)}." if old in stay else "" for old in range(len(names))
        }
    result = []
    for name in alive:
        prefix = next((p for p in found if name.startswith(p)), None)
        result.append(
            name if prefix is None else found[prefix] + name.removeprefix(prefix) if found[prefix] else ""
        )
    return result


def layer_sizes(dense: Subject, on: Subject, alive: list[str], glob: str) -> pd.DataFrame:
    """One row for each layer of the dense model: its weights and the share of them that went."""
    left = {layer.name: layer.original.numel() for layer in on.layers(glob)}
    rows = []
    for layer, name in zip(dense.layers(glob), alive, strict=True):
        stays = left.get(name, 0)
        rows.append(
            {
                "layer": layer.name,
                "weights": layer.original.numel(),
                "left": stays,
                "sparsity": 1 - stays / layer.original.numel(),
            }
        )
    return pd.DataFrame(rows)


def shrunk_facts(
    prune: PrunePlan,
    dense: Subject,
    on: Subject,
    batch: Batch,
    table: pd.DataFrame,
    kind: str,
    total: int,
    history: list[dict[str, float]],
) -> dict[str, Any]:
    """Sizes before and after: units, weights of the blocks, all parameters, FLOPs of one batch."""
    saliency, left = prune.saliency, int(history[-1]["left"]) if history else total
    with torch.no_grad():
        flops = {"dense_flops": count_flops(dense, batch), "flops": count_flops(on, batch)}
    return {
        "sparsity": 1 - left / total,
        "units": total,
        "units_left": left,
        "weights": int(table.weights.sum()),
        "nonzero": int(table.left.sum()),
        "dense_parameters": dense.parameter_count(),
        "parameters": on.parameter_count(),
        "dense_bytes": dense_size(dense.model) * dense.parameter_count(),
        "packed_bytes": bytes_of_weights(on.model, on.model.parameters()) * on.parameter_count(),
        **flops,
        "composition": f"{saliency} x {kind} x none x {prune.sparsity_schedule} x {prune.recovery}",
    }


class Counted(Options):
    batch_size: int = parameter(
        16, "examples in the batch whose operations are counted, 16 at most", ge=1, unit="examples"
    )


PATTERN.add(
    "channels",
    formula="a hidden channel of the whole model",
    source="Muralidharan et al. 2024",
    options=Counted,
)(Form(lambda options: Dimension("channels"), Dimensions))
PATTERN.add("layers", formula="a block of the whole model", source="Gromov et al. 2024", options=Counted)(
    Form(lambda options: Dimension("layers"), Dimensions)
)
PATTERN.add(
    "experts", formula="an expert of every layer with experts", source="Lu et al. 2024", options=Counted
)(Form(lambda options: Dimension("experts"), Dimensions))
