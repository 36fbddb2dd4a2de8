"""Normalisation for large and tiny batches: ghost batch norm (Hoffer et al. 2017),
weight standardisation and batch-channel norm (Qiao et al. 2019).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.subjects import Change, Subject
from workbench.training.models.model_change import MODEL_CHANGE


class GhostBatchNorm(nn.Module):
    """Batch norm over ghost batches of `ghost` examples inside a large one;
    running statistics pass over the ghosts one after the other.

    Input (batch, features, ...). At ghost >= batch, and in eval mode, it is batch norm exactly (Hoffer,
    Hubara & Soudry 2017, algorithm 1). The last ghost batch may be smaller.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, ghost: int = 32, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        if ghost < 2:
            raise BadInput(f"ghost: {ghost} is not accepted, a ghost batch needs at least 2 examples")
        self.ghost, self.eps, self.momentum = ghost, eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    @classmethod
    def replacing(cls, model: nn.Module, ghost: int) -> nn.Module:
        """Put ghost batch norms in the place of a model's batch norms, with their weights and statistics;
        in place.
        """
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if (
                    isinstance(child, nn.modules.batchnorm._BatchNorm)
                    and child.affine
                    and child.track_running_stats
                ):
                    made = cls(
                        child.num_features,
                        ghost,
                        child.eps,
                        child.momentum if child.momentum is not None else 0.1,
                    ).to(child.weight)
                    made.load_state_dict(
                        {k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"}
                    )
                    setattr(module, name, made.train(child.training))
        return model

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                inputs,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                False,
                self.momentum,
                self.eps,
            )
        parts = list(inputs.split(self.ghost))
        if len(parts) > 1 and len(parts[-1]) == 1 and parts[-1][0].numel() == len(self.weight):
            parts[-2:] = [torch.cat(parts[-2:])]  # one value per feature has no variance
        done = [
            F.batch_norm(
                part,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                True,
                self.momentum,
                self.eps,
            )
            for part in parts
        ]
        return torch.cat(done)


class BatchChannelNorm(nn.Module):
    """Batch norm by running estimates, which training uses too, then group norm;
    for batches of one or two (Qiao et al. 2019, algorithm 1).

    m <- m + rate (mean_B - m), v <- v + rate (var_B - v), y = gamma (x - m) / sqrt(v + eps) + beta, then
    `nn.GroupNorm(groups)` with its own scale and shift. Gradients do not flow into the estimates. Input
    (batch, features, ...); a batch of one value a feature counts with variance
    (x - m)^2 about the old estimate, which has the same expectation.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, groups: int = 32, rate: float = 0.01, eps: float = 1e-5) -> None:
        super().__init__()
        self.rate, self.eps = rate, eps
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.channel = nn.GroupNorm(groups, features, eps)
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                values = inputs.detach().transpose(0, 1).flatten(1)
                spread = (
                    values.var(1, unbiased=True)
                    if values.shape[1] > 1
                    else (values[:, 0] - self.running_mean).square()
                )
                self.running_mean.lerp_(values.mean(1), self.rate)
                self.running_var.lerp_(spread, self.rate)
        mean, var = (
            self.running_mean.clone(),
            self.running_var.clone(),
        )  # the next call changes them before this one's backward
        return self.channel(F.batch_norm(inputs, mean, var, self.weight, self.bias, False, 0.0, self.eps))


class WeightStandardization(Change):
    """(W - mean) / std over each output's inputs, biased std with eps under the root
    (Qiao et al. 2019, eq. 8); matrices (..., out, in).
    """

    order = 20

    def __init__(self, eps: float = 1e-10) -> None:
        super().__init__()
        self.eps = eps

    def change(self, weight: Tensor) -> Tensor:
        mean = weight.mean(-1, keepdim=True)
        return (weight - mean) / (weight.var(-1, unbiased=False, keepdim=True) + self.eps).sqrt()

    def config(self) -> dict[str, Any]:
        return {"eps": self.eps}


class OverTokens(nn.Module):
    """A norm of features in the place of one over the last dimension: (batch, tokens, features) or
    (batch, features) -> the same.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(inputs.transpose(1, -1)).transpose(1, -1) if inputs.ndim > 2 else self.norm(inputs)


def layer_norms(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, norm) of every norm with one scale a feature over the last dimension."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if "norm" in type(child).__name__.lower()
        and set(dict(child.named_parameters(recurse=False))) in ({"weight"}, {"weight", "bias"})
        and child.get_parameter("weight").ndim == 1
        and not isinstance(child, nn.modules.batchnorm._BatchNorm)
    ]


class GhostOptions(Options):
    ghost: int = parameter(32, "examples of a ghost batch", ge=2, unit="examples")


@MODEL_CHANGE.add(
    "ghost-batch-norm",
    formula="gamma (x - mean_ghost) / sqrt(var_ghost + eps) + beta",
    source="Hoffer, Hubara & Soudry 2017, algorithm 1",
    options=GhostOptions,
)
def ghost_batch_norm(on: Subject, options: GhostOptions) -> Subject:
    """Every batch norm and every norm over the last dimension becomes a batch norm over ghosts, with the
    scale and shift that the other had.
    """
    found = layer_norms(on.model)
    batch = [m for m in on.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not found and not batch:
        raise BadInput("model_change: ghost-batch-norm takes the place of norms, and this model has none")
    GhostBatchNorm.replacing(on.model, options.ghost)
    for parent, name, norm in found:
        scale = norm.get_parameter("weight")
        made = GhostBatchNorm(scale.shape[0], options.ghost).to(scale)
        with torch.no_grad():
            for own, value in norm.named_parameters(recurse=False):
                made.get_parameter(own).copy_(value)
        setattr(parent, name, OverTokens(made).train(norm.training))
    on.model.without_file = "ghost-batch-norm"  # type: ignore[assignment]
    return on.with_model(on.model)


class StandardizedOptions(Options):
    layers: str = parameter("blocks", "layers whose weights are standardised: blocks or globs", min_length=1)
    eps: float = parameter(1e-10, "added to the variance of a row", ge=0)


@MODEL_CHANGE.add(
    "weight-standardization",
    formula="(W - mean) / sqrt(var + eps) over each output's inputs",
    source="Qiao et al. 2019, eq. 8",
    options=StandardizedOptions,
)
def weight_standardization(on: Subject, options: StandardizedOptions) -> Subject:
    for layer in on.layers(options.layers):
        layer.attach(WeightStandardization(options.eps))
    return on
