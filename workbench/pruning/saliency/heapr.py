"""Atomic experts (Li et al. 2025, HEAPr): second-order importance of one neuron of an expert,
in the space of the expert's outputs.

Neuron k of an expert adds e_k(x) = W_down[:, k] h_k(x) to its output. Without it the loss changes, to second
order and with the empirical Fisher G = E[g g^T], g = dL / d(expert output), in place of the Hessian, by

    s_k = 1/2 E[e_k^T G e_k] = 1/2 E[h_k^2] W_down[:, k]^T G W_down[:, k]

so an expert needs one (hidden x hidden) matrix and the mean squares of its neurons. The expectations are over
the tokens routed to the expert, g includes the router's weight, and s_k is multiplied by the share of tokens
the expert sees, so that scores of all experts and layers are changes of the mean loss and compare.
(How the authors weight experts could not be checked.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.axis import Options, parameter
from workbench.progress import Progress
from workbench.pruning.axes import SALIENCY
from workbench.pruning.calibration import Calibration
from workbench.statistics import InputCapture
from workbench.statistics.gradients import learning
from workbench.statistics.inputs import kept_positions
from workbench.subjects import Layer, Subject
from workbench.subjects.structure.experts import expert_count, expert_modules
from workbench.subjects.structure.units import Group, discover


class OutputGradients(InputCapture):
    """Calls `handler(layer, expert, gradients)` with dL / d(output) (..., out)
    of every multiplication by a layer, on the way back.
    """

    def __init__(self, layers: Sequence[Layer], handler: Callable[[Layer, int, Tensor], None]) -> None:
        super().__init__(layers, self._remember)
        self.gradient_handler = handler
        self._latest: tuple[Layer, int] | None = None

    def _remember(self, layer: Layer, expert: int, rows: Tensor) -> None:
        self._latest = (layer, expert)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._latest = None
        output = super().__torch_function__(func, types, args, kwargs)
        if self._latest is not None and isinstance(output, Tensor) and output.requires_grad:
            layer, expert = self._latest
            output.register_hook(lambda gradient: self.gradient_handler(layer, expert, gradient.detach()))
        return output


def atomic_scores(
    on: Subject,
    groups: Sequence[Group],
    split: str = "calibration",
    examples: int = 128,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Group of neurons -> s (experts, units), changes of the mean loss in the loss's unit;
    a dense feed-forward is one expert.
    """
    progress = progress or Progress()
    consumers = {g.consumers[0].layer.name: g for g in groups}
    layers = [g.consumers[0].layer for g in groups]
    fisher = {
        n: torch.zeros(g.experts, layer.shape[-2], layer.shape[-2])
        for (n, g), layer in zip(consumers.items(), layers, strict=True)
    }
    squares = {n: torch.zeros(g.experts, g.units) for n, g in consumers.items()}
    tokens = {n: torch.zeros(g.experts, 1) for n, g in consumers.items()}
    items = 0

    def inputs(layer: Layer, expert: int, rows: Tensor) -> None:
        squares[layer.name][expert] += rows.square().sum(0).cpu()
        tokens[layer.name][expert] += len(rows)

    def gradients(layer: Layer, expert: int, found: Tensor) -> None:
        rows = found.reshape(-1, found.shape[-1])
        fisher[layer.name][expert] += (rows.T @ rows).cpu()

    total = -(-min(examples, on.size(split)) // batch_size)
    for batch in progress.track(on.batches(split, batch_size, examples), "output gradients", total):
        count = on.task.items(batch)
        if count == 0:
            continue
        items += count
        with InputCapture(layers, inputs) as capture, torch.no_grad():
            capture.keep = kept_positions(on, batch)
            on.task.output(on.model, batch)
        weights = [layer.original for layer in layers]
        with learning(weights):
            with torch.enable_grad(), OutputGradients(layers, gradients):
                loss = on.loss(batch) * count  # the sum over items: every token's own gradient
            torch.autograd.grad(loss, weights, allow_unused=True)
    scores = {}
    for name, group in consumers.items():
        weight = group.consumers[0].layer.weight.detach().cpu()
        weight = weight if weight.ndim == 3 else weight[None]
        seen = tokens[name].clamp_min(1)
        quadratic = torch.einsum("eok,eop,epk->ek", weight, fisher[name] / seen[..., None], weight)
        # 1/2 E[h^2] w^T G w for a token of the expert, times the expert's tokens for each item of the loss
        scores[group.name] = squares[name] / seen * quadratic / 2 * tokens[name] / max(items, 1)
    return scores


class Examples(Options):
    gradients: int = parameter(256, "examples whose output gradients are measured", ge=1, unit="examples")


@SALIENCY.add(
    "heapr",
    formula="1/2 E[h_k^2] w_k^T G w_k",
    source="Li et al. 2025 (HEAPr)",
    needs="gradients",
    options=Examples,
    traits=("neurons", "experts", "loss-like"),
)
def heapr(calibration: Calibration, groups: Sequence[Group], options: Examples) -> dict[str, Tensor] | Tensor:
    on, split = calibration.subject, calibration.split
    if groups:
        return atomic_scores(on, groups, split, options.gradients, progress=calibration.progress)
    paths, size = expert_modules(on.model), expert_count(on.model)[1]
    groups = [g for g in discover(on.model, ("neurons",)) if g.experts == size]
    found = atomic_scores(on, groups, split, options.gradients, progress=calibration.progress)
    total = torch.zeros(len(paths), size)
    for g in groups:
        owner = next(i for i, path in enumerate(paths) if g.name.startswith(path + "."))
        total[owner] += found[g.name].sum(-1)
    return total
