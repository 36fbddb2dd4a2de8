"""The axis of optimizers, each with the parameter groups its authors meant:
matrices decay, vectors do not, embeddings are no matrices.

An entry is a function (model, learning rate, weight decay, options) -> torch optimizer.
What torch or pytorch_optimizer keeps and gets right is theirs; the rest is in this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import field_validator
from torch import nn
from torch.optim import Optimizer

from workbench.axis import Axis, Choice, Options, parameter
from workbench.errors import BadInput
from workbench.training.optimizer.combined import Together

OPTIMIZER = Axis(
    "optimizer",
    "what makes a step of a gradient",
    found_in="workbench.training.optimizer",
    home="train.optimizer",
)
Groups = list[dict[str, Any]]


class OptimizerOptions(Options):
    """Options of an optimizer, and the peak learning rate that is usual with it."""

    usual_learning_rate: ClassVar[float] = 1e-3


class MomentOptions(OptimizerOptions):
    """Options of an optimizer with two exponential averages."""

    betas: tuple[float, float] = parameter(
        (0.9, 0.95), "decay of the averages of gradients and of their squares, each in [0, 1)"
    )

    @field_validator("betas")
    @classmethod
    def _shares(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both should be at least 0 and less than 1")
        return betas


def usual_learning_rate(optimizer: Choice) -> float:
    """The peak learning rate that is usual with an optimizer; 1e-3 where nothing is said."""
    return float(getattr(optimizer.entry.options, "usual_learning_rate", 1e-3))


def decay_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Trainable parameters in two groups: two or more dimensions with decay, vectors (biases, norms, scales)
    without.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of the repeated blocks, everything else): what orthogonalising optimizers act on and what
    they leave to AdamW.
    """
    from workbench.subjects import blocks

    inside = {id(p) for _, block in blocks(model) for p in block.parameters() if p.ndim == 2}
    if not inside:  # no repeated blocks: every matrix but the first and the last
        matrices = [p for p in model.parameters() if p.ndim == 2]
        inside = {id(p) for p in matrices[1:-1]} or {id(p) for p in matrices}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trained if id(p) in inside], [p for p in trained if id(p) not in inside]


def fused(model: nn.Module) -> bool:
    """torch's fused kernels: the fastest on CPU and CUDA,
    for parameters of one floating dtype on one device.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return (
        len({(p.dtype, p.device) for p in trained}) == 1
        and trained[0].device.type in ("cpu", "cuda")
        and trained[0].is_floating_point()
    )


def make_optimizer(
    optimizer: str | Mapping[str, Any], learning_rate: float, weight_decay: float = 0.0, **options: Any
) -> Callable[[nn.Module], Optimizer]:
    """A factory model -> optimizer of a name, a mapping with options or a choice;
    `BadInput` for an unknown name or option.
    """
    chosen = OPTIMIZER.chosen(optimizer, "optimizer", **options)
    if not learning_rate > 0:
        raise BadInput(f"learning_rate: {learning_rate} is not accepted, it should be positive")

    def made(model: nn.Module) -> Optimizer:
        built: Optimizer = chosen(model, learning_rate, weight_decay)
        return built

    return made


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of every tensor an optimizer keeps between steps."""

    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(size(item) for item in value.values())
        if isinstance(value, (list, tuple)):
            return sum(size(item) for item in value)
        return 0

    return size(optimizer.kept_state() if isinstance(optimizer, Together) else dict(optimizer.state))
