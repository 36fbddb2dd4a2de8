"""Binary attention, and low-rank estimates of what its binarisation leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.quantization.activations.activations import SignInputs, signs
from workbench.quantization.activations.attention import (
    AttentionCall,
    AttentionChange,
    attention_sites,
    order_of,
    use_plain_attention,
)
from workbench.quantization.trained.settings import TRAINED_ROUNDING, TrainedSettings
from workbench.quantization.trained.trained_rounding import CentredSign, slowed
from workbench.subjects import Layer, Subject

SMALLEST = 1e-5  # of a learned scale


def scaled_signs(x: Tensor, scale: Tensor) -> Tensor:
    """s sign(x), straight through where |x| <= s; d/ds is sign(x), divided by the root of their number
    (Liu et al. 2022, BiT, elastic binarisation).
    """
    s = slowed(scale.clamp_min(SMALLEST), x.numel() ** -0.5)
    clipped = torch.minimum(torch.maximum(x, -s.detach()), s.detach())
    return s * signs(x) + (clipped - clipped.detach())


def scaled_steps(x: Tensor, scale: Tensor) -> Tensor:
    """s where x > s / 2, else 0, for x >= 0 (an attention map);
    straight through where x <= s, d/ds as for a learned step of one bit (Esser et al. 2020).
    """
    s = slowed(scale.clamp_min(SMALLEST), x.numel() ** -0.5)
    units = (x / s).clamp(max=1.0)
    return (units + (units.detach().round() - units.detach())) * s


class ElasticSigns(SignInputs):
    """Inputs as s sign(x + shift), both learned: one scale for the layer, one shift for each feature
    (Liu et al. 2022, BiT).
    """

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(shift), nn.Parameter(scale)

    def round(self, x: Tensor) -> Tensor:
        return scaled_signs(x + self.shift.to(x.dtype), self.scale.to(x.dtype))


class BinaryAttention(AttentionChange):
    """Queries, keys and values as s sign(x), maps as s or 0,
    with low-rank estimates of the residual polynomials (Xing et al. 2024, BiPFT).

    With Q = Q_b + R_q and K = K_b + R_k, Q K^T - Q_b K_b^T = Q_b R_k^T + R_q K_b^T + R_q R_k^T. Each factor
    on the right is estimated by a linear map of the attention's input x to `rank` numbers, shared by
    the heads, and the three products are added to the binary scores; R_v is estimated likewise and added to
    the binary values before the binary maps weigh them: A_b V_b + A_b R_v. The terms are those of the paper's
    published code, which has rank 1 and one number for all of a value's features; here `up` (rank, features)
    spreads it, starting at ones. What a map loses is not estimated, as there.
    Estimates of residuals start at zero: at first attention is binary and nothing else.

    scales (4,) of queries, keys, values and maps; estimators (5, rank, in) and offsets (5, rank) of Q_b, K_b,
    R_q, R_k and R_v; None without.
    """

    estimators: nn.Parameter | None
    offsets: nn.Parameter | None
    up: nn.Parameter | None

    def __init__(
        self,
        scales: Tensor,
        estimators: Tensor | None = None,
        offsets: Tensor | None = None,
        up: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scales = nn.Parameter(scales)
        for name, tensor in (("estimators", estimators), ("offsets", offsets), ("up", up)):
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        self.hidden: Tensor | None = None

    @classmethod
    def begin(cls, call: AttentionCall, width: int, rank: int, generator: torch.Generator) -> BinaryAttention:
        """On the inputs (..., width) of an attention like this one.
        A scale starts at mean |x|, the best for signs (Rastegari et al. 2016), and a map's at 4 mean,
        as in the published code.
        """
        device = call.query.device
        scales = torch.stack(
            [call.query.abs().mean(), call.key.abs().mean(), call.value.abs().mean(), 4 * call.maps.mean()]
        ).detach()
        if not rank:
            return cls(scales)
        estimators = torch.zeros(5, rank, width)
        estimators[:2] = (
            torch.randn(2, rank, width, generator=generator) * (scales[:2].cpu() * width**-0.5)[:, None, None]
        )
        up = torch.randn(rank, call.value.shape[1] * call.value.shape[-1], generator=generator)
        up[0] = 1.0
        return cls(scales, estimators.to(device), torch.zeros(5, rank, device=device), up.to(device))

    def attached(self, module: nn.Module) -> None:
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), BinaryAttention):
                del module._forward_pre_hooks[key]
        module.register_forward_pre_hook(
            self.before, prepend=True
        )  # what the layer reads, before it is rounded

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.hidden = args[0] if self.estimators is not None else None

    def estimates(self) -> tuple[Tensor, ...]:
        """(batch, tokens, rank) each: Q_b, K_b, R_q, R_k, R_v."""
        assert self.hidden is not None and self.estimators is not None and self.offsets is not None
        hidden = self.hidden.to(self.estimators.dtype)
        found = torch.einsum("bti,eri->betr", hidden, self.estimators).add(self.offsets[:, None])
        return found.to(self.hidden.dtype).unbind(1)

    def operands(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return scaled_signs(query, self.scales[0]), scaled_signs(key, self.scales[1])

    def residual_scores(self) -> Tensor | None:
        if self.estimators is None:
            return None
        query, key, lost_query, lost_key, _ = self.estimates()
        return (query @ lost_key.mT + lost_query @ (key + lost_key).mT).unsqueeze(1)

    def weighed(self, maps: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        binary = scaled_signs(value, self.scales[2])
        if self.up is not None:
            lost = (
                (self.estimates()[4] @ self.up.to(value.dtype))
                .unflatten(-1, (value.shape[1], value.shape[-1]))
                .transpose(1, 2)
            )
            binary, self.hidden = binary + lost, None
        return scaled_steps(maps, self.scales[3]), binary


def binarise(
    on: Subject, layers: Sequence[Layer], rank: int, generator: torch.Generator, examples: int = 8
) -> None:
    """Put signs on what these layers read, and binary attention with estimators of this rank (0: none)
    around those that project for one.
    """
    size: dict[str, Tensor] = {}

    def note(layer: Layer) -> Any:
        return layer.module.register_forward_pre_hook(
            lambda module, args: size.__setitem__(layer.name, args[0].detach().abs().mean())
        )

    handles = [note(layer) for layer in layers]
    try:
        order = order_of(on, layers, examples)
    finally:
        for handle in handles:
            handle.remove()
    sites = attention_sites(order)
    for site, call in sites.items():
        layer = next(layer for layer in layers if layer.name == site)
        layer.attach(BinaryAttention.begin(call, layer.shape[-1], rank, generator))
    for layer in layers:
        if layer.name in size:
            layer.attach(
                ElasticSigns(
                    torch.zeros(layer.shape[-1], device=layer.original.device), size[layer.name].float()
                )
            )
    use_plain_attention(on.model)


class Estimators(Options):
    rank: int = parameter(8, "rank of the estimates of what binary attention loses (0: none)", ge=0, le=1024)


@TRAINED_ROUNDING.add(
    "bipft",
    formula="bibert's weights; Q K^T ~ Q_b K_b^T + Q_b R_k^T + R_q K_b^T + R_q R_k^T",
    source="Xing et al. 2024, BiPFT",
    needs="training",
    title="BiPFT",
    options=Estimators,
    traits="signs",
)
class BinaryWithEstimates(CentredSign):
    """BiBERT's weights, and binary attention around the layers that project for one."""

    @classmethod
    def check(cls, settings: TrainedSettings, on: Subject, layers: Sequence[Layer]) -> None:
        if on.task.name == "seq2seq-lm":
            raise BadInput(
                "method: bipft estimates queries and keys from one input, "
                "and a decoder's cross-attention has two; use bibert"
            )
        if not attention_sites(order_of(on, layers)):
            raise BadInput(
                f"layers: {settings.layers!r} holds no query, key or value projection, "
                "whose attention bipft makes binary"
            )
        super().check(settings, on, layers)

    @classmethod
    def after(
        cls, on: Subject, layers: Sequence[Layer], settings: TrainedSettings, generator: torch.Generator
    ) -> None:
        binarise(on, layers, settings.method.options.rank, generator)
