"""1-bit Adam (Tang et al. 2021): after a warm-up the second moment is frozen and workers exchange signs with
error feedback.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.training.optimizer.group_optimizer import GroupOptimizer, adam_direction
from workbench.training.optimizer.optimizers import OPTIMIZER, MomentOptions, decay_groups


def compress(values: Tensor) -> Tensor:
    """C(x) = |x|_2 / sqrt(d) sign(x), with sign(0) = 1: one bit a coordinate and a scale,
    of the same norm as x.
    """
    return torch.copysign((values.norm() / values.numel() ** 0.5).expand_as(values), values)


def packed(values: Tensor) -> tuple[Tensor, Tensor]:
    """(signs as bits, (ceil(d / 8),) uint8; scale, scalar) of a compressed tensor: what crosses the wire."""
    bits = torch.nn.functional.pad(
        (~values.flatten().signbit()).to(torch.uint8), (0, -values.numel() % 8)
    ).view(-1, 8)
    places = 2 ** torch.arange(8, dtype=torch.uint8, device=values.device)
    return (bits * places).sum(1, dtype=torch.uint8), values.norm() / values.numel() ** 0.5


def unpacked(bits: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """The inverse of `packed`, in the shape and dtype of `like`."""
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    signs = (bits[:, None] >> places & 1).flatten()[: like.numel()].view(like.shape)
    return torch.where(signs > 0, scale, -scale).to(like.dtype)


class OneBitAdam(GroupOptimizer):
    """Adam for the first `freeze` steps; then with v frozen, for worker i with gradient g_i:

    m_i = b1 m + (1 - b1) g_i;  c_i = C(m_i + e_i);  e_i <- m_i + e_i - c_i;  m <- C(mean c_i + e);
    e <- mean c_i + e - m w <- w - lr m_hat / (sqrt(v_hat) + eps) - lr wd w.

    Workers are the processes of `torch.distributed` when it is initialised (each with its own copy
    of the model and its own part of the batch, without DistributedDataParallel, which would average gradients
    first), else one. workers > 0 simulates that many in this process: every backward pass is one worker's,
    scaled by 1 / workers, as `fit(micro_batch=batch_size // workers, clip=None)` does. Coordinates whose v is
    zero (rows of an embedding that were never seen) are not moved: their sign would be a full step.
    feedback=False drops the error memories, for comparison. `bytes_sent` counts what a worker has sent.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        freeze: int = 100,
        workers: int = 0,
        feedback: bool = True,
    ) -> None:
        if freeze < 1:
            raise BadInput(
                f"freeze: {freeze} is not accepted; Adam needs at least one step before its second moment "
                "can be frozen"
            )
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.freeze, self.workers, self.feedback, self.bytes_sent = freeze, workers, feedback, 0
        self._seen: dict[Tensor, list[Tensor]] = {}
        if workers:
            for group in self.param_groups:
                for p in group["params"]:
                    p.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, p: Tensor) -> None:
        assert p.grad is not None
        before = self._seen.setdefault(p, [])
        before.append(p.grad - sum(before) if before else p.grad.clone())

    def _by_worker(self, p: Tensor) -> list[Tensor]:
        """The gradients of the workers of this process."""
        assert p.grad is not None
        if not self.workers:
            return [p.grad]
        seen = self._seen.pop(p, [])
        if len(seen) != self.workers:
            raise BadInput(
                f"workers: {self.workers} were promised and {len(seen)} backward passes came; "
                "set micro_batch to batch_size / workers"
            )
        return [g * self.workers for g in seen]

    def update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        first, t = self.kept("exp_avg", weights), group["step"]
        beta1 = group["betas"][0]
        parts = [self._by_worker(p) for p in weights]
        if t <= self.freeze:
            means = [averaged(torch.stack(part).mean(0)) for part in parts]
            self.bytes_sent += sum(g.numel() * g.element_size() for g in gradients)
            updates, scale = adam_direction(
                first, self.kept("exp_avg_sq", weights), means, group["betas"], group["eps"], t
            )
        else:
            for p, m, part in zip(weights, first, parts, strict=True):
                m.copy_(self._exchange(p, [torch.lerp(m, g, 1 - beta1) for g in part]))
            updates, scale = (
                list(torch._foreach_mul(first, [self._inverse_root(p, group) for p in weights])),
                1 / (1 - beta1**t),
            )
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(weights, updates, alpha=group["lr"] * scale)

    def _inverse_root(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """1 / (sqrt(v_hat) + eps) of the frozen second moment, 0 where that is 0;
        takes the place of the second moment in the state.
        """
        state = self.state[p]
        if "inverse_root" not in state:
            second = state.pop("exp_avg_sq", torch.zeros_like(p))
            root = (second / (1 - group["betas"][1] ** self.freeze)).sqrt()
            state["inverse_root"] = torch.where(second > 0, 1 / (root + group["eps"]), 0.0)
        return state["inverse_root"]

    def _exchange(self, p: Tensor, momenta: list[Tensor]) -> Tensor:
        """The workers' compressed mean, compressed again, as every worker receives it."""
        state, sent = self.state[p], []
        for worker, momentum in enumerate(momenta):
            key = f"worker_error_{worker}"
            whole = momentum + state[key] if key in state else momentum
            sent.append(compress(whole))
            if self.feedback:
                state[key] = whole - sent[-1]
        self.bytes_sent += -(-p.numel() // 8) + 4
        whole = gathered(sent)
        if "server_error" in state:
            whole = whole + state["server_error"]
        received = compress(whole)
        if self.feedback:
            state["server_error"] = whole - received
        return received


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def averaged(gradient: Tensor) -> Tensor:
    """The mean over processes, as it is for one."""
    if _several():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradient


def gathered(sent: list[Tensor]) -> Tensor:
    """The mean of every worker's compressed tensor: over processes only bits and scales travel."""
    if not _several():
        return torch.stack(sent).mean(0) if len(sent) > 1 else sent[0]
    found = []
    for mine in sent:
        bits, scale = packed(mine)
        all_bits = [torch.empty_like(bits) for _ in range(dist.get_world_size())]
        all_scales = [torch.empty_like(scale) for _ in range(dist.get_world_size())]
        dist.all_gather(all_bits, bits)
        dist.all_gather(all_scales, scale)
        found += [unpacked(b, s, mine) for b, s in zip(all_bits, all_scales, strict=True)]
    return torch.stack(found).mean(0)


class OneBitAdamOptions(MomentOptions):
    betas: tuple[float, float] = parameter(
        (0.9, 0.999), "decay of the averages of gradients and of their squares, each in [0, 1)"
    )
    eps: float = parameter(1e-8, "added to the root of the second moment", ge=0)
    freeze: int = parameter(100, "steps of Adam before the second moment is frozen", ge=1, unit="steps")
    workers: int = parameter(
        0, "workers simulated in this process, one micro-batch each; 0: the processes there are", ge=0
    )
    feedback: bool = parameter(True, "what compression leaves out is added to the next step")


@OPTIMIZER.add(
    "one-bit-adam",
    formula="c_i = C(m_i + e_i); m <- C(mean c_i + e); w <- w - lr m_hat / (sqrt(v_frozen) + eps)",
    source="Tang et al. 2021",
    options=OneBitAdamOptions,
)
def one_bit_adam(
    model: nn.Module, learning_rate: float, weight_decay: float, options: OneBitAdamOptions
) -> Optimizer:
    return OneBitAdam(
        decay_groups(model, weight_decay),
        lr=learning_rate,
        betas=options.betas,
        eps=options.eps,
        freeze=options.freeze,
        workers=options.workers,
        feedback=options.feedback,
    )
