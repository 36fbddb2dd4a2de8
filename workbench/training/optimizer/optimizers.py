"""Optimizers by name, each with the parameter groups its authors meant:
matrices decay, vectors do not, embeddings are no matrices.

What torch or pytorch_optimizer keeps and gets right is theirs; the rest is in this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from workbench.errors import BadInput
from workbench.training.optimizer.combined import Together
from workbench.training.optimizer.galore import GaLore
from workbench.training.optimizer.kron import Kron
from workbench.training.optimizer.lamb import LAMB, LARS
from workbench.training.optimizer.lion import Lion
from workbench.training.optimizer.mkor import MKOR
from workbench.training.optimizer.muon import Muon
from workbench.training.optimizer.onebit import OneBitAdam
from workbench.training.optimizer.scion import Scion
from workbench.training.optimizer.sophia import Sophia

Groups = list[dict[str, Any]]


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


@dataclass(frozen=True)
class Recipe:
    """How an optimizer is built on a model, where its learning rates live,
    and what it keeps per parameter.
    """

    build: Callable[..., Optimizer]  # (model, lr, weight_decay, **options)
    source: str
    lr: float  # a usual peak learning rate
    options: tuple[str, ...] = ()


def _fused(model: nn.Module) -> bool:
    """torch's fused kernels: the fastest on CPU and CUDA,
    for parameters of one floating dtype on one device.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return (
        len({(p.dtype, p.device) for p in trained}) == 1
        and trained[0].device.type in ("cpu", "cuda")
        and trained[0].is_floating_point()
    )


def _adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> Optimizer:
    return torch.optim.AdamW(
        decay_groups(model, weight_decay), lr=lr, betas=betas, eps=eps, fused=_fused(model)
    )


def _sgd(
    model: nn.Module, lr: float, weight_decay: float, momentum: float = 0.9, nesterov: bool = False
) -> Optimizer:
    return torch.optim.SGD(
        decay_groups(model, weight_decay), lr=lr, momentum=momentum, nesterov=nesterov, fused=_fused(model)
    )


def _adafactor(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    return torch.optim.Adafactor(decay_groups(model, weight_decay), lr=lr)


def _lion(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.99)
) -> Optimizer:
    return Lion(decay_groups(model, weight_decay), lr=lr, betas=betas)


def _soap(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.95, 0.95),
    precondition_frequency: int = 10,
) -> Optimizer:
    from pytorch_optimizer import SOAP

    # embeddings and heads of a vocabulary keep one side undecomposed: its square would not fit
    return SOAP(
        decay_groups(model, weight_decay),
        lr=lr,
        betas=betas,
        precondition_frequency=precondition_frequency,
        max_precondition_dim=2048,
    )


def _lamb(model: nn.Module, lr: float, weight_decay: float, **options: Any) -> Optimizer:
    return LAMB(decay_groups(model, weight_decay), lr=lr, **options)


def _lars(model: nn.Module, lr: float, weight_decay: float, **options: Any) -> Optimizer:
    return LARS(decay_groups(model, weight_decay), lr=lr, **options)


def _muon(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    adamw_ratio: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
    **options: Any,
) -> Optimizer:
    matrices, rest = hidden_matrices(model)
    parts: list[Optimizer] = [Muon(matrices, lr=lr, weight_decay=weight_decay, **options)] if matrices else []
    if rest:
        parts.append(torch.optim.AdamW(rest, lr=lr * adamw_ratio, betas=betas, weight_decay=0.0))
    return Together(parts)


def _galore(model: nn.Module, lr: float, weight_decay: float, **options: Any) -> Optimizer:
    matrices, rest = hidden_matrices(model)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0, "rank": 2**31},
    ]
    return GaLore([group for group in groups if group["params"]], lr=lr, **options)


def _sophia(model: nn.Module, lr: float, weight_decay: float, **options: Any) -> Optimizer:
    return Sophia(decay_groups(model, weight_decay), lr=lr, **options)


def _kron(model: nn.Module, lr: float, weight_decay: float, **options: Any) -> Optimizer:
    return Kron(decay_groups(model, weight_decay), lr=lr, **options)


def _mars(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.95, 0.99),
    gamma: float = 0.025,
) -> Optimizer:
    from pytorch_optimizer import MARS

    return MARS(
        decay_groups(model, weight_decay), lr=lr, betas=betas, gamma=gamma, lr_1d=lr, weight_decay_1d=0.0
    )


