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

from workbench.errors import BadInput
from workbench.latency import count_flops
from workbench.progress import Progress
from workbench.pruning.pattern import Dimension
from workbench.pruning.recovery.pat import learn_channels
from workbench.pruning.recovery.recovery import Recovery, distilled_loss
from workbench.pruning.saliency.dimensions import check_saliency, keep
from workbench.pruning.schedule import sparsities
from workbench.results import Result
from workbench.subjects import Batch, Subject
from workbench.subjects.structure.dimensions import (
    check_shrinkable,
    extent,
    left_after,
    names_of,
    shrink,
    stacks,
)
from workbench.subjects.structure.removal import record_of
from workbench.training.chosen import chosen_settings

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


def check_dimension(prune: PrunePlan, on: Any, pattern: Dimension) -> None:
    """Say why a combination with channels, layers or experts makes no sense, before anything is computed."""
    kind, (saliency, compensation, _) = pattern.kind, prune.composition()
    check_shrinkable(on.model, kind)
    total, step = extent(on.model, kind)
    check_saliency(kind, saliency)
    if compensation != "none":
        raise BadInput(
            f"compensation: {compensation} refits single matrices, and {kind} go from all of them at once; "
            "leave it out"
        )
    if prune.allocation != "preset":
        raise BadInput(
            f"allocation: {prune.allocation} makes no sense for {kind}, "
            "which are compared over the whole model (experts: in each layer); leave it out"
        )
    if prune.layers != "blocks":
        raise BadInput(
            f"layers: {prune.layers!r}: {kind} are cut from the whole model; leave layers at blocks"
        )
    if not prune.remove:
        raise BadInput(f"remove: {kind} cannot be masked, only removed; leave remove at true")
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
    if saliency == "learned" and (
        prune.recovery not in ("finetune", "low-rank") or prune.schedule != "one-shot"
    ):
        raise BadInput(
            "saliency: learned channels are found by training; "
            "give recovery finetune or low-rank, recovery_steps and schedule one-shot"
        )


def left_at(on: Any, kind: str, sparsity: float) -> int:
    """Units of the model that stay at a sparsity; every list of blocks keeps at least one."""
    total, step = extent(on.model, kind)
    return left_after(total, sparsity, step, len(stacks(on.model)) if kind == "layers" else 1)


def train(
    prune: PrunePlan, on: Subject, teacher: Subject | None, done: int, steps: int, progress: Progress
) -> tuple[list[dict[str, float]], float]:
    """`steps` of recovery after `done` earlier ones, on one learning-rate schedule;
    returns (curve, trained share).
    """
    run = ShrunkRecovery(
        on,
        on.layers(prune.layers),
        prune.recovery,
        prune.recovery_steps,
        prune.lr,
        prune.batch_size,
        seed=prune.seed + done,
        rank=prune.rank,
        teacher=teacher,
        progress=progress,
        settings=chosen_settings(prune),
    )
    run.skip(done)
    run.advance(steps)
    run.finish()
    return run.curve, run.trainable_share


def prune_dimension(prune: PrunePlan, on: Subject, pattern: Dimension, progress: Progress) -> Result:
    """The `prune` instrument for a dimension: events of choosing and rebuilding, with recovery before,
    between and after.
    """
    kind, saliency = pattern.kind, prune.composition()[0]
    facts = {f"dense_{k}": v for k, v in on.evaluated(prune.test_split, progress=progress).items()}
    dense = on.copy()
    batch = next(dense.batches(prune.test_split, min(prune.batch_size, 16)))
    total = extent(on.model, kind)[0]
    alive = [
        layer.name for layer in on.layers(prune.layers)
    ]  # the dense layers, by the names they have by now ("" when gone)
    events = sparsities(prune.schedule, prune.sparsity, prune.steps)
    between = prune.steps_between(len(events))
    teacher = dense if prune.recovery == "distil" else None
    history: list[dict[str, float]] = []
    curve: list[dict[str, float]] = []
    lost: list[dict[str, Any]] = []
    distances = None
    for number, sparsity in enumerate(events):
        if progress.stopped:
            break
        if between:
            curve += train(prune, on, teacher, len(curve), between, progress)[0]
        left = left_at(dense, kind, sparsity)
        if saliency == "learned":
            kept, curve = learn_channels(
                on,
                left,
                prune.recovery,
                prune.recovery_steps,
                prune.lr,
                prune.batch_size,
                prune.rank,
                prune.seed,
                progress,
                chosen_settings(prune),
            )
        else:
            calibration = prune.calibration(on, on.layers(prune.layers), progress)
            kept = keep(kind, saliency, left, calibration)
            if kind == "layers" and distances is None:
                distances = distance_table(on, prune, progress)
        if progress.stopped:
            break
        lost += gone_units(on, kind, kept, number + 1)
        alive = renamed(on, kind, kept, alive)
        on = on.with_model(shrink(on.model, kind, kept))
        history.append(
            {"step": number + 1, "trained": len(curve), "left": left, "sparsity": 1 - left / total}
        )
    share = None
    if prune.recovery != "none" and saliency != "learned":
        more, share = train(prune, on, teacher, len(curve), prune.recovery_steps - len(curve), progress)
        curve += more
    table = layer_sizes(dense, on, alive, prune.layers)
    facts = shrunk_facts(prune, dense, on, batch, table, kind, total, history) | facts
    if prune.predict_examples and not progress.stopped:
        before, after = (
            s.evaluate(prune.calibration_split, limit=prune.predict_examples)["loss"] for s in (dense, on)
        )
        facts["measured_change"] = after - before
    if not progress.stopped:
        facts |= on.evaluate(prune.test_split, progress=progress)
    tables = {"units": pd.DataFrame(lost, columns=["event", "group", "unit"])}
    if len(history) > 1:
        tables["schedule"] = pd.DataFrame(history)
    if curve:
        tables["recovery"] = pd.DataFrame(curve)
    if share is not None:
        facts["trained_share"] = share
    if distances is not None:
        tables["distances"] = distances
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
    saliency, left = prune.composition()[0], int(history[-1]["left"]) if history else total
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
        "dense_bytes": 4 * dense.parameter_count(),
        "packed_bytes": 4 * on.parameter_count(),
        **flops,
        "composition": f"{saliency} x {kind} x none x {prune.schedule} x {prune.recovery}",
    }
