"""A walk over a model's blocks with the calibration windows: everything one-shot is done block by block.

Between two blocks only the hidden states of the windows are held, in the model's dtype, and of one block at a
time its layers' statistics. A block sees its inputs by the model's own code: the model is run with the blocks
before it answering at once with what they gave, so whatever an architecture does around its blocks (masks,
position biases, an encoder's answer) needs no code here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten, tree_map

from workbench.progress import Progress
from workbench.statistics.finished_blocks import FinishedBlocks
from workbench.statistics.inputs import (
    Handler,
    InputCapture,
    InputMoments,
    MomentSums,
    Reached,
    completed,
    kept_positions,
    moments_of,
)
from workbench.storage.resident import disk, let_go, trim
from workbench.subjects import Layer, Subject
from workbench.subjects.tasks import Batch
from workbench.unfinished import current

Answers = dict[str, Any]  # list of blocks -> what its block visited last returned for one batch


@dataclass
class Visit:
    """Layers that are changed together, in the block that holds them ("" outside of the blocks), and the
    second moments of what they read.

    record : what JSON can hold of what was found out about these layers, for a run that goes on behind them
    done : they are changed already, by a run that was interrupted and has left that record; no moments then
    """

    block: str
    layers: Sequence[Layer]
    moments: Mapping[str, InputMoments]
    record: dict[str, Any] = field(default_factory=dict)
    done: bool = False


def list_of(block: str) -> str:
    """`model.layers.3` -> `model.layers`: the list that a block stands in."""
    return block.rpartition(".")[0]


@dataclass
class Walk:
    """Visits in forward order; what is changed in the layers of a visit is changed before the next one.

    sequential : a block reads what the changed blocks before it put out (Frantar et al. 2023, GPTQ and
        SparseGPT); else what the dense ones did
    within : sequential inside the blocks too: layers that read the same are visited together, then those that
        read what these gave; else every layer of a block is calibrated on the block as it came in
    gram : collect second moments, else only their diagonals
    resumes : a walk in files notes each block that is done, with the records of its visits, and a run of the
        same key that comes after an interrupted one visits those as `done`

    A model whose blocks do not follow one another, each called once on what the one before gave, is visited
    as one block.
    """

    on: Subject
    layers: Sequence[Layer]
    examples: int = 128
    split: str = "calibration"
    batch_size: int = 16
    sequential: bool = True
    within: bool = False
    gram: bool = True
    resumes: bool = False
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.done: list[str] = []
        self.answers: list[Answers] = []

    def __iter__(self) -> Iterator[Visit]:
        self.done, self.answers = [], [{} for _ in range(self.batch_count)]
        blocks = self.blocks()
        let_go(self.on.model.parameters())  # what is read comes back: a block, and words of the embeddings
        trim()
        inside = {
            block: [layer for layer in self.layers if layer.name.startswith(block + ".")] for block in blocks
        }
        held = {layer.name for layers in inside.values() for layer in layers}
        outside = [layer for layer in self.layers if layer.name not in held]
        while blocks and not outside and not inside[blocks[-1]]:
            blocks.pop()
        stops = [*blocks, ""] if outside else blocks
        noted = self.noted(stops)
        with contextlib.nullcontext() if noted is None else noted.named():
            for index, block in enumerate(self.progress.track(stops, "block after block")):
                module = self.on.model.get_submodule(block)
                layers = inside[block] if block else outside
                if noted is not None and index < len(noted.notes):
                    record = noted.take(index, module)
                    self.done.append(block)
                    for number, names in enumerate(record["visits"]):
                        part = [layer for layer in layers if layer.name in names]
                        yield Visit(block, part, {}, record["records"][number], done=True)
                    continue
                came_in = [p.detach() for p in module.parameters()]
                visits = []
                for visit in self.visits(block, layers, more=block != stops[-1]):
                    yield visit
                    visits.append(visit)
                if self.progress.stopped:
                    return
                self.done.append(block)
                if (place := disk()) is not None:
                    place.keep((*module.parameters(), *module.buffers()))
                    let_go(self.on.model.parameters())  # the embeddings too
                if noted is not None:
                    names = [[layer.name for layer in visit.layers] for visit in visits]
                    record = {"visits": names, "records": [visit.record for visit in visits]}
                    left = self.answers if block != stops[-1] else []
                    noted.put(index, module, layers, record, left)
                let_go(came_in)
                trim()
        self.answers = []

    def noted(self, blocks: Sequence[str]) -> FinishedBlocks | None:
        """What an interrupted run has left of this walk, and where it is noted; None where none is kept."""
        journal, place = current(), disk()
        if not self.resumes or journal is None or place is None or "" in blocks:
            return None
        found = FinishedBlocks(journal, place, blocks)
        if found.notes:
            self.progress.say(
                f"{len(found.notes)} of {len(blocks)} blocks are done, by a run that was interrupted"
            )
            self.answers = found.answers
        return found

    def visits(self, block: str, layers: list[Layer], more: bool) -> Iterator[Visit]:
        """The visits of a block; what it answers then is kept if there are `more`."""
        parts = self.parts(block, layers)
        early = more and bool(parts) and not self.sequential
        for part in parts:
            moments = self.moments(block, part, early and part is parts[0])
            if self.progress.stopped:
                return
            yield Visit(block, part, moments)
        if more and not early:
            self.pass_on(block)

    @property
    def batch_count(self) -> int:
        return -(-min(self.examples, self.on.size(self.split)) // self.batch_size)

    def batches(self) -> Iterator[Batch]:
        """The calibration windows, shortest first, so that there is little padding to compute."""
        return self.on.batches(self.split, self.batch_size, self.examples, by_length=True)

    def parts(self, block: str, layers: list[Layer]) -> list[list[Layer]]:
        """The layers of a block that are visited together."""
        if not layers or not block or not (self.within and self.sequential):
            return [layers] if layers else []
        return self.readers(block, layers)

    @torch.no_grad()
    def moments(self, block: str, layers: list[Layer], pass_on: bool = False) -> dict[str, InputMoments]:
        """Second moments of what some layers of a block read now."""
        found = {layer.name: moments_of(layer, self.gram) for layer in layers}
        sums = MomentSums(found, leaves=not pass_on)
        self.observe(block, layers, sums.add, sums.begin, pass_on)
        return completed(found, self.split)

    @torch.no_grad()
    def observe(
        self,
        block: str,
        layers: Sequence[Layer],
        handler: Handler,
        begin: Callable[[], None] | None = None,
        pass_on: bool = False,
    ) -> None:
        """Let a block answer to all windows, and `handler` see what its layers read; `pass_on` keeps the
        answers for the next block.
        """
        with InputCapture(layers, handler) as capture:
            for index, batch in enumerate(self.batches()):
                if self.progress.stopped:
                    return
                capture.keep = kept_positions(self.on, batch)
                if begin is not None:
                    begin()
                answer = self.replay(batch, block, self.answers[index])
                self.keep(index, block, answer if pass_on else None)

    @torch.no_grad()
    def pass_on(self, block: str) -> None:
        """Keep what a block answers as it is now."""
        with parametrize.cached():
            for index, batch in enumerate(self.batches()):
                if self.progress.stopped:
                    return
                self.keep(index, block, self.replay(batch, block, self.answers[index]))

    def keep(self, index: int, block: str, answer: Any) -> None:
        """Put down what a block answered to a batch, if it is to be passed on."""
        place, answers = disk(), self.answers[index]
        if place is not None:
            let_go(tensors_in(answers))
            answer = tree_map(place.placed, answer)
        if answer is not None:
            answers[list_of(block)] = answer

    def replay(self, batch: Batch, block: str, answers: Answers) -> Any:
        """What a block ("": the model) returns for a batch when those before it have answered this."""
        with self.answered(answers):
            return output_of(self.on, batch, block)

    @contextlib.contextmanager
    def answered(self, answers: Answers) -> Iterator[None]:
        """Inside, the blocks that are done compute nothing and answer this."""
        with contextlib.ExitStack() as stack:
            latest = {list_of(name): name for name in self.done}
            for name in self.done:
                module = self.on.model.get_submodule(name)
                fresh = latest[list_of(name)] == name
                stack.enter_context(answering(module, answers[list_of(name)], fresh))
            yield

    @torch.no_grad()
    def readers(self, block: str, layers: list[Layer]) -> list[list[Layer]]:
        """Layers by what they read, in the order in which they are called: query, key and value; output;
        gate and up; down.
        """
        parts: list[list[Layer]] = []
        last: list[Tensor] = []

        def see(layer: Layer, expert: int, rows: Tensor) -> None:
            same = bool(last) and last[0].data_ptr() == rows.data_ptr() and last[0].shape == rows.shape
            last[:] = [rows]
            if any(layer.name == other.name for part in parts for other in part):
                return
            if same and parts:
                parts[-1].append(layer)
            else:
                parts.append([layer])

        with InputCapture(layers, see):
            self.replay(next(self.batches()), block, self.answers[0])
        seen = {layer.name for part in parts for layer in part}
        left = [layer for layer in layers if layer.name not in seen]
        return [*parts, left] if left else parts

    @torch.no_grad()
    def blocks(self) -> list[str]:
        """The blocks in the order in which they are called; none when they are no chain.

        One example goes through the model; then every block's inputs, with the blocks before it answering
        as they did, have to be what they were.
        """
        named = [(name, self.on.model.get_submodule(name)) for name, _ in self.on.blocks()]
        batch = next(self.on.batches(self.split, 1, 1))
        calls: list[tuple[str, list[Tensor], Any]] = []

        def watch(name: str) -> Callable[..., None]:
            def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                calls.append((name, entered.pop(name), tree_map(copied, output)))
                let_go(module.parameters())

            return see

        def enter(name: str) -> Callable[..., None]:
            def see(module: nn.Module, args: Any, kwargs: Any) -> None:
                entered[name] = [value.clone() for value in tensors_in((args, kwargs))]

            return see

        entered: dict[str, list[Tensor]] = {}
        handles = [m.register_forward_pre_hook(enter(name), with_kwargs=True) for name, m in named]
        handles += [m.register_forward_hook(watch(name), with_kwargs=True) for name, m in named]
        try:
            output_of(self.on, batch, "")
        finally:
            for handle in handles:
                handle.remove()
        order = [name for name, _, _ in calls]
        if sorted(order) != sorted(name for name, _ in named):
            return []
        answers: Answers = {}
        try:
            for name, inputs, output in calls:
                if not equal(inputs, self.inputs_of(batch, name, answers)):
                    return []
                answers[list_of(name)] = output
                self.done.append(name)
        finally:
            self.done = []
        return order

    def inputs_of(self, batch: Batch, block: str, answers: Answers) -> list[Tensor]:
        """The tensors that a block is called with, after these answers."""
        found: list[Tensor] = []

        def see(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.extend(tensors_in((args, kwargs)))
            raise Reached

        handle = self.on.model.get_submodule(block).register_forward_pre_hook(see, with_kwargs=True)
        try:
            self.replay(batch, "", answers)
        finally:
            handle.remove()
        return found


def output_of(on: Subject, batch: Batch, block: str) -> Any:
    """What a block returns for a batch, the model left there; None for the whole model, or when something
    that watches has left before.
    """
    found: list[Any] = []
    if not block:
        with contextlib.suppress(Reached):
            on.task.output(on.model, batch)
        return None

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output)
        raise Reached

    handle = on.model.get_submodule(block).register_forward_hook(leave)
    try:
        with contextlib.suppress(Reached):
            on.task.output(on.model, batch)
    finally:
        handle.remove()
    return found[0] if found else None


@contextlib.contextmanager
def answering(module: nn.Module, answer: Any, fresh: bool) -> Iterator[None]:
    """Inside, the module computes nothing and answers this, or a copy: a block may write to its input."""
    before = vars(module).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        return tree_map(copied, answer) if fresh else answer

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def equal(these: Sequence[Tensor], those: Sequence[Tensor]) -> bool:
    """Bit for bit but for the kind of NaN."""
    return len(these) == len(those) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
        for a, b in zip(these, those, strict=True)
    )
