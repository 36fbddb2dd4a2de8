"""A model asked again and again with something else in one of its blocks: only what follows is computed.

The blocks are gone through once, in order; what the block before put out is held for every batch, so that a
model whose block i is another one costs the blocks from i on and the head. Where blocks are no chain, the
whole model is run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from workbench.measures.item_distances import ItemDistances, dense_answers
from workbench.measures.parts import swapped
from workbench.measures.reference import answer_of, batch_of
from workbench.progress import Progress
from workbench.statistics.walk import Walk, copied, list_of
from workbench.subjects import Subject
from workbench.subjects.tasks import Batch


class Suffix:
    """The dense model, its answers to the first `examples` of a split, and where the walk stands."""

    def __init__(self, on: Subject, split: str, examples: int, progress: Progress, disk: float) -> None:
        self.on, self.progress = on, progress
        size = min(on.size(split), examples)
        self.walk = Walk(
            on, (), examples=size, split=split, batch_size=batch_of(on, split), progress=progress
        )
        self.order = self.walk.blocks()
        if not self.only_the_last_is_read():
            self.order = []
        rows = on.order(split, size, by_length=True).split(self.walk.batch_size)
        self.distances = ItemDistances(on, dense_answers(on, rows, list(self.walk.batches())), disk)
        self.begin()

    @torch.no_grad()
    def only_the_last_is_read(self) -> bool:
        """Whether behind the blocks nothing is read but what the last one put out: not so where outputs of
        several are added up.
        """
        last = {list_of(name): self.on.model.get_submodule(name) for name in self.order}
        answers: dict[str, Any] = {}

        def keep(place: str) -> Any:
            def see(module: nn.Module, args: Any, output: Any) -> None:
                answers[place] = tree_map(copied, output)

            return see

        batch = next(self.on.batches(self.walk.split, 1, 1))
        handles = [module.register_forward_hook(keep(place)) for place, module in last.items()]
        try:
            want = self.spoken(batch)
        finally:
            for handle in handles:
                handle.remove()
        self.walk.done = list(self.order)
        try:
            with self.walk.answered(answers):
                return torch.equal(want, self.spoken(batch))
        finally:
            self.walk.done = []

    def spoken(self, batch: Batch) -> Tensor:
        """What the model answers, before a language model's head."""
        task = self.on.task
        output = task.deferred(self.on.model, batch)
        return answer_of(task, output, batch, torch.arange(len(batch[next(iter(batch))]))).rows.clone()

    @property
    def batches(self) -> int:
        return self.walk.batch_count

    def begin(self) -> None:
        """Before the first block again."""
        self.walk.done = []
        self.walk.answers = [{} for _ in range(self.walk.batch_count)]

    def advance(self, block: str) -> None:
        """After this, what is asked begins behind this block."""
        if block in self.order and not self.progress.stopped:
            self.walk.pass_on(block)
            if not self.progress.stopped:
                self.walk.done.append(block)

    def ask(self, modules: Mapping[str, nn.Module]) -> NDArray[np.float64] | None:
        """(items,) distances of the dense model with these modules; None when stopped."""
        return self._ask(self.on.model, modules, within=True)

    def ask_other(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> NDArray[np.float64] | None:
        """(items,) distances of another model with these modules, the whole of which is run."""
        return self._ask(model, modules, within=False)

    @torch.no_grad()
    def _ask(
        self, model: nn.Module, modules: Mapping[str, nn.Module], within: bool
    ) -> NDArray[np.float64] | None:
        found = []
        task = self.on.task
        with swapped(model, modules):
            for index, batch in enumerate(self.walk.batches()):
                if self.progress.stopped:
                    return None
                with self.walk.answered(self.walk.answers[index]) if within else contextlib.nullcontext():
                    output: Any = task.deferred(model, batch)
                found.append(self.distances.of(index, output, batch))
        return np.concatenate(found)
