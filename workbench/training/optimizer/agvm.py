"""AGVM (Xue et al. 2022): module-wise learning rates that align the gradient variance of a large-batch
model's parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.axis import Choice, parameter
from workbench.errors import BadInput
from workbench.training.optimizer.combined import Together
from workbench.training.optimizer.optimizers import OPTIMIZER, OptimizerOptions
from workbench.training.state import TrainingState

Groups = list[dict[str, Any]]


def module_groups(model: nn.Module, modules: Sequence[str], weight_decay: float = 0.0) -> Groups:
    """Trainable parameters by the first of the `modules` (name prefixes, "" for what is left)
    that holds them, decay for matrices only.
    """
    groups: Groups = []
    left = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for module in modules:
        mine = {
            name: p
            for name, p in left.items()
            if not module or name == module or name.startswith(module + ".")
        }
        if not mine:
            raise BadInput(
                f"modules: {module!r} holds no trainable parameter that an earlier one has not; names: "
                f"{', '.join(n for n, _ in model.named_children())}"
            )
        left = {name: p for name, p in left.items() if name not in mine}
        for decay, part in (
            (weight_decay, [p for p in mine.values() if p.ndim >= 2]),
            (0.0, [p for p in mine.values() if p.ndim < 2]),
        ):
            if part:
                groups.append({"params": part, "module": module, "weight_decay": decay})
    if left:
        raise BadInput(
            f"modules: {', '.join(sorted(left)[:3])} belong to none of {', '.join(modules)}; "
            "end the list with '' for what is left"
        )
    return groups


def gradient_disagreement(first: Tensor, second: Tensor) -> Tensor:
    """Phi = 1 - cos of the gradients of two halves of a batch:
    0 without noise, 1 when noise is all there is.
    """
    return 1 - torch.nn.functional.cosine_similarity(first, second, dim=0)


class AGVM:
    """A callback of `fit(..., optimizer=lambda m: torch.optim.SGD(module_groups(m, [...]), lr),
    before_step=[AGVM()])`.

    Every `every` steps from `start` on: Phi_i of each module, mu_i <- EMA(momentum) of sqrt(clamp(Phi_1 /
    Phi_i, 1/2, 10)), and in every step the learning rate of module i is mu_i times the schedule's; module 1
    is the first group's. After Adam, gradients are measured divided by the root of the second moment. The
    schedule must set the rate anew each step, as all here but plateau do. `history` holds
    (step, {module: Phi}, {module: mu}). Constants are those of the authors' public hook.
    """

    def __init__(self, every: int = 5, start: int = 0, momentum: float = 0.97) -> None:
        self.every, self.start, self.momentum = every, start, momentum
        self.scales: dict[str, float] = {}
        self.history: list[tuple[int, dict[str, float], dict[str, float]]] = []

    def __call__(self, run: TrainingState) -> None:
        for group in run.optimizer.param_groups:  # a resumed run finds its factors there
            self.scales.setdefault(group["module"], group.get("factor", 1.0))
        if run.step >= self.start and (run.step - self.start) % self.every == 0 and len(run.chosen) >= 2:
            self._measure(run)
        for group in run.optimizer.param_groups:
            group["factor"] = self.scales.get(group["module"], 1.0)
            group["lr"] = group["lr"] * group["factor"]

    def _measure(self, run: TrainingState) -> None:
        batch, half = run.batch(), len(run.chosen) // 2
        parts = [
            by_module(run, {k: v[chosen] for k, v in batch.items()})
            for chosen in (slice(0, half), slice(half, None))
        ]
        noise = {
            module: float(gradient_disagreement(parts[0][module], parts[1][module])) for module in parts[0]
        }
        reference = next(iter(noise.values()))
        for module, phi in noise.items():
            ratio = min(max((reference + 1e-6) / (phi + 1e-6), 0.5), 10.0)
            self.scales[module] = (
                self.momentum * self.scales.get(module, 1.0) + (1 - self.momentum) * ratio**0.5
            )
        self.history.append((run.step, noise, dict(self.scales)))


def by_module(run: TrainingState, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of the batch's loss, a vector for each module of the optimizer's groups;
    preconditioned where there is a second moment.
    """
    found: dict[str, list[Tensor]] = {}
    groups = [(group, p) for group in run.optimizer.param_groups for p in group["params"] if p.requires_grad]
    grads = torch.autograd.grad(run.subject.loss(batch), [p for _, p in groups], allow_unused=True)
    for (group, p), gradient in zip(groups, grads, strict=True):
        value = torch.zeros_like(p) if gradient is None else gradient
        found.setdefault(group["module"], []).append(preconditioned(run.optimizer, group, p, value).flatten())
    return {module: torch.cat(parts) for module, parts in found.items()}


def preconditioned(optimizer: Optimizer, group: dict[str, Any], p: Tensor, gradient: Tensor) -> Tensor:
    """g / (sqrt(b2 v + (1 - b2) g^2) + eps) for an optimizer that keeps v, else g."""
    second = optimizer.state.get(p, {}).get("exp_avg_sq")
    if second is None:
        return gradient
    return gradient / (torch.lerp(second, gradient.square(), 1 - group["betas"][1]).sqrt() + group["eps"])


def module_of(model: nn.Module) -> dict[int, str]:
    """id of a parameter -> its module: its repeated block, else the module that holds it, two names deep."""
    from workbench.subjects import blocks

    repeated = [name for name, _ in blocks(model)]
    found: dict[int, str] = {}
    for name, p in model.named_parameters():
        block = next((block for block in repeated if name.startswith(f"{block}.")), None)
        found[id(p)] = block or ".".join(name.split(".")[:-1][:2])
    return found


def split_by_module(optimizer: Optimizer, model: nn.Module) -> None:
    """Every parameter group becomes one for each module, in the order of the model; before the first step."""
    modules = module_of(model)
    groups: Groups = []
    for group in optimizer.param_groups:
        parts: dict[str, list[Tensor]] = {}
        for p in group["params"]:
            parts.setdefault(modules[id(p)], []).append(p)
        groups += [{**group, "params": part, "module": module} for module, part in parts.items()]
    optimizer.param_groups = groups


class AgvmOptions(OptimizerOptions):
    usual_learning_rate = 1e-1

    inner: Choice = OPTIMIZER.choice("sgd", "optimizer whose learning rates are aligned")
    every: int = parameter(5, "steps between two measurements", ge=1, unit="steps")
    begin: int = parameter(0, "step of the first measurement", ge=0, unit="steps")
    average: float = parameter(0.97, "decay of the averages of the modules' factors", ge=0, le=1)


@OPTIMIZER.add(
    "agvm",
    formula="lr_i = mu_i lr, mu_i <- average of sqrt(clamp(Phi_1 / Phi_i, 1/2, 10)), Phi = 1 - cos(g_A, g_B)",
    source="Xue et al. 2022",
    options=AgvmOptions,
    traits="scales rates",
)
def agvm(model: nn.Module, learning_rate: float, weight_decay: float, options: AgvmOptions) -> Optimizer:
    inner: Optimizer = options.inner(model, learning_rate, weight_decay)
    if isinstance(inner, Together) or hasattr(inner, "prepare"):
        raise BadInput(
            f"optimizer.inner: {options.inner} does more than a step for each group of parameters; "
            "take sgd, adamw, lars or lamb"
        )
    split_by_module(inner, model)
    inner.prepare = AGVM(options.every, options.begin, options.average)  # type: ignore[attr-defined]
    return inner
