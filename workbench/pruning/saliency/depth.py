"""Which blocks of a stack can go: how far each moves the hidden state
(Gromov et al. 2024; Men et al. 2024; Muralidharan et al. 2024).

angular distance   d(x^l, x^l+n) = arccos(cos(x^l, x^l+n)) / pi, for the n consecutive blocks from l on; on
                   the last token of a causal language model's text, on all tokens otherwise
block influence    BI_l = 1 - E[cos(x^l, x^l+1)] over all tokens
loss               how much the loss rises when the block alone is left out
deepest            the simple rule: the last blocks but one go
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.axis import Options
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.pruning.axes import SALIENCY
from workbench.pruning.calibration import Calibration
from workbench.statistics.inputs import block_positions
from workbench.subjects import Batch, Subject
from workbench.subjects.structure.depth import stacks
from workbench.subjects.structure.dimensions import shrink


@dataclass
class Stack:
    """Hidden states of one list of blocks: angular (L + 1, L + 1), d(x^l, x^m) for l <= m, and influence
    (L,).
    """

    path: str
    angular: Tensor
    influence: Tensor


@contextmanager
def block_states(on: Subject) -> Iterator[dict[str, list[Tensor]]]:
    """While entered, path of a stack -> the hidden states x^0 ..
    x^L (batch, tokens, hidden) of the latest forward pass.
    """
    found: dict[str, list[Tensor]] = {}
    handles = []
    for path, names in stacks(on.model).items():
        for name in names:

            def before(
                module: Any, inputs: Any, more: Any, path: str = path, first: bool = name == names[0]
            ) -> None:
                state = inputs[0] if inputs else more["hidden_states"]
                if first:
                    found[path] = []
                found[path].append(state.detach())

            def after(module: Any, inputs: Any, output: Any, path: str = path) -> None:
                found[path].append((output[0] if isinstance(output, tuple) else output).detach())

            handles.append(on.model.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True))
        handles.append(on.model.get_submodule(names[-1]).register_forward_hook(after))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def token_weights(on: Subject, block: str, batch: Batch, states: Tensor) -> Tensor:
    """(batch, tokens) of ones and zeros: which tokens of the states around a block are real."""
    keep = block_positions(on, block, batch)
    if keep is None or keep.shape != states.shape[:2]:
        return torch.ones(states.shape[:2], dtype=states.dtype, device=states.device)
    return keep.to(states.dtype)


@torch.no_grad()
def measure_stacks(
    on: Subject,
    split: str = "calibration",
    examples: int = 128,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Stack]:
    """Angular distances and block influences of every stack, in one streaming pass."""
    progress = progress or Progress()
    sums: dict[str, list[Tensor]] = {}
    total = -(-min(examples, on.size(split)) // batch_size)
    with block_states(on) as states:
        for batch in progress.track(on.batches(split, batch_size, examples), "hidden states", total):
            on.task.output(on.model, batch)
            for path, found in states.items():
                real = token_weights(on, path, batch, found[0])
                chosen = real
                if on.task.name == "causal-lm":
                    last = real.cumsum(1).argmax(1, keepdim=True)
                    chosen = torch.zeros_like(real).scatter(1, last, 1.0)
                x = F.normalize(torch.stack(found).double(), dim=-1)  # (L + 1, batch, tokens, hidden)
                steps = (x[:-1] * x[1:]).sum(-1)
                picked = x[:, chosen.bool()]  # (L + 1, n, hidden)
                cosine = torch.einsum("ind,jnd->ijn", picked, picked).clamp(-1, 1)
                mine = sums.setdefault(
                    path, [torch.zeros((), dtype=torch.double, device=x.device) for _ in range(4)]
                )
                mine[0] = mine[0] + cosine.arccos().sum(-1) / math.pi
                mine[1] = mine[1] + chosen.sum()
                mine[2] = mine[2] + ((1 - steps) * real).sum((1, 2))
                mine[3] = mine[3] + real.sum()
    return [Stack(path, (a / n).cpu(), (b / m).cpu()) for path, (a, n, b, m) in sums.items()]


def table_of(found: list[Stack]) -> pd.DataFrame:
    """One row for every run of blocks: stack, first block, number of blocks, angular distance."""
    rows = [
        {"stack": s.path, "first": first, "blocks": n, "distance": float(s.angular[first, first + n])}
        for s in found
        for n in range(1, len(s.influence) + 1)
        for first in range(len(s.influence) - n + 1)
    ]
    return pd.DataFrame(rows)


def runs(found: list[Stack], remove: int) -> list[Tensor]:
    """One run of consecutive blocks for each stack, `remove` in all,
    with the smallest summed angular distance; (L,) kept each.
    """
    sizes = [len(s.influence) for s in found]
    best: tuple[float, list[tuple[int, int]]] | None = None
    for counts in itertools.product(*(range(size) for size in sizes)):  # each stack keeps at least one
        if sum(counts) != remove:
            continue
        picks, cost = [], 0.0
        for s, n in zip(found, counts, strict=True):
            ways = [
                float(s.angular[first, first + n]) if n else 0.0 for first in range(len(s.influence) - n + 1)
            ]
            picks.append((min(range(len(ways)), key=ways.__getitem__), n))
            cost += min(ways)
        if best is None or cost < best[0]:
            best = (cost, picks)
    if best is None:
        raise BadInput(
            f"sparsity: {remove} of {sum(sizes)} blocks cannot go; every list of blocks keeps at least one"
        )
    kept = []
    for size, (first, n) in zip(sizes, best[1], strict=True):
        mask = torch.ones(size, dtype=torch.bool)
        mask[first : first + n] = False
        kept.append(mask)
    return kept


def weakest(scores: list[Tensor], remove: int) -> list[Tensor]:
    """The `remove` smallest scores go, one after the other, each stack keeping at least one;
    (L,) kept each.
    """
    kept = [torch.ones(len(s), dtype=torch.bool) for s in scores]
    order = sorted((float(value), number, i) for number, s in enumerate(scores) for i, value in enumerate(s))
    for _, number, i in order:
        if remove and int(kept[number].sum()) > 1:
            kept[number][i] = False
            remove -= 1
    if remove:
        raise BadInput("sparsity: so many blocks cannot go; every list of blocks keeps at least one")
    return kept


def losses_without(on: Subject, split: str, examples: int, progress: Progress) -> Tensor:
    """(blocks,) loss of the model without each block."""
    total = sum(len(names) for names in stacks(on.model).values())
    found = torch.full((total,), torch.inf)
    lists = list(stacks(on.model).values())
    single = [len(names) == 1 for names in lists for _ in names]
    for block in progress.track(range(total), "loss without each block"):
        if single[block]:
            continue
        kept = torch.ones(total, dtype=torch.bool)
        kept[block] = False
        found[block] = on.with_model(shrink(on.model, "layers", kept)).evaluate(split, limit=examples)["loss"]
    return found


def deepest(sizes: list[int]) -> list[Tensor]:
    """Scores by which the last block but one goes first, then the one before it;
    the last stays to the end.
    """
    return [torch.tensor([*(float(size - i) for i in range(size - 1)), float(size + 1)]) for size in sizes]


def of_calibration(calibration: Calibration) -> list[Stack]:
    return measure_stacks(
        calibration.subject, calibration.split, calibration.examples, progress=calibration.progress
    )


@SALIENCY.add(
    "angular",
    formula="arccos(cos(x^l, x^l+n)) / pi",
    source="Gromov et al. 2024",
    needs="inputs",
    traits=("layers", "runs"),
)
def angular(calibration: Calibration, groups: Sequence[object], options: Options) -> list[Stack]:
    """Distances over every run of blocks: what goes is one run of each stack (`runs`)."""
    return of_calibration(calibration)


@SALIENCY.add(
    "block-influence",
    formula="1 - E[cos(x^l, x^l+1)]",
    source="Men et al. 2024",
    needs="inputs",
    traits="layers",
)
def block_influence(calibration: Calibration, groups: Sequence[object], options: Options) -> list[Tensor]:
    return [s.influence for s in of_calibration(calibration)]


@SALIENCY.add(
    "loss",
    formula="L without the block",
    source="Muralidharan et al. 2024 (Minitron)",
    needs="inputs",
    traits="layers",
)
def loss(calibration: Calibration, groups: Sequence[object], options: Options) -> list[Tensor]:
    on = calibration.subject
    found = losses_without(on, calibration.split, calibration.examples, calibration.progress)
    return list(found.split([len(paths) for paths in stacks(on.model).values()]))


@SALIENCY.add(
    "deepest", formula="the last blocks but one go first", source="Gromov et al. 2024", traits="layers"
)
def deepest_first(calibration: Calibration, groups: Sequence[object], options: Options) -> list[Tensor]:
    return deepest([len(paths) for paths in stacks(calibration.subject.model).values()])
