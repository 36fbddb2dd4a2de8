"""Per-example gradients of layer weights, exact, through `torch.func`
(Goodfellow 2015 gives the factored form for linears).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from workbench.progress import Progress
from workbench.subjects import Layer, Subject


@contextlib.contextmanager
def learning(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Meanwhile there are gradients of these parameters, also of those that somebody has frozen."""
    was = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter, _ in was:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, learns in was:
            parameter.requires_grad_(learns)


def example_gradients(
    subject: Subject,
    layers: Sequence[Layer],
    split: str = "calibration",
    examples: int = 256,
    group: int = 1,
    progress: Progress | None = None,
) -> Iterator[list[Tensor]]:
    """Gradients of the mean loss of `group` consecutive examples (1: per example), one list of (..., out, in)
    per group.

    They are gradients of the weight underneath the changes, times the mask when there is one:
    a pruned weight's is zero.
    """
    progress = progress or Progress()
    parameters = [layer.original for layer in layers]
    count = -(-min(examples, subject.size(split)) // group)
    for batch in progress.track(subject.batches(split, group, examples), "gradients", count):
        if subject.task.items(batch) == 0:
            continue
        with torch.enable_grad(), learning(parameters):
            grads = torch.autograd.grad(subject.loss(batch), parameters, allow_unused=True)
        yield [
            torch.zeros(layer.shape, device=p.device) if g is None else (g.mT if layer.transposed else g)
            for layer, p, g in zip(layers, parameters, grads, strict=True)
        ]