def _scion(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    radius: float = 1.0,
    edge_radius: float = 10.0,
) -> Optimizer:
    matrices, rest = hidden_matrices(model)
    groups = [
        {"params": matrices, "norm": "spectral", "radius": radius, "weight_decay": weight_decay},
        {
            "params": [p for p in rest if p.ndim >= 2],
            "norm": "sign",
            "radius": edge_radius,
            "weight_decay": weight_decay,
        },
        {"params": [p for p in rest if p.ndim < 2], "norm": "rms", "radius": radius, "weight_decay": 0.0},
    ]
    return Scion([group for group in groups if group["params"]], lr=lr, momentum=momentum)


def _onebit(model: nn.Module, lr: float, weight_decay: float, **options: Any) -> Optimizer:
    return OneBitAdam(decay_groups(model, weight_decay), lr=lr, **options)


def _mkor(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    inner: str = "sgd",
    decay: float = 0.9,
    every: int = 10,
    stabiliser: float = 0.1,
    threshold: float = 100.0,
    stall: float = 0.0,
    window: int = 20,
    **options: Any,
) -> Optimizer:
    if inner == "mkor":
        raise BadInput("inner: MKOR cannot be its own inner optimizer; use sgd or lamb")
    return MKOR(
        model,
        make_optimizer(inner, lr, weight_decay, **options)(model),
        decay,
        every,
        stabiliser,
        threshold,
        stall=stall,
        window=window,
    )


OPTIMIZERS: dict[str, Recipe] = {
    "adamw": Recipe(_adamw, "Loshchilov & Hutter 2019; torch", 1e-3, ("betas", "eps")),
    "sgd": Recipe(_sgd, "Robbins & Monro 1951, Polyak 1964; torch", 1e-1, ("momentum", "nesterov")),
    "adafactor": Recipe(_adafactor, "Shazeer & Stern 2018; torch", 1e-2),
    "lamb": Recipe(_lamb, "You et al. 2020", 1e-2, ("betas", "eps", "largest", "bias_correction")),
    "lars": Recipe(_lars, "You, Gitman & Ginsburg 2017", 1.0, ("momentum", "trust")),
    "lion": Recipe(_lion, "Chen et al. 2023", 1e-4, ("betas",)),
    "muon": Recipe(
        _muon,
        "Jordan et al. 2024, Liu et al. 2025",
        1e-3,
        ("adamw_ratio", "betas", "momentum", "nesterov", "steps", "scale", "weight_map", "cap"),
    ),
    "soap": Recipe(_soap, "Vyas et al. 2024; pytorch_optimizer", 3e-3, ("betas", "precondition_frequency")),
    "sophia": Recipe(_sophia, "Liu et al. 2023", 1e-3, ("betas", "gamma", "eps", "every", "examples")),
    "kron": Recipe(_kron, "Li 2018, PSGD", 1e-3, ("momentum", "factor_lr", "largest", "flat", "least")),
    "mars": Recipe(_mars, "Yuan et al. 2024; pytorch_optimizer", 3e-3, ("betas", "gamma")),
    "scion": Recipe(_scion, "Pethick et al. 2025", 1e-2, ("momentum", "radius", "edge_radius")),
    "one-bit-adam": Recipe(
        _onebit, "Tang et al. 2021", 1e-3, ("betas", "eps", "freeze", "workers", "feedback")
    ),
    "mkor": Recipe(
        _mkor,
        "Mozaffari et al. 2023",
        1e-1,
        ("inner", "decay", "every", "stabiliser", "threshold", "stall", "window", "momentum", "nesterov"),
    ),
    "galore": Recipe(_galore, "Zhao et al. 2024", 1e-2, ("betas", "eps", "rank", "refresh", "alpha")),
}


def make_optimizer(
    name: str, lr: float, weight_decay: float = 0.0, **options: Any
) -> Callable[[nn.Module], Optimizer]:
    """A factory model -> optimizer; `BadInput` for an unknown name or option."""
    import difflib

    if name not in OPTIMIZERS:
        close = difflib.get_close_matches(name, OPTIMIZERS, 1)
        raise BadInput(
            f"optimizer: {name!r} is unknown; {f'did you mean {close[0]}? ' if close else ''}known: "
            f"{', '.join(OPTIMIZERS)}"
        )
    recipe = OPTIMIZERS[name]
    unknown = set(options) - set(recipe.options)
    if unknown:
        raise BadInput(
            f"optimizer: {name!r} takes no option {', '.join(sorted(unknown))}; "
            f"it takes {', '.join(recipe.options) or 'none'}"
        )
    if not lr > 0:
        raise BadInput(f"lr: {lr} is not accepted, it should be positive")
    return lambda model: recipe.build(model, lr, weight_decay, **options)


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
