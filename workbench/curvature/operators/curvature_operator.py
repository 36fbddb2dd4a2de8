"""Curvature matrices as operators: exact products over all chosen batches, many vectors at a time.

For every micro-batch the forward pass and the first backward pass are computed once, and all vectors pass
through that graph (see `graphs`): a Hessian product then costs about two gradients, a Gauss-Newton product
about one and a third, instead of three to four with a fresh graph.
As many graphs as fit into `GRAPH_MEMORY` are kept from one product to the next.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.curvature.operators.graphs import Graph, HessianGraph, OuterGraph, weighed
from workbench.curvature.operators.linears import InPlaceLinears, Sink
from workbench.curvature.operators.output_space import (
    OutputCurvature,
    check_kind,
    draw_uniform,
)
from workbench.curvature.operators.weights import (
    Place,
    check_finite,
    differentiable,
    find_places,
)
from workbench.errors import BadInput, NotFinite
from workbench.progress import Progress
from workbench.storage.resident import let_go
from workbench.subjects import Batch, Subject, bake

GRAPH_MEMORY = (
    1024**3
)  # bytes of micro-batches' graphs kept between products; what is kept changes the time, not the result


class Stopped(Exception):
    """Somebody asked to stop inside a product; the estimate so far is what there is."""


class Operator(Protocol):
    """A symmetric matrix (size, size) that multiplies rows:
    `matmat` maps (k, size) to (k, size), written to `out` when that is given.
    """

    size: int
    dtype: torch.dtype
    device: torch.device

    def matmat(self, vectors: Tensor, out: Tensor | None = None) -> Tensor: ...


class DenseOperator:
    """A symmetric matrix held in memory, behind the same interface (for small problems and tests)."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.size, self.dtype, self.device = len(matrix), matrix.dtype, matrix.device

    def matmat(self, vectors: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.matmul(vectors, self.matrix, out=out)


class CurvatureOperator:
    """Hessian, generalised Gauss-Newton, empirical or Monte Carlo Fisher of a subject's mean loss;
    open it with `curvature_operator`.

    size : number P of coordinates. names, slices : the weights they belong to, in order; their values must
        not change between products (`forget` drops the graphs that were built with them).
    products : how many matrix-vector products were done. Under an initialised `torch.distributed` group every
        process takes each world-size-th micro-batch and products are summed over processes.
    """

    def __init__(
        self,
        subject: Subject,
        places: Sequence[Place],
        weights: Sequence[Tensor],
        kind: str,
        split: str,
        examples: int,
        batch_size: int,
        samples: int,
        seed: int,
        progress: Progress,
    ) -> None:
        self.subject, self.kind, self.split = subject, kind, split
        self.examples, self.batch_size = min(examples, subject.size(split)), batch_size
        self.samples, self.seed, self.progress = samples, seed, progress
        self.places, self.weights = list(places), list(weights)
        self.names = [place.name for place in places]
        self.dtype, self.device = self.weights[0].dtype, self.weights[0].device
        ends = torch.tensor([w.numel() for w in self.weights]).cumsum(0).tolist()
        self.slices = [slice(end - w.numel(), end) for end, w in zip(ends, self.weights, strict=True)]
        self.size, self.products = ends[-1], 0
        # sum over micro-batches of items |H_batch v|^2, a vector:
        # measured by the first product, and by the next one when set to None
        self.batch_squares: Tensor | None = None
        self.batch_count, self.total_items = 0, 0.0
        self._kept: dict[int, Graph] = {}
        self._sink = Sink()
        self._held: list[list[Tensor]] = []
        self._room: int | None = None  # how many graphs are kept; known once the first was weighed

    # ---- data ----------------------------------------------------------------------------------------------
    def batches(self) -> Iterator[tuple[Batch, Tensor | None]]:
        """This process's micro-batches with items, floating columns in the operator's precision,
        and their random draws.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
        generator = torch.Generator().manual_seed(self.seed)
        outputs = (
            self._outputs()
            if self.kind == "mc-fisher" and self.subject.task.loss_kind == "squared_error"
            else 0
        )
        for number, batch in enumerate(self.subject.batches(self.split, self.batch_size, self.examples)):
            draws = draw_uniform(self.kind, self.subject.task, batch, outputs, self.samples, generator)
            if self.subject.task.items(batch) == 0 or number % world != rank:
                continue
            if self.progress.stop.is_set():
                raise Stopped
            yield {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in batch.items()}, draws

    def _outputs(self) -> int:
        with torch.no_grad():
            batch = next(self.subject.batches(self.split, 1, 1))
            rows, _ = self.subject.task.flat(
                self.subject.task.output(self.subject.model, {k: self._cast(v) for k, v in batch.items()}),
                batch,
            )
        return rows.shape[-1]

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value

    def _reduced(self, total: Tensor, items: float) -> Tensor:
        count = torch.tensor([items], dtype=torch.float64, device=self.device)
        if distributed():
            dist.all_reduce(total)
            dist.all_reduce(count)
        if float(count) == 0:
            raise BadInput(
                f"split: the first {self.examples} examples of {self.split!r} hold no target; "
                "check the label column"
            )
        self.total_items = float(count)
        total.div_(float(count))
        if not bool(torch.isfinite(total.sum())):
            kind = str(self.dtype).removeprefix("torch.")
            raise NotFinite(
                f"operator: a product with the {self.kind} is not finite in {kind}; scale the weights or the "
                "inputs down, or compute in float64"
            )
        return total

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of one micro-batch, checked."""
        loss = self.subject.loss(batch)
        check_finite(loss, f"a batch of {self.split}")
        return loss

    def parts(self, vector: Tensor) -> list[Tensor]:
        """A flat (size,) vector as views in the weights' shapes."""
        return [vector[s].view_as(w) for s, w in zip(self.slices, self.weights, strict=True)]

    # ---- products ------------------------------------------------------------------------------------------
    def gradient(self) -> tuple[Tensor, float]:
        """The mean gradient (size,) and the mean loss, over all batches."""
        total = torch.zeros(self.size + 1, dtype=self.dtype, device=self.device)
        items = 0.0
        with torch.enable_grad():
            for batch, _ in self.batches():
                weight = self.subject.task.items(batch)
                loss = self.loss(batch)
                for s, g in zip(
                    self.slices, torch.autograd.grad(loss, self.weights, allow_unused=True), strict=True
                ):
                    if g is not None:
                        total[s].add_(g.reshape(-1), alpha=weight)
                total[-1] += weight * loss.detach()
                items += weight
        total = self._reduced(total, items)
        return total[:-1], float(total[-1])

    def matvec(self, vector: Tensor) -> Tensor:
        """H v for one vector (size,)."""
        return self.matmat(vector[None])[0]

    def matmat(self, vectors: Tensor, out: Tensor | None = None) -> Tensor:
        """H applied to each row of `vectors` (k, size), every micro-batch's graph built once.
        Raises `Stopped` on a stop.
        """
        return self._products(vectors, [list(range(len(self.weights)))], out)

    def block_matmat(self, vectors: Tensor, out: Tensor | None = None) -> Tensor:
        """The block-diagonal matrix (one block a weight) applied to each row (k, size):
        H_ll v_l side by side, in one pass.
        """
        return self._products(vectors, [[i] for i in range(len(self.weights))], out)

    def _products(self, vectors: Tensor, blocks: list[list[int]], out: Tensor | None) -> Tensor:
        if vectors.ndim != 2 or vectors.shape[1] != self.size:
            raise ValueError(f"vectors must have shape (k, {self.size}), got {tuple(vectors.shape)}")
        vectors = vectors.to(self.device, self.dtype)
        total = torch.zeros_like(vectors) if out is None else out.zero_()
        first = self.batch_squares is None
        squares = torch.zeros(
            len(vectors) + 1, dtype=torch.float64, device=self.device
        )  # the last entry counts micro-batches
        alone = torch.empty(self.size, dtype=self.dtype, device=self.device) if first else None
        items = 0.0
        with torch.enable_grad():
            for number, (batch, draws) in enumerate(self.batches()):
                weight = self.subject.task.items(batch)
                graph = self._graph(number, batch, draws)
                for row, (vector, sums) in enumerate(zip(vectors, total, strict=True)):
                    if self.progress.stop.is_set():
                        raise Stopped
                    if alone is None:
                        self._pass(graph, vector, sums, blocks)
                    else:  # apart from the other micro-batches, for its norm
                        self._pass(graph, vector, alone.zero_(), blocks)
                        squares[row] += torch.dot(alone, alone).double() / weight
                        sums += alone
                squares[-1] += 1
                items += weight
        self.products += len(vectors)
        if first:
            if distributed():
                dist.all_reduce(squares)
            self.batch_squares, self.batch_count = squares[:-1].cpu(), int(squares[-1])
        return self._reduced(total, items)

    def _pass(self, graph: Graph, vector: Tensor, sums: Tensor, blocks: list[list[int]]) -> None:
        """Add the sum over items of the micro-batch's H v to `sums` (size,)."""
        directions, parts = self.parts(vector), self.parts(sums)
        self._sink.scale = graph.scale
        for block in blocks:
            self._sink.rows = {i: parts[i] for i in block}
            for i, value in zip(block, graph.product(block, directions), strict=True):
                if value is not None:
                    parts[i].add_(value.detach(), alpha=graph.scale)

    def _graph(self, number: int, batch: Batch, draws: Tensor | None) -> Graph:
        """The graph of this process's micro-batch `number`, kept from an earlier product or built."""
        if number in self._kept:
            return self._kept[number]
        if self._room is None:
            return self._weighed(batch, draws)
        made = self._built(batch, draws)
        if number < self._room:
            self._kept[number] = made
            let_go(self.subject.model.parameters())  # a kept graph asks again for few of them
        return made

    def _weighed(self, batch: Batch, draws: Tensor | None) -> Graph:
        """A graph that says how many of its kind are kept; not kept itself,
        as what weighs it would be called at every use.
        """
        with weighed(self.subject.model, self._held) as size:
            made = self._built(batch, draws)
        self._room = GRAPH_MEMORY // max(size[0], 1)
        let_go(self.subject.model.parameters())
        return made

    def keeps_all_graphs(self) -> bool:
        """Whether every micro-batch's graph stays between products:
        vectors that go through one after the other then cost what they cost together.

        Builds the first graph when none was built yet. In a group of processes,
        the answer that is right for all of them.
        """
        if self._room is None:
            with torch.enable_grad(), contextlib.suppress(Stopped):  # the next product raises it again
                for first in itertools.islice(self.batches(), 1):
                    self._weighed(*first)
        count = -(-self.examples // (self.batch_size * (dist.get_world_size() if distributed() else 1)))
        missing = torch.tensor([0 if self._room is None else max(count - self._room, 0)], device=self.device)
        if distributed():
            dist.all_reduce(missing)
        return not int(missing)

    def _built(self, batch: Batch, draws: Tensor | None) -> Graph:
        with InPlaceLinears(self.weights, self._sink):
            if self.kind == "hessian":
                return HessianGraph(self.loss(batch), self.weights, self.subject.task.items(batch))
            middle = OutputCurvature(
                self.kind,
                self.subject.task,
                self.subject.task.output(self.subject.model, batch),
                batch,
                draws,
            )
        if not middle.rows.requires_grad:
            raise BadInput(
                "loss: the outputs do not depend differentiably on the chosen weights; choose other layers"
            )
        if not torch.isfinite(middle.rows).all():
            raise BadInput(
                f"loss: the model's outputs on a batch of {self.split} are not finite; "
                "check the data and the weights"
            )
        return OuterGraph(middle, self.weights, self._sink)

    def forget(self) -> None:
        """Drop the graphs kept so far."""
        self._kept.clear()
        self._sink.rows = {}
        for holder in self._held:
            holder.clear()
        self._held.clear()

    def noise(self, images: Tensor) -> float | None:
        """Per-item noise of the product that `batch_squares` is from: V with E |(H_B - H) v|^2 = V / B for
        a random batch of B items (None with one micro-batch).

        From the spread of the micro-batches' own products around the mean `images` (k, size), averaged over
        vectors; for probes with unit covariance it is the sum of the variances of all entries of one item's
        matrix.
        """
        if self.batch_squares is None or self.batch_count < 2:
            return None
        items = float(self.total_items)
        spread = (
            self.batch_squares / items
            - torch.linalg.vector_norm(images, dim=1, dtype=torch.float64).square().cpu()
        )
        return float(spread.mean()) * items / (self.batch_count - 1)


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def curvature_operator(
    subject: Subject,
    kind: str = "hessian",
    layers: str = "all",
    split: str = "calibration",
    examples: int = 64,
    batch_size: int = 8,
    dtype: str = "float32",
    samples: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[CurvatureOperator]:
    """Open an operator; inside, the model is in evaluation mode with twice differentiable attention,
    and as before afterwards.

    kind : hessian, ggn, empirical-fisher or mc-fisher (with `samples` draws an item).
        layers : see `find_places`.
    dtype : float32 or float64; another precision than the model's works on a converted copy.
        Raises `BadInput` first.

    >>> import workbench
    >>> subject = workbench.subject("digits-softmax")
    >>> with curvature_operator(subject, split="all", examples=1797, batch_size=1797) as hessian:
    ...     hessian.size
    640
    """
    check_kind(kind, subject.task)
    if examples < 1 or batch_size < 1 or samples < 1:
        raise BadInput(
            f"examples, batch_size and samples must be at least 1, got {examples}, {batch_size} and {samples}"
        )
    places = find_places(subject.model, layers)
    subject.split(split)
    wanted = getattr(torch, dtype)
    if any(p.parameter.dtype != wanted for p in places):
        chosen = {p.name for p in places}
        subject = subject.with_model(converted(subject.model, places, wanted))
        places = [p for p in find_places(subject.model, layers) if p.name in chosen]
    with differentiable(subject.model, places) as weights:
        operator = CurvatureOperator(
            subject, places, weights, kind, split, examples, batch_size, samples, seed, progress or Progress()
        )
        try:
            yield operator
        finally:
            operator.forget()


def converted(model: torch.nn.Module, places: Sequence[Place], dtype: torch.dtype) -> torch.nn.Module:
    """A copy in another precision with changes baked in; only the chosen weights stay trainable."""
    trainable = {(id(place.module), place.tensor) for place in places}
    memory: dict[int, Any] = {}
    made = copy.deepcopy(model, memory)
    keep = {(id(memory[module]), tensor) for module, tensor in trainable}
    bake(made).to(dtype)
    chosen = {
        id(p)
        for m in made.modules()
        for n, p in m._parameters.items()
        if p is not None and (id(m), n) in keep
    }
    for parameter in made.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return made.eval()
