"""One micro-batch's forward and first backward pass as a graph through which vectors pass again and again.

A product with the graph at hand costs about two gradients for the Hessian (Pearlmutter 1994, by double
backward) and about one and a third for J^T S J. Building the graph costs one more, so graphs are kept between
products while memory lasts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from workbench.curvature.operators.linears import Sink
from workbench.curvature.operators.output_space import OutputCurvature
from workbench.errors import BadInput


class Graph(Protocol):
    """`product` gives `scale` ** -1 times the *sum* over items of the micro-batch's matrix, applied to
    a vector; what its layers sent to the sink is left out."""

    scale: float

    def product(self, block: list[int], directions: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The rows and columns of the weights number `block`, applied to `directions`
        (one tensor a weight of the model).
        """
        ...


def edges(tensors: Sequence[Tensor | None]) -> dict[int, GradientEdge]:
    """Where each tensor (by its number) hangs in the graph.
    Backward passes need no more; kept tensors would take the weights' memory in every graph.
    """
    return {
        i: get_gradient_edge(tensor)
        for i, tensor in enumerate(tensors)
        if tensor is not None and tensor.requires_grad
    }


class HessianGraph:
    """loss : the micro-batch's mean loss over `items` items."""

    def __init__(self, loss: Tensor, weights: Sequence[Tensor], items: float) -> None:
        self.weights, self.scale = weights, items
        self.gradients = edges(torch.autograd.grad(loss, list(weights), create_graph=True, allow_unused=True))

    def product(self, block: list[int], directions: Sequence[Tensor]) -> Sequence[Tensor | None]:
        used = [i for i in block if i in self.gradients]
        if not used:  # linear in these weights, or not used at all: zero curvature
            return [None] * len(block)
        try:
            return torch.autograd.grad(
                [self.gradients[i] for i in used],
                [self.weights[i] for i in block],
                [directions[i] for i in used],
                retain_graph=True,
                allow_unused=True,
            )
        except RuntimeError as error:
            if "not implemented" in str(error) or "does not require grad" in str(error):
                reason = str(error).splitlines()[0]
                raise BadInput(
                    "operator: hessian needs second derivatives and a layer of this model has none "
                    f"({reason}); use operator ggn"
                ) from None
            raise


class OuterGraph:
    """J^T S J, with J the Jacobian of the outputs and S in `middle` already a sum over items."""

    scale = 1.0

    def __init__(self, middle: OutputCurvature, weights: Sequence[Tensor], sink: Sink) -> None:
        self.middle, self.weights, self.sink = middle, weights, sink
        # J^T u as a function of u: its derivative in u, against v, is J v
        # (two backward passes instead of a forward-mode one)
        self.cotangent = torch.zeros_like(middle.rows, requires_grad=True)
        self.pulled = edges(
            torch.autograd.grad(
                middle.rows, list(weights), self.cotangent, create_graph=True, allow_unused=True
            )
        )

    def product(self, block: list[int], directions: Sequence[Tensor]) -> Sequence[Tensor | None]:
        used = [i for i in block if i in self.pulled]
        if not used:
            return [None] * len(block)
        self.sink.tangents = True
        tangents = torch.autograd.grad(
            [self.pulled[i] for i in used], self.cotangent, [directions[i] for i in used], retain_graph=True
        )[0]
        self.sink.tangents = False
        return torch.autograd.grad(
            self.middle.rows,
            [self.weights[i] for i in block],
            self.middle(tangents),
            retain_graph=True,
            allow_unused=True,
        )


@contextlib.contextmanager
def weighed(model: nn.Module, held: list[list[Tensor]] | None = None) -> Iterator[list[int]]:
    """Inside, the one entry of the list that is yielded grows by the bytes of every tensor that a graph
    saves, the model's own left out.

    What is saved goes through Python, where a graph and its tensors hold each other for good. So every
    tensor lies in a list of its own, put into `held`: to empty them lets the graph go.
    """
    bytes_saved = [0]
    seen = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> list[Tensor]:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            bytes_saved[0] += storage.nbytes()
        holder = [tensor]
        if held is not None:
            held.append(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder[0]):
        yield bytes_saved
