"""The first examples of a checkpoint's subject, tried before anything long: what another library's code does
with a stranger's numbers is one line.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import BadInput
from workbench.subjects.checkpoint_files import one_line
from workbench.subjects.layers import block_after_block
from workbench.subjects.subject import Subject


@torch.no_grad()
def try_out(on: Subject, padding: bool = True, tolerance: float = 1e-2) -> None:
    """`BadInput` for a model that cannot compute its first two examples or has no output for a target, and
    with `padding` for one whose outputs for a text depend on how much padding stands behind it.
    """
    split = next(iter(on.splits))
    columns = on.split(split)
    kind = type(on.model).__name__

    def rows(places: list[int]) -> Tensor:
        batch = on.task.trimmed({k: v[places] for k, v in columns.items()})
        with block_after_block(on.model):
            output = on.task.output(on.model, batch)
        if on.task.targets not in columns:
            return output.flatten(1)
        found = on.task.flat(output, batch)[0]
        if len(found):
            check_targets(on, found.shape[-1])
            on.task.criterion(output, batch)
        return found

    try:
        lengths = on.task.lengths({k: v[:64] for k, v in columns.items()})
        short, long = 0, min(1, on.size(split) - 1)
        if lengths is not None:
            short, long = int(lengths.argmin()), int(lengths.argmax())
        alone, both = rows([short]), rows([short, long])
    except BadInput:
        raise
    except Exception as error:  # another library's code on a stranger's numbers
        raise BadInput(
            f"subject: {kind} fails on its first examples: {one_line(error)}; "
            "compare its config.json with the original, or give another task or another max_length"
        ) from None
    if not padding or lengths is None or lengths[short] == lengths[long] or not len(alone):
        return
    moved = (both[: len(alone)] - alone).float().norm(dim=-1) / alone.float().norm(dim=-1).clamp_min(1e-12)
    if bool(moved.median() > tolerance):
        raise BadInput(
            f"subject: what {kind} computes for a text depends on the padding behind it (its outputs move by "
            f"{float(moved.median()):.0%}), so its losses would depend on the batch; give texts of one length"
        )


def check_targets(on: Subject, classes: int) -> None:
    """`BadInput` for a target that is no class of the model's outputs."""
    if on.task.loss_kind != "cross_entropy":
        return
    for name, split in on.splits.items():
        labels = split.get(on.task.targets)
        if labels is None:
            continue
        wrong = (labels != on.task.missing) & ((labels < 0) | (labels >= classes))
        if bool(wrong.any()):
            raise BadInput(
                f"labels: {labels[wrong][0].item()} in split {name!r} is no class of the model's {classes} "
                f"(0 to {classes - 1}); {on.task.missing} marks what has no target"
            )
