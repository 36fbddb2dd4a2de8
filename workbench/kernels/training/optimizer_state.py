"""What an optimizer keeps of a parameter, in fp32, bf16, int8 or FP8, and how it is read and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workbench.errors import BadInput
from workbench.kernels.backend import cdiv, jit, narrow, round_even, tl

GROUP = 128


OPTIMIZERS = ("adamw", "lamb", "lion")


STATES = ("fp32", "bf16", "int8", "fp8")


#: log2 of the ratio of E4M3's largest (448) to its smallest (2^-9) magnitude.
_LOG_RANGE = 17.807354922057604


@dataclass
class State:
    """Moments in their storage type; scales and exponents (groups,) fp32 of the quantized ones;
    the bf16 compensation.
    """

    moments: list[torch.Tensor]
    scales: list[torch.Tensor]
    exponents: list[torch.Tensor]
    compensation: torch.Tensor | None
    states: str

    @property
    def bytes_per_parameter(self) -> float:
        """All of it, scales and compensation included."""
        tensors = [
            *self.moments,
            *self.scales,
            *self.exponents,
            *([] if self.compensation is None else [self.compensation]),
        ]
        return sum(t.numel() * t.element_size() for t in tensors) / max(1, self.moments[0].numel())


def new_state(parameter: torch.Tensor, optimizer: str, states: str = "fp32") -> State:
    """Zero moments for one parameter tensor. bf16 and fp16 parameters get a compensation buffer."""
    if optimizer not in OPTIMIZERS or states not in STATES:
        raise BadInput(
            f"optimizer = {optimizer!r}, states = {states!r}: "
            f"accepted are {', '.join(OPTIMIZERS)} and {', '.join(STATES)}"
        )
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8, "fp8": torch.uint8}[states]
    n, device, count = parameter.numel(), parameter.device, 1 if optimizer == "lion" else 2
    groups = cdiv(n, GROUP) if kind == torch.uint8 else 0
    moments = [torch.zeros(n, dtype=kind, device=device) for _ in range(count)]
    if states == "int8":
        moments[0].fill_(128)
    small = parameter.dtype != torch.float32
    return State(
        moments,
        [torch.zeros(groups, device=device) for _ in range(count)],
        [torch.ones(groups if states == "fp8" else 0, device=device) for _ in range(count)],
        torch.zeros(n, dtype=parameter.dtype, device=device) if small else None,
        states,
    )


def _grouped(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, -x.numel() % GROUP)).view(-1, GROUP)


def load_moment(state: State, which: int) -> torch.Tensor:
    """Moment 0 (m) or 1 (v), decoded, (n,) fp32."""
    stored, n = state.moments[which], state.moments[which].numel()
    if state.states in ("fp32", "bf16"):
        return stored.float()
    codes, scale = _grouped(stored), state.scales[which][:, None]
    if state.states == "int8":
        unit = (codes.float() - 128) / 127 if which == 0 else (codes.float() / 255) ** 2
        return (unit * scale).flatten()[:n]
    y = codes.view(torch.float8_e4m3fn).float() / 448
    power = torch.exp2(torch.log2(y.abs()) / state.exponents[which][:, None])
    return (torch.copysign(power, y) * scale).flatten()[:n]


def store_moment(state: State, which: int, value: torch.Tensor) -> None:
    """Encode `value` (n,) fp32 into the state."""
    if state.states in ("fp32", "bf16"):
        state.moments[which].copy_(value)
        return
    groups = _grouped(value)
    scale = groups.abs().amax(1, keepdim=True)
    unit = groups / torch.where(scale > 0, scale, 1.0)
    state.scales[which].copy_(scale[:, 0])
    if state.states == "int8":
        codes = torch.round(unit * 127) + 128 if which == 0 else torch.ceil(torch.sqrt(unit) * 255)
        codes = codes.to(torch.uint8)
    else:
        magnitude = unit.abs()
        least = torch.where(magnitude > 0, magnitude, 1.0).amin(1, keepdim=True)
        power = torch.clamp(_LOG_RANGE / torch.clamp(-torch.log2(least), min=1e-3), max=8.0)
        state.exponents[which].copy_(power[:, 0])
        expanded = torch.where(magnitude > 0, torch.exp2(torch.log2(magnitude) * power), 0.0) * 448
        codes = torch.copysign(expanded, unit).to(torch.float8_e4m3fn).view(torch.uint8)
    state.moments[which].copy_(codes.flatten()[: value.numel()])


@jit
def load_block(
    ptr, scale_ptr, power_ptr, at, group, inside, live, SECOND: tl.constexpr, STATES: tl.constexpr
):
    """Decoded moment (groups, 128). STATES: 0 as stored, 1 int8, 2 fp8 with expansion."""
    if STATES == 0:
        return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    code = tl.load(ptr + at, mask=inside, other=128 if STATES == 1 and not SECOND else 0)
    scale = tl.load(scale_ptr + group, mask=live, other=0.0)[:, None]
    if STATES == 1:
        if SECOND:
            root = tl.div_rn(code.to(tl.float32), 255.0 + tl.zeros_like(code).to(tl.float32))
            return root * root * scale
        return tl.div_rn(code.to(tl.float32) - 128.0, 127.0 + tl.zeros_like(code).to(tl.float32)) * scale
    bits = code.to(tl.int16)
    y = ((bits & 0x7F) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    unit = tl.div_rn(y, 448.0 + tl.zeros_like(y))
    power = tl.load(power_ptr + group, mask=live, other=1.0)[:, None] + tl.zeros_like(y)
    value = tl.where(unit > 0, tl.exp2(tl.div_rn(tl.log2(tl.where(unit > 0, unit, 1.0)), power)), 0.0) * scale
    return tl.where((bits & 0x80) != 0, -value, value)


@jit
def store_block(
    ptr, scale_ptr, power_ptr, at, group, inside, live, value, SECOND: tl.constexpr, STATES: tl.constexpr
):
    if STATES == 0:
        tl.store(ptr + at, narrow(value, ptr.dtype.element_ty), mask=inside)
    else:
        value = tl.where(inside, value, 0.0)
        scale = tl.max(tl.abs(value), 1)
        tl.store(scale_ptr + group, scale, mask=live)
        unit = tl.div_rn(value, tl.where(scale > 0, scale, 1.0)[:, None] + tl.zeros_like(value))
        if STATES == 1:
            code = tl.ceil(tl.sqrt_rn(unit) * 255.0) if SECOND else round_even(unit * 127.0) + 128.0
            tl.store(ptr + at, code.to(tl.int32).to(tl.uint8), mask=inside)
        else:
            magnitude = tl.abs(unit)
            least = tl.min(tl.where(magnitude > 0, magnitude, 1.0), 1)
            spread = tl.maximum(-tl.log2(least), 1e-3)
            power = tl.minimum(tl.div_rn(17.807354922057604 + tl.zeros_like(spread), spread), 8.0)
            tl.store(power_ptr + group, power, mask=live)
            y = (
                tl.where(
                    magnitude > 0,
                    tl.exp2(tl.log2(tl.where(magnitude > 0, magnitude, 1.0)) * power[:, None]),
                    0.0,
                )
                * 448.0
            )
            exponent = tl.maximum(((y.to(tl.int32, bitcast=True) >> 23) & 255) - 127, -6) - 3
            quantum = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
            y = tl.minimum(round_even(tl.div_rn(y, quantum)) * quantum, 448.0)
            bits = ((y * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True) >> 7) & 0x7F
            code = bits | tl.where(unit < 0, 0x80, 0)
            tl.store(ptr + at, code.to(tl.uint8), mask=inside)


def fp32_state(moments: Sequence[torch.Tensor]) -> State:
    """Moments that an optimizer keeps in its own tensors, of the parameter's shape."""
    none = [moments[0].new_empty(0)] * len(moments)
    return State([m.view(-1) for m in moments], none, none, None, "fp32")
