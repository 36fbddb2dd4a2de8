"""Learned roundings of a whole block against its dense output (Li et al. 2021, BRECQ; the objective of FlexRound and SignRound)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from workbench.curvature.weights import plain_weights
from workbench.instruments import Progress
from workbench.quantization.grid import Grid
from workbench.quantization.learned import LearnedRounding, advance, descend
from workbench.quantization.prefix import Call, first
from workbench.quantization.rounding import Problem
from workbench.subjects import Layer

Problems = dict[str, list[Problem]]  # one for a plain matrix, one for each stacked expert


def reconstruct(model: nn.Module, block: str, layers: Sequence[Layer], problems: Problems, kind: type[LearnedRounding], calls: Sequence[Call],
                targets: Sequence[Tensor], steps: int, generator: torch.Generator, progress: Progress) -> dict[str, list[tuple[Tensor, Grid]]]:  # fmt: skip
    """Minimise the mean squared error of the block's output over its calls; name -> (values, grid) for each matrix of each layer.

    One random call a step. The state with the least error over all calls, looked at eight times, nearest rounding included, is kept.
    """
    module = model.get_submodule(block)
    with plain_weights(model), torch.enable_grad():
        modules = {layer.name: [kind(p) for p in problems[layer.name]] for layer in layers}
        every = [m for group in modules.values() for m in group]
        optimizers = [descend(m, steps) for m in every]
        size = sum(float(t.square().sum()) for t in targets)

        def weights(hard: bool, done: float) -> dict[str, Tensor]:
            made = {}
            for layer in layers:
                parts = [m.hard()[0] if hard else m.problem.masked(m.soft(done)) for m in modules[layer.name]]
                value = torch.stack(parts) if len(layer.shape) == 3 else parts[0]
                name = f"{layer.name}.{layer.tensor}" if len(layer.shape) == 2 else layer.name
                made[name[len(block) + 1 :]] = (value.mT if layer.transposed else value).to(layer.original.dtype)
            return made

        @torch.no_grad()
        def error() -> float:
            values = weights(True, 1.0)
            pairs = zip(calls, targets, strict=True)
            return sum(float((first(functional_call(module, values, c.args, c.kwargs)) - t).square().sum()) for c, t in pairs) / size

        least, best = error(), {name: [m.hard() for m in group] for name, group in modules.items()}
        for step in progress.track(range(steps), f"learning {block}"):
            pick = int(torch.randint(len(calls), (), generator=generator))
            output = first(functional_call(module, weights(False, step / steps), calls[pick].args, calls[pick].kwargs))
            loss = (output - targets[pick]).square().sum() / targets[pick].square().sum()
            penalties = [p for m in every if (p := m.penalty(step / steps)) is not None]
            if penalties:
                # The layer objective counts errors in squared steps, of order 1/12 a weight; this keeps the same balance.
                count = sum(m.problem.weight.numel() for m in every)
                loss = loss + torch.stack(penalties).sum() * (least / count)
            loss.backward()
            for m, optimizer in zip(every, optimizers, strict=True):
                advance(m, optimizer, step, steps)
            if (step + 1) % max(1, steps // 8) == 0 and (found := error()) < least:
                least, best = found, {name: [m.hard() for m in group] for name, group in modules.items()}
    return best
