"""Calibration block by block, with the inputs that an already quantized prefix produces.

One block's statistics are in memory at a time. The dense and the quantized model run the same batches up to
the block, so the target of the block's rounding can be the dense model's output on its own inputs
(asymmetric calibration, Nagel et al. 2020): min ||Q X^ - W X||^2 = min ||(Q - W*) X^||^2 + constant,
with W* = W (X X^^T) (X^ X^^T)^-1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.progress import Progress
from workbench.statistics import InputCapture, InputMoments
from workbench.statistics.damping import damped
from workbench.statistics.inputs import Reached, kept_positions, moments_of
from workbench.subjects import Layer, Subject
from workbench.subjects.tasks import Batch


def grouped(subject: Subject, layers: Sequence[Layer]) -> list[tuple[str, list[Layer]]]:
    """Layers by the block that holds them, in forward order;
    layers outside the blocks come last, under the name "".
    """
    rest, found = list(layers), []
    for name, _ in subject.blocks():
        inside = [layer for layer in rest if layer.name.startswith(name + ".")]
        if inside:
            found.append((name, inside))
            rest = [layer for layer in rest if layer not in inside]
    return [*found, ("", rest)] if rest else found


def run_until(subject: Subject, block: str, batch: Batch) -> None:
    """A forward pass that ends after the named block (or at the end when it is "")."""
    if not block:
        subject.task.output(subject.model, batch)
        return

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        raise Reached

    handle = subject.model.get_submodule(block).register_forward_hook(leave)
    try:
        with contextlib.suppress(Reached):
            subject.task.output(subject.model, batch)
    finally:
        handle.remove()


@contextlib.contextmanager
def collecting(
    subject: Subject, layers: Sequence[Layer]
) -> Iterator[tuple[InputCapture, dict[tuple[str, int], list[Tensor]]]]:
    rows: dict[tuple[str, int], list[Tensor]] = {}

    def keep(layer: Layer, expert: int, inputs: Tensor) -> None:
        rows.setdefault((layer.name, expert), []).append(inputs)

    with InputCapture(layers, keep) as capture:
        yield capture, rows


@torch.no_grad()
def paired_moments(
    dense: Subject,
    on: Subject,
    block: str,
    layers: Sequence[Layer],
    examples: int,
    split: str = "calibration",
    batch_size: int = 16,
    progress: Progress | None = None,
) -> tuple[dict[str, InputMoments], dict[str, Tensor]]:
    """(second moments of the quantized prefix's inputs, cross moments X X^^T with the dense model's)
    for one block's layers.

    Cross moments are (in, in) and missing for stacked experts, whose two models may route tokens differently.
    """
    progress = progress or Progress()
    twins = {layer.name: layer for layer in dense.layers("*")}
    sums = {layer.name: moments_of(layer, gram=True) for layer in layers}
    cross = {
        layer.name: torch.zeros(layer.shape[-1], layer.shape[-1], device=layer.original.device)
        for layer in layers
        if len(layer.shape) == 2
    }
    count = -(-min(examples, on.size(split)) // batch_size)
    for batch in progress.track(
        on.batches(split, batch_size, examples), f"inputs of {block or 'the rest'}", count
    ):
        seen = []
        for subject, mine in ((on, list(layers)), (dense, [twins[layer.name] for layer in layers])):
            with collecting(subject, mine) as (capture, rows):
                capture.keep = kept_positions(subject, batch)
                run_until(subject, block, batch)
            seen.append({key: torch.cat(parts) for key, parts in rows.items()})
        for (name, expert), rows_now in seen[0].items():
            found = sums[name]
            assert found.gram is not None
            found.gram[expert] += rows_now.T @ rows_now
            found.square[expert] += rows_now.square().sum(0)
            found.total[expert] += rows_now.sum(0)
            found.tokens[expert] += len(rows_now)
            if name in cross:
                cross[name] += seen[1][name, expert].T @ rows_now
    return sums, cross


def target(weight: Tensor, gram: Tensor, cross: Tensor, damp: float) -> Tensor:
    """W* (out, in): the weight whose outputs on the quantized prefix's inputs are closest to the dense
    layer's, damped towards W.
    """
    lift = damped(gram, damp) - gram
    solved = torch.linalg.solve(
        damped(gram, damp).double(), (cross + lift).T.double()
    )  # W* (G + L) = W (C + L)
    return (weight.double() @ solved.T).to(weight.dtype)


@dataclass
class Call:
    """One call of a block: what it was given and the hidden states it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@torch.no_grad()
def block_calls(
    subject: Subject, block: str, examples: int, split: str = "calibration", batch_size: int = 16
) -> list[Call]:
    """Every call of a block over the calibration batches."""
    module = subject.model.get_submodule(block)
    found: list[Call] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.append(Call(args, kwargs, first(output)))
        raise Reached

    handle = module.register_forward_hook(see, with_kwargs=True)
    try:
        for batch in subject.batches(split, batch_size, examples):
            with contextlib.suppress(Reached):
                subject.task.output(subject.model, batch)
    finally:
        handle.remove()
    return found


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
