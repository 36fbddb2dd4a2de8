"""ConAdv (Liu et al. 2022): adversarial examples made with stale weights,
so that they cost no extra step in the critical path.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.subjects import Batch, Subject
from workbench.training.losses import TRAINING_LOSS


class ConcurrentAdversary:
    """A loss of `fit(..., loss=ConcurrentAdversary())`: (L(w_t; x) + L(w_t; x + eps s)) / 2,
    s the sign of the gradient of L(w_{t - delay}; x) in x.

    column : the continuous input that is disturbed. norm : "sign" (largest-entry norm, FGSM) or "l2"
        (unit length for each example). delay=0 is the synchronous form, which needs two gradients one after
        the other. Running statistics of batch norms follow clean examples only; the two streams are
        normalised apart, as AdvProp does, with shared scale and shift.
    """

    def __init__(
        self, epsilon: float = 0.1, delay: int = 1, norm: str = "sign", column: str = "inputs"
    ) -> None:
        if not epsilon > 0 or delay < 0:
            raise BadInput(
                f"epsilon: {epsilon} with delay {delay} is not accepted; "
                "epsilon must be positive and delay 0 or more"
            )
        if norm not in ("sign", "l2"):
            raise BadInput(f"norm: {norm!r} is unknown; known: sign, l2")
        self.epsilon, self.delay, self.norm, self.column = epsilon, delay, norm, column
        self._past: deque[dict[str, Tensor]] = deque(maxlen=delay + 1)

    def __call__(self, subject: Subject, batch: Batch) -> Tensor:
        inputs = batch.get(self.column)
        if inputs is None or not inputs.is_floating_point():
            raise BadInput(
                f"column: {self.column!r} is no continuous input of this subject; columns: {', '.join(batch)}"
            )
        self._past.append({k: v.detach().clone() for k, v in subject.model.named_parameters()})
        disturbed = inputs + self.epsilon * self._direction(subject, batch, inputs)
        clean = subject.loss(batch)
        with frozen_statistics(subject.model):
            return 0.5 * (clean + subject.loss({**batch, self.column: disturbed}))

    def state_dict(self) -> dict[str, Any]:
        """The weights of the last steps."""
        return {"past": list(self._past)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._past.extend(state_dict["past"])

    def _direction(self, subject: Subject, batch: Batch, inputs: Tensor) -> Tensor:
        """Of the loss at the oldest weights kept: those of `delay` steps ago, or of the first step."""
        point = inputs.detach().clone().requires_grad_()
        with torch.enable_grad(), frozen_statistics(subject.model):
            stale = {name: value.to(inputs.device) for name, value in self._past[0].items()}
            loss = subject.with_model(Stale(subject.model, stale)).loss({**batch, self.column: point})
            gradient = torch.autograd.grad(loss, point)[0]
        if self.norm == "sign":
            return gradient.sign()
        length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
        return gradient / length.view(-1, *[1] * (gradient.ndim - 1))


class Stale(nn.Module):
    """The model at other weights, without copying it."""

    live: nn.Module
    weights: dict[str, Tensor]

    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["live"], self.__dict__["weights"] = (
            model,
            weights,
        )  # not registered: its parameters are not to be found here
        self.training = model.training

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        return functional_call(self.live, self.weights, inputs, named)


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms normalise as they do, and their running statistics are left as they were."""
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    kept = [{k: v.clone() for k, v in m.named_buffers(recurse=False)} for m in norms]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, buffers in zip(norms, kept, strict=True):
                for name, value in buffers.items():
                    setattr(module, name, value)


class AdversaryOptions(Options):
    epsilon: float = parameter(0.05, "size of the disturbance, in units of the inputs", gt=0)
    delay: int = parameter(
        1, "age of the weights that make it; 0: the weights of now, one gradient after the other", ge=0
    )
    norm: Literal["sign", "l2"] = parameter("sign", "unit ball: largest entry, or length of an example")


@TRAINING_LOSS.add(
    "concurrent-adversary",
    formula="(L(w_t; x) + L(w_t; x + eps sign grad_x L(w_{t - delay}; x))) / 2",
    source="Liu et al. 2022",
    needs="gradients",
    options=AdversaryOptions,
)
def concurrent_adversary(on: Subject, options: AdversaryOptions) -> ConcurrentAdversary:
    columns = on.split("train")
    continuous = [name for name, value in columns.items() if value.is_floating_point()]
    if not continuous:
        raise BadInput(
            f"loss: concurrent-adversary disturbs continuous inputs, and this subject has "
            f"{', '.join(columns)}; take one with images or features"
        )
    return ConcurrentAdversary(options.epsilon, options.delay, options.norm, continuous[0])
