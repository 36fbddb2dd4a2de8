"""Learned roundings of a whole block, or of several in a sliding window, against the dense output
(Li et al. 2021, BRECQ; Ding et al. 2025, CBQ).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from workbench.axis import Options, parameter
from workbench.curvature.operators.weights import plain_weights
from workbench.progress import Progress
from workbench.quantization.activations.sequential import Call, first
from workbench.quantization.rounding.learned import LearnedRounding, advance, descend
from workbench.quantization.rounding.rounding import OBJECTIVE
from workbench.subjects import Layer


class Window(Options):
    window: int = parameter(
        1,
        "consecutive blocks learned together (2 and more add CBQ's divergence)",
        ge=1,
        le=16,
        unit="blocks",
    )
    overlap: int = parameter(1, "blocks a window shares with the one before", ge=0, le=15, unit="blocks")


@OBJECTIVE.add(
    "block",
    formula="||f(Q) - f(W)||^2 of what a window of blocks puts out",
    source="Li et al. 2021, BRECQ, eq. 10; Ding et al. 2025, CBQ",
    needs="inputs",
    options=Window,
    traits="by blocks",
)
def reconstruct(
    model: nn.Module,
    blocks: Sequence[str],
    layers: Sequence[Layer],
    modules: dict[str, list[LearnedRounding]],
    calls: Sequence[Sequence[Call]],
    targets: Sequence[Sequence[Tensor]],
    steps: int,
    generator: torch.Generator,
    progress: Progress,
    divergence: bool = False,
    angular: bool = False,
) -> None:
    """Minimise the mean squared error of what consecutive blocks put out together over their calls;
    moves `modules` (by layer name).

    calls : for every batch, each block's call;
        targets : one or several kinds of the last block's wanted outputs, whose errors are added.
            One random batch a step.
    divergence : add KL(softmax(target) || softmax(output)) of the hidden states, as CBQ does
        (Ding et al. 2025)
    angular : add -log cos(output, target) of the hidden states, as PTQ1.61 does (Zhao et al. 2025)
    The state with the least error over all calls, looked at eight times, the one at the start included, is
    left in the modules (error to the first kind of target).
    """
    parts = [model.get_submodule(block) for block in blocks]
    with plain_weights(model), torch.enable_grad():
        every = [m for layer in layers for m in modules[layer.name]]
        optimizers = [descend(m, steps) for m in every]
        size = sum(float(t.square().sum()) for t in targets[0])

        def weights(hard: bool, done: float) -> list[dict[str, Tensor]]:
            made: list[dict[str, Tensor]] = [{} for _ in blocks]
            for layer in layers:
                found = [m.hard()[0] if hard else m.problem.masked(m.soft(done)) for m in modules[layer.name]]
                value = torch.stack(found) if len(layer.shape) == 3 else found[0]
                name = f"{layer.name}.{layer.tensor}" if len(layer.shape) == 2 else layer.name
                index = next(i for i, block in enumerate(blocks) if name.startswith(block + "."))
                made[index][name[len(blocks[index]) + 1 :]] = (value.mT if layer.transposed else value).to(
                    layer.original.dtype
                )
            return made

        @torch.no_grad()
        def error() -> float:
            values = weights(True, 1.0)
            return (
                sum(
                    float((output_of(parts, values, c) - t).square().sum())
                    for c, t in zip(calls, targets[0], strict=True)
                )
                / size
            )

        def state() -> list[dict[str, Tensor]]:
            return [{name: value.detach().clone() for name, value in m.state_dict().items()} for m in every]

        least, best = error(), state()
        for step in progress.track(range(steps), f"learning {' and '.join(blocks)}"):
            pick = int(torch.randint(len(calls), (), generator=generator))
            output, loss = output_of(parts, weights(False, step / steps), calls[pick]), torch.zeros(())
            for target in (kind[pick] for kind in targets):
                loss = loss + (output - target).square().sum() / target.square().sum()
                if divergence:
                    loss = (
                        loss
                        + functional.kl_div(
                            output.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="sum"
                        )
                        / output[..., 0].numel()
                    )
                if angular:
                    loss = (
                        loss
                        - functional.cosine_similarity(output, target, dim=-1).mean().clamp_min(1e-3).log()
                    )
            penalties = [p for m in every if (p := m.penalty(step / steps)) is not None]
            if penalties:
                # The layer objective counts errors in squared steps, of order 1/12 a weight;
                # this keeps the same balance.
                count = sum(m.problem.weight.numel() for m in every)
                loss = loss + torch.stack(penalties).sum() * (least / count)
            loss.backward()
            for m, optimizer in zip(every, optimizers, strict=True):
                advance(m, optimizer, step, steps)
            if (step + 1) % max(1, steps // 8) == 0 and (found := error()) < least:
                least, best = found, state()
        for m, values in zip(every, best, strict=True):
            m.load_state_dict(values)


def output_of(
    parts: Sequence[nn.Module], weights: Sequence[dict[str, Tensor]], calls: Sequence[Call]
) -> Tensor:
    """What consecutive blocks put out: the first on its call's inputs,
    each other on what the one before it put out.
    """
    hidden: Tensor | None = None
    for part, values, call in zip(parts, weights, calls, strict=True):
        args, kwargs = call.args, call.kwargs
        if hidden is not None:
            args, kwargs = (
                ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
            )
        hidden = first(functional_call(part, values, args, kwargs))
    assert hidden is not None
    return hidden


def windows(count: int, width: int, overlap: int) -> list[range]:
    """Runs of `width` consecutive blocks, each sharing `overlap` with the one before, that cover all `count`:
    (4, 2, 1) -> 01, 12, 23.
    """
    width = min(width, count)
    starts = [*range(0, count - width, max(width - overlap, 1)), count - width]
    return [range(s, s + width) for s in dict.fromkeys(starts)]
