"""MKOR (Mozaffari et al. 2023): Kronecker-factored curvature whose inverses are kept directly and follow
rank-one updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.axis import Choice, parameter
from workbench.errors import BadInput
from workbench.training.optimizer.combined import Together
from workbench.training.optimizer.optimizers import OPTIMIZER, OptimizerOptions

if TYPE_CHECKING:
    from workbench.training.loop import Training


def rank_one_inverse(inverse: Tensor, vector: Tensor, decay: float) -> Tensor:
    """The inverse of decay A + (1 - decay) v v^T, given that of A, by Sherman and Morrison:
    (d, d) and (d,) in O(d^2).
    """
    scaled = inverse / decay
    image = scaled @ vector
    return scaled - torch.outer(image, image) * ((1 - decay) / (1 + (1 - decay) * (vector @ image)))


class MKOR(Together):
    """Gradients of the linear layers become L^-1 G R^-1, rescaled to |G|, and go on to the `inner` optimizer,
    every step.

    Every `every` steps L^-1 and R^-1 follow averages (decay) of g g^T and a a^T, g the mean gradient
    of the layer's output and a its mean input over the batch. An inverse whose largest entry passes
    `threshold` is drawn to the identity: (1 - z) inverse + z I with z = `stabiliser`.

    stall > 0 is MKOR-H: when the mean loss of `window` steps has fallen by less than `stall` times
    the largest such fall so far (relative to the mean before), the inner optimizer goes on alone. The authors
    switch by the rate of loss reduction, too; their threshold could not be read, so this rule is ours.
    `fit` reports losses; another loop calls `observe`.

    Layers with a side above `largest` keep that side unpreconditioned;
    biases, embeddings and norms go to the inner optimizer as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: Optimizer,
        decay: float = 0.9,
        every: int = 10,
        stabiliser: float = 0.1,
        threshold: float = 100.0,
        largest: int = 4096,
        stall: float = 0.0,
        window: int = 20,
    ) -> None:
        super().__init__([inner])
        self.stall, self.window = stall, window
        self.watched: dict[str, Any] = {
            "seen": 0,
            "sum": 0.0,
            "count": 0,
            "mean": None,
            "fall": 0.0,
            "switched": 0,
        }
        self.decay, self.every, self.stabiliser, self.threshold, self.largest, self.steps = (
            decay,
            every,
            stabiliser,
            threshold,
            largest,
            0,
        )
        self.layers = {
            name: m for name, m in model.named_modules() if type(m) is nn.Linear and m.weight.requires_grad
        }
        self.inverses: dict[str, list[Tensor | None]] = {
            name: [self._eye(m.weight, side) for side in (0, 1)] for name, m in self.layers.items()
        }
        self._means: dict[str, list[Any]] = {
            name: [0.0, 0.0, 0] for name in self.layers
        }  # sums of g and a, forward passes
        for name, module in self.layers.items():
            module.register_forward_hook(self._watch(name))

    def _eye(self, weight: Tensor, side: int) -> Tensor | None:
        size = weight.shape[side]
        return torch.eye(size, dtype=weight.dtype, device=weight.device) if size <= self.largest else None

    def _watch(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self.switched or self.steps % self.every or not (module.training and output.requires_grad):
                return
            means = self._means[name]

            def arrived(gradient: Tensor) -> None:
                means[0] = means[0] + gradient.detach().reshape(-1, gradient.shape[-1]).sum(
                    0
                )  # of a mean loss: already the mean

            means[1] = means[1] + inputs[0].detach().reshape(-1, inputs[0].shape[-1]).mean(0)
            means[2] += 1
            output.register_hook(arrived)

        return hook

    @property
    def switched(self) -> bool:
        """The inner optimizer is on its own."""
        return bool(self.watched["switched"])

    def prepare(self, run: Training) -> None:
        """The losses that have arrived since the last step; they may lag behind by the steps whose loss is
        still on the device.
        """
        for row in run.rows[self.watched["seen"] :]:
            self.observe(row["loss"])
        self.watched["seen"] = len(run.rows)

    def observe(self, loss: float) -> None:
        """The loss of one more step."""
        w = self.watched
        if self.stall <= 0 or self.switched:
            return
        w["sum"], w["count"] = w["sum"] + loss, w["count"] + 1
        if w["count"] < self.window:
            return
        mean, before = w["sum"] / w["count"], w["mean"]
        if before is not None:
            fall = (before - mean) / abs(before)
            w["switched"] = int(fall < self.stall * w["fall"]) * self.steps
            w["fall"] = max(w["fall"], fall)
        w["sum"], w["count"], w["mean"] = 0.0, 0, mean

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, module in () if self.switched else self.layers.items():
            gradient = module.weight.grad
            if gradient is None:
                continue
            output, inputs, passes = self._means[name]
            self._means[name] = [0.0, 0.0, 0]
            if self.steps % self.every == 0 and isinstance(output, Tensor):
                for side, vector in enumerate((output, inputs / passes)):
                    self._follow(self.inverses[name], side, vector.to(gradient.dtype))
            left, right = self.inverses[name]
            direction = gradient if left is None else left @ gradient
            direction = direction if right is None else direction @ right
            gradient.copy_(
                direction * (gradient.norm() / direction.norm().clamp_min(torch.finfo(direction.dtype).tiny))
            )
        self.steps += 1
        super().step()
        return loss if closure is not None else None

    def _follow(self, pair: list[Tensor | None], side: int, vector: Tensor) -> None:
        inverse = pair[side]
        if inverse is None or not bool(torch.isfinite(vector).all()):
            return
        inverse = rank_one_inverse(inverse, vector, self.decay)
        if float(inverse.abs().max()) > self.threshold:
            inverse.mul_(1 - self.stabiliser).diagonal().add_(self.stabiliser)
        pair[side] = inverse

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "steps": self.steps,
            "inverses": self.inverses,
            "watched": dict(self.watched),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.steps, self.watched = state_dict["steps"], dict(state_dict["watched"])
        for name, pair in state_dict["inverses"].items():
            self.inverses[name] = [
                None if value is None else value.to(self.layers[name].weight.device) for value in pair
            ]

    def kept_state(self) -> list[Any]:
        return [*super().kept_state(), self.inverses]


class MkorOptions(OptimizerOptions):
    usual_learning_rate = 1e-1

    inner: Choice = OPTIMIZER.choice("sgd", "optimizer that takes the preconditioned gradients")
    decay: float = parameter(0.9, "decay of the averages g g^T and a a^T", gt=0, lt=1)
    every: int = parameter(10, "steps between two updates of the inverses", ge=1, unit="steps")
    stabiliser: float = parameter(
        0.1, "share of the identity given to an inverse that is too large", ge=0, le=1
    )
    threshold: float = parameter(100.0, "largest entry above which an inverse is too large", gt=0)
    stall: float = parameter(
        0.0, "MKOR-H: share of the largest fall below which the inner one goes on alone", ge=0
    )
    window: int = parameter(20, "steps whose mean loss a fall is measured by", ge=1, unit="steps")


@OPTIMIZER.add(
    "mkor",
    formula="G <- L^-1 G R^-1 |G| / |L^-1 G R^-1| for the inner optimizer, L^-1 and R^-1 by rank-one updates",
    source="Mozaffari et al. 2023",
    options=MkorOptions,
)
def mkor(model: nn.Module, learning_rate: float, weight_decay: float, options: MkorOptions) -> Optimizer:
    if options.inner == "mkor":
        raise BadInput("optimizer.inner: MKOR cannot be its own inner optimizer; use sgd or lamb")
    return MKOR(
        model,
        options.inner(model, learning_rate, weight_decay),
        options.decay,
        options.every,
        options.stabiliser,
        options.threshold,
        stall=options.stall,
        window=options.window,
    )
