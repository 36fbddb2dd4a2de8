"""Self-tuning networks (MacKay et al. 2019): hyperparameters learned while the weights are,
by a best response linear in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.subjects import Batch
from workbench.training.data_order import take


@dataclass(frozen=True)
class Hyperparameter:
    """One hyperparameter to tune. kind : "positive" is tuned in its logarithm, "fraction" (0 to 1)
    in its logit.
    """

    name: str
    start: float
    kind: Literal["positive", "fraction"] = "positive"

    def free(self) -> float:
        """The unconstrained value at the start."""
        if not (self.start > 0 and (self.kind == "positive" or self.start < 1)):
            raise BadInput(f"start: {self.start} is no start of the {self.kind} hyperparameter {self.name!r}")
        return math.log(self.start) if self.kind == "positive" else math.log(self.start / (1 - self.start))

    def value(self, free: Tensor) -> Tensor:
        return free.exp() if self.kind == "positive" else free.sigmoid()


class Setting(nn.Module):
    """The hyperparameters of a self-tuning model: centre (n,) and log spread (n,) are learned, `drawn` (n,)
    is what layers see now.
    """

    noise: Tensor

    def __init__(self, hyperparameters: Sequence[Hyperparameter], spread: float = 0.5) -> None:
        super().__init__()
        self.hyperparameters = tuple(hyperparameters)
        self.centre = nn.Parameter(torch.tensor([h.free() for h in hyperparameters]))
        self.log_spread = nn.Parameter(torch.full((len(hyperparameters),), math.log(spread)))
        self.register_buffer("noise", torch.zeros(len(hyperparameters)))

    @property
    def drawn(self) -> Tensor:
        return self.centre + self.log_spread.exp() * self.noise

    def draw(self) -> None:
        self.noise.normal_()

    def settle(self) -> None:
        """Back to the centre."""
        self.noise.zero_()

    def values(self) -> dict[str, Tensor]:
        """The hyperparameters that are drawn now, in their own units."""
        return {h.name: h.value(self.drawn[i]) for i, h in enumerate(self.hyperparameters)}

    def entropy(self) -> Tensor:
        """Of the normal distribution that is drawn from, up to a constant."""
        return self.log_spread.sum()


class SelfTuningLinear(nn.Module):
    """y = (W + diag(V l) W') x + b + diag(C l) b' with l the hyperparameters drawn:
    an affine best response of rank one a row.
    """

    setting: Setting

    def __init__(self, layer: nn.Linear, setting: Setting) -> None:
        super().__init__()
        outputs, count = layer.weight.shape[0], len(setting.hyperparameters)
        self.weight, self.response = (
            nn.Parameter(layer.weight.detach().clone()),
            nn.Parameter(torch.zeros_like(layer.weight)),
        )
        self.gate = nn.Parameter(torch.randn(outputs, count, dtype=layer.weight.dtype) / max(count, 1) ** 0.5)
        self.bias: nn.Parameter | None = None
        if layer.bias is not None:
            self.bias, self.bias_response = (
                nn.Parameter(layer.bias.detach().clone()),
                nn.Parameter(torch.zeros_like(layer.bias)),
            )
            self.bias_gate = nn.Parameter(
                torch.randn(outputs, count, dtype=layer.weight.dtype) / max(count, 1) ** 0.5
            )
        self.__dict__["setting"] = setting  # shared by all layers, owned by none

    def responding(self) -> Tensor:
        """The weight (out, in) at the hyperparameters drawn."""
        return self.weight + (self.gate @ self.setting.drawn)[:, None] * self.response

    def forward(self, inputs: Tensor) -> Tensor:
        bias = (
            None
            if self.bias is None
            else self.bias + (self.bias_gate @ self.setting.drawn) * self.bias_response
        )
        return F.linear(inputs, self.responding(), bias)


class TunedDropout(nn.Module):
    """Dropout at the probability that is drawn now."""

    setting: Setting

    def __init__(self, setting: Setting, name: str) -> None:
        super().__init__()
        self.name = name
        self.__dict__["setting"] = setting

    @property
    def p(self) -> float:
        """The probability that is drawn now; a model's attention asks its dropout for it."""
        return float(self.setting.values()[self.name].detach())

    def forward(self, inputs: Tensor) -> Tensor:
        return F.dropout(inputs, self.p, self.training)


def self_tuning(model: nn.Module, setting: Setting) -> nn.Module:
    """Replace every `nn.Linear` of the model by a layer that responds to the setting; in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, SelfTuningLinear(child, setting))
    return model


@torch.no_grad()
def settled(model: nn.Module) -> nn.Module:
    """Put an `nn.Linear` with the response at the setting's centre back in every layer's place; in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SelfTuningLinear):
                outputs, inputs = child.weight.shape
                plain = nn.Linear(inputs, outputs, child.bias is not None).to(child.weight)
                plain.weight.copy_(child.responding())
                if child.bias is not None:
                    gate = child.bias_gate @ child.setting.drawn
                    plain.bias.copy_(child.bias + gate * child.bias_response)
                setattr(module, name, plain.train(child.training))
    return model


def squared_weights(model: nn.Module) -> Tensor:
    """Sum of squares of the responding weights, for an L2 penalty."""
    return torch.stack(
        [m.responding().square().sum() for m in model.modules() if isinstance(m, SelfTuningLinear)]
    ).sum()


#: (model, batch, hyperparameters) -> mean loss over the batch
Loss = Callable[[nn.Module, Batch, dict[str, Tensor]], Tensor]


def tune(
    model: nn.Module,
    setting: Setting,
    train: Batch,
    validation: Batch,
    training_loss: Loss,
    validation_loss: Loss,
    steps: int = 500,
    batch_size: int = 32,
    lr: float = 1e-3,
    setting_lr: float = 3e-3,
    train_steps: int = 2,
    warmup: int = 50,
    entropy_weight: float = 1e-3,
    tune_spread: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Algorithm 1: `train_steps` steps of Adam on weights and responses at drawn hyperparameters, then one on
    the setting by the validation loss minus `entropy_weight` x entropy;
    the first `warmup` rounds leave the setting alone.

    Returns a row a round: round, losses, hyperparameters and their spread.
    `model` ends at the centre of the setting.
    """
    progress = progress or Progress()
    inner = torch.optim.Adam(model.parameters(), lr=lr)
    outer = torch.optim.Adam([setting.centre, *([setting.log_spread] if tune_spread else [])], lr=setting_lr)
    rows: list[dict[str, Any]] = []

    def batch(columns: Batch, position: int) -> Batch:
        size = len(next(iter(columns.values())))
        return (
            columns
            if batch_size >= size
            else {k: v[take(size, seed, position * batch_size, batch_size)] for k, v in columns.items()}
        )

    def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index in progress.track(range(steps), "self-tuning", steps):
            model.train()
            for k in range(train_steps):
                setting.draw()
                fitted = step(
                    inner, training_loss(model, batch(train, index * train_steps + k), setting.values())
                )
            model.eval()
            measured = math.nan
            if index >= warmup:
                setting.draw()
                measured = step(
                    outer,
                    validation_loss(model, batch(validation, index), setting.values())
                    - entropy_weight * setting.entropy(),
                )
            setting.settle()
            values = {name: float(value.detach()) for name, value in setting.values().items()}
            spreads = {
                f"spread_{h.name}": float(s)
                for h, s in zip(setting.hyperparameters, setting.log_spread.detach().exp(), strict=True)
            }
            rows.append(
                {"round": index, "train_loss": fitted, "validation_loss": measured, **values, **spreads}
            )
    return pd.DataFrame(rows)
