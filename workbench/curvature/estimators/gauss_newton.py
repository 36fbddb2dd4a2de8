"""How far changes of weights move a model's answers, to second order: a sampled Gauss-Newton form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.curvature.operators.output_space import OutputCurvature, check_kind, draw_uniform
from workbench.curvature.operators.weights import differentiable, place_of
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.subjects import Batch, Layer, Subject


def with_targets(subject: Subject, split: str, batch_size: int, examples: int) -> Iterator[tuple[Batch, int]]:
    """Each batch that holds a target, with its number of items; `BadInput` when none does."""
    none = True
    for batch in subject.batches(split, batch_size, examples):
        if weight := subject.task.items(batch):
            none = False
            yield batch, weight
    if none:
        raise BadInput(
            f"split: the first {examples} examples of {split!r} hold no target; check the label column"
        )


def gauss_newton_scores(
    subject: Subject,
    layers: Sequence[Layer],
    deltas: Mapping[str, Sequence[Tensor]],
    split: str = "calibration",
    examples: int = 64,
    samples: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """(examples x samples, layers, candidates): how far each layer's candidate change d moves
    the log-likelihood of targets that the model draws.

    A score is s = g.d / sqrt(2 x items x samples), g an example's gradient at targets y ~ p(y | x), so that
    the sum of s^2 is an unbiased estimate of 1/2 d.G d of the mean loss, G the generalised Gauss-Newton
    matrix (Martens 2020, section 9: for cross-entropy and squared error it is the Fisher matrix). The sum
    of products of two changes' scores is likewise 1/2 d_i.G d_j, so one pass serves every layer, every
    candidate and every pair of them (the expansion that Deng et al. 2025, CLADO, start from; the term by
    which Schaefer et al. 2023 augment layer-wise Hessians is in their paper's body, which was not
    available). Never negative: no layer looks free because the loss happens to curve downwards on these
    examples. Its relative standard error is about sqrt(2 / (examples x samples)). One backward pass a sample,
    one layer's gradient at a time; every layer needs as many candidates. `BadInput` for a custom loss,
    which defines no distribution to draw from.
    """
    progress = progress or Progress()
    check_kind("mc-fisher", subject.task)
    generator = torch.Generator().manual_seed(seed)
    found, items = list[NDArray[np.float64]](), 0
    row = np.zeros((len(layers), len(deltas[layers[0].name])))

    def reading(place: int) -> Callable[[Tensor], None]:
        layer = layers[place]

        def read(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient = weight.grad.mT if layer.transposed else weight.grad
            row[place] = [float((d.to(gradient.dtype) * gradient).sum()) for d in deltas[layer.name]]
            weight.grad = None

        return read

    with differentiable(subject.model, [place_of(layer) for layer in layers]) as weights, torch.enable_grad():
        handles = [w.register_post_accumulate_grad_hook(reading(place)) for place, w in enumerate(weights)]
        try:
            for done, (batch, weight) in enumerate(with_targets(subject, split, 1, examples), 1):
                progress.show("sensitivity of each layer", done, min(examples, subject.size(split)))
                output = subject.task.output(subject.model, batch)
                width = subject.task.flat(output, batch)[0].shape[-1]
                draws = draw_uniform("mc-fisher", subject.task, batch, width, samples, generator)
                middle = OutputCurvature("mc-fisher", subject.task, output, batch, draws)
                assert middle.factors is not None
                for factor in middle.factors:
                    row[:] = 0
                    middle.rows.backward(factor.reshape(middle.rows.shape), retain_graph=True)
                    found.append(row.copy())
                items += weight
                if progress.stopped:
                    break
        finally:
            for handle in handles:
                handle.remove()
    return np.stack(found) / (2 * items * samples) ** 0.5
