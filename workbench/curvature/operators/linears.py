"""Linear layers whose curvature products go straight into the sum they belong to.

For y = x W^T the product with the graph has two parts for W, one from the forward pass and one from the first
backward pass. Autograd makes both as tensors of W's size, adds them, and hands the sum over to be added to
the result: several passes over memory where two matrix products can accumulate in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Sink:
    """Where the weights' products are summed while a vector passes through a graph.

    rows : number of a weight -> its part of the sum, in the weight's shape;
        weights that are not there get nothing.
    tangents : set during a pass that asks for derivatives in the outputs alone.
    """

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}
        self.scale, self.tangents = 1.0, False

    def add(self, number: int, left: Tensor, right: Tensor) -> None:
        """Add scale * left^T right, left (..., out) and right (..., in)."""
        row = self.rows.get(number)
        if row is not None:
            row.addmm_(
                left.reshape(-1, left.shape[-1]).mT, right.reshape(-1, right.shape[-1]), alpha=self.scale
            )


class _Linear(torch.autograd.Function):
    """y = x W^T + b; twice differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, number: int, sink: Sink) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.number, ctx.sink = number, sink
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        if torch.is_grad_enabled():
            gx, gw, gb = _LinearBackward.apply(g, x, weight, wants_x, ctx.number, ctx.sink)
            return gx, gw, gb if wants_bias else None, None, None
        ctx.sink.add(ctx.number, g, x)
        return (
            g @ weight if wants_x else None,
            None,
            g.reshape(-1, g.shape[-1]).sum(0) if wants_bias else None,
            None,
            None,
        )


class _LinearBackward(torch.autograd.Function):
    """(g W, g^T x, sum of g): the first backward pass as a function of g, x and W."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, wants_x: bool, number: int, sink: Sink
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        ctx.save_for_backward(g, x, weight)
        ctx.set_materialize_grads(False)
        ctx.number, ctx.sink = number, sink
        rows = g.reshape(-1, g.shape[-1])
        return g @ weight if wants_x else None, rows.mT @ x.reshape(-1, x.shape[-1]), rows.sum(0)

    @staticmethod
    def backward(
        ctx: Any, u: Tensor | None, v: Tensor | None, t: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        g, x, weight = ctx.saved_tensors
        sink: Sink = ctx.sink
        dg = dx = None
        if u is not None:
            dg = u @ weight.mT
            if not sink.tangents:
                sink.add(ctx.number, g, u)
        if v is not None:
            along = x @ v.mT
            dg = along if dg is None else dg.add_(along)
            if ctx.needs_input_grad[1] and not sink.tangents:
                dx = g @ v
        if t is not None:
            dg = t.expand_as(g) if dg is None else dg.add_(t)
        return dg, dx, None, None, None, None


class InPlaceLinears(TorchFunctionMode):
    """Inside, layers of the given weights send their weights' products to the sink."""

    def __init__(self, weights: Sequence[Tensor], sink: Sink) -> None:
        super().__init__()
        self.sink, self.numbers = sink, {id(w): i for i, w in enumerate(weights) if w.ndim == 2}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func is torch.nn.functional.linear
            and len(args) >= 2
            and id(args[1]) in self.numbers
            and args[0].dtype == args[1].dtype
        ):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return _Linear.apply(args[0], args[1], bias, self.numbers[id(args[1])], self.sink)
        return func(*args, **kwargs)
