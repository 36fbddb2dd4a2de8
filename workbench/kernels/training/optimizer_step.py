"""One pass over memory per optimizer step: AdamW, LAMB and Lion with fp32, bf16 or 8-bit states.

    m' = b1 m + (1 - b1) g,   v' = b2 v + (1 - b2) g^2
    AdamW (Loshchilov and Hutter, 2019)   u = (m' / c1) / (sqrt(v' / c2) + eps) + wd p,   p' = p - lr u,
                                          c_i = 1 - b_i^step
    LAMB (You et al., 2020)               u as AdamW,   p' = p - lr min(|p|, largest) / |u| u, per tensor
    Lion (Chen et al., 2023)              u = sign(b1 m + (1 - b1) g) + wd p,  m' = b2 m + (1 - b2) g

States ("fp32", "bf16", "int8", "fp8") are quantized in groups of 128 with one scale each. int8 keeps m
linearly and sqrt(v) rounded up, so that no denominator vanishes. fp8 is COAT (Xi et al., 2025): E4M3 after
the dynamic range expansion |x|^k, k = log R(E4M3) / log R(group), R = largest / smallest magnitude; codes
and k are stored. With bf16 parameters a bf16 compensation buffer (Kahan, 1965)
keeps what the last addition lost, so small steps are not rounded away.

>>> p = torch.zeros(300)
>>> state = new_state(p, "adamw", states="int8")
>>> optimizer_step(p, torch.ones(300), state, "adamw", lr=0.1, step=1)
>>> p[:2], state.bytes_per_parameter
(tensor([-0.1000, -0.1000]), 2.08...)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from workbench.errors import BadInput
from workbench.kernels.backend import cdiv, jit, narrow, on_device, tl, use_triton
from workbench.kernels.registry import Case, Configuration, Kernel
from workbench.kernels.training.optimizer_state import (
    GROUP,
    OPTIMIZERS,
    State,
    load_block,
    load_moment,
    new_state,
    store_block,
    store_moment,
)

# The reference ----------------------------------------------------------------------------------------------


def reference_step(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    state: State,
    optimizer: str,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    largest: float = math.inf,
    bias_correction: bool = True,
) -> torch.Tensor | None:
    """The formulas of this module in plain PyTorch, in place; LAMB's ratio of norms."""
    c1, c2 = corrections(betas, step, bias_correction)
    ratio = None
    g, p = gradient.float().flatten(), parameter.float().flatten()
    m, (b1, b2) = load_moment(state, 0), betas
    if optimizer == "lion":
        update = torch.sign(b1 * m + (1 - b1) * g) + weight_decay * p
        store_moment(state, 0, b2 * m + (1 - b2) * g)
    else:
        m = b1 * m + (1 - b1) * g
        v = b2 * load_moment(state, 1) + (1 - b2) * (g * g)
        store_moment(state, 0, m)
        store_moment(state, 1, v)
        if (
            optimizer == "lamb"
        ):  # the second pass reads the moments back, so the update is what their storage holds
            m, v = load_moment(state, 0), load_moment(state, 1)
        update = m / c1 / (torch.sqrt(v / c2) + eps) + weight_decay * p
        if optimizer == "lamb":
            ratio = ratio_of(torch.stack([p.norm(), update.norm()]), largest)
            update = update * ratio
    change = -lr * update
    if state.compensation is not None:
        change = change + state.compensation.float()
    new = (p + change).to(parameter.dtype)
    if state.compensation is not None:
        state.compensation.copy_(change - (new.float() - p))
    parameter.copy_(new.view(parameter.shape))
    return ratio


def corrections(betas: tuple[float, float], step: int, wanted: bool) -> tuple[float, float]:
    """What the moments are divided by for having started at zero."""
    return (1 - betas[0] ** step, 1 - betas[1] ** step) if wanted else (1.0, 1.0)


def ratio_of(sizes: torch.Tensor, largest: float) -> torch.Tensor:
    """min(|p|, largest) / |u| of sizes (|p|, |u|), 1 where either is zero."""
    return torch.where((sizes > 0).all(), sizes[0].clamp(max=largest) / sizes[1], 1.0)


# The kernel -------------------------------------------------------------------------------------------------


@jit
def _step(
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    ms_ptr,
    vs_ptr,
    mk_ptr,
    vk_ptr,
    c_ptr,
    norms_ptr,
    n,
    lr,
    b1,
    b2,
    one_b1,
    one_b2,
    c1,
    c2,
    eps,
    decay,
    LION: tl.constexpr,
    PHASE: tl.constexpr,
    STATES: tl.constexpr,
    COMPENSATED: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """PHASE 0: moments and parameters in one pass. LAMB: 1 updates the moments and sums |p|^2 and |u|^2,
    2 moves the parameters.
    """
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None].to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = at < n
    live = group * WIDTH < n
    p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = load_block(m_ptr, ms_ptr, mk_ptr, at, group, inside, live, False, STATES)
    if PHASE < 2:
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if LION:
        direction = b1 * m + one_b1 * g
        update = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, direction)) + decay * p
        store_block(m_ptr, ms_ptr, mk_ptr, at, group, inside, live, b2 * m + one_b2 * g, False, STATES)
    else:
        v = load_block(v_ptr, vs_ptr, vk_ptr, at, group, inside, live, True, STATES)
        if PHASE < 2:
            m = b1 * m + one_b1 * g
            v = b2 * v + one_b2 * (g * g)
            store_block(m_ptr, ms_ptr, mk_ptr, at, group, inside, live, m, False, STATES)
            store_block(v_ptr, vs_ptr, vk_ptr, at, group, inside, live, v, True, STATES)
            if PHASE == 1:
                tl.debug_barrier()  # what is read back must have been written by all threads of the block
                m = load_block(m_ptr, ms_ptr, mk_ptr, at, group, inside, live, False, STATES)
                v = load_block(v_ptr, vs_ptr, vk_ptr, at, group, inside, live, True, STATES)
        update = (
            tl.div_rn(
                tl.div_rn(m, c1 + tl.zeros_like(m)), tl.sqrt_rn(tl.div_rn(v, c2 + tl.zeros_like(v))) + eps
            )
            + decay * p
        )
        update = tl.where(inside, update, 0.0)
    if PHASE == 1:
        tl.store(norms_ptr + 2 * tl.program_id(0), tl.sum(tl.sum(p * p, 1), 0))
        tl.store(norms_ptr + 2 * tl.program_id(0) + 1, tl.sum(tl.sum(update * update, 1), 0))
    else:
        if PHASE == 2:
            update = update * tl.load(norms_ptr)
        change = -lr * update
        if COMPENSATED:
            change += tl.load(c_ptr + at, mask=inside, other=0.0).to(tl.float32)
        new = narrow(p + change, p_ptr.dtype.element_ty)
        tl.store(p_ptr + at, new, mask=inside)
        if COMPENSATED:
            tl.store(
                c_ptr + at, narrow(change - (new.to(tl.float32) - p), c_ptr.dtype.element_ty), mask=inside
            )


def _launch(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    state: State,
    optimizer: str,
    lr: float,
    step: int,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    largest: float,
    bias_correction: bool,
) -> torch.Tensor | None:
    n = parameter.numel()
    if not n:
        return None
    c1, c2 = corrections(betas, step, bias_correction)
    m, b1, b2 = state.moments[0], *betas
    v = state.moments[-1]
    scales, powers = (list(x) if x[0].numel() else [m, m] for x in (state.scales, state.exponents))
    blocks = cdiv(n, 8 * GROUP)
    norms = torch.empty(2 * blocks, device=parameter.device)

    def run(phase: int, norms: torch.Tensor) -> None:
        _step[(blocks,)](
            parameter,
            gradient,
            m,
            v,
            scales[0],
            scales[-1],
            powers[0],
            powers[-1],
            parameter if state.compensation is None else state.compensation,
            norms,
            n,
            lr,
            b1,
            b2,
            1 - b1,
            1 - b2,
            c1,
            c2,
            eps,
            decay,
            LION=optimizer == "lion",
            PHASE=phase,
            STATES={"int8": 1, "fp8": 2}.get(state.states, 0),
            COMPENSATED=state.compensation is not None,
            GROUPS=8,
            WIDTH=GROUP,
            num_warps=4,
        )

    with on_device(parameter):
        if optimizer != "lamb":
            run(0, norms)
            return None
        run(1, norms)
        ratio = ratio_of(norms.view(-1, 2).sum(0).sqrt(), largest)
        run(2, ratio.view(1))
        return ratio


@torch.no_grad()
def optimizer_step(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    state: State,
    optimizer: str,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    backend: str = "auto",
    largest: float = math.inf,
    bias_correction: bool = True,
) -> torch.Tensor | None:
    """One step on one parameter tensor, in place, state included. `step` counts from 1.
    No synchronisation with the GPU. Returns the ratio of norms that LAMB moved by, a scalar.
    """
    if optimizer not in OPTIMIZERS:
        raise BadInput(f"optimizer = {optimizer!r}: accepted are {', '.join(OPTIMIZERS)}")
    if gradient.shape != parameter.shape or step < 1 or lr < 0:
        raise BadInput(
            f"gradient {tuple(gradient.shape)}, step = {step}, lr = {lr}: "
            f"need the parameter's shape {tuple(parameter.shape)}, >= 1 and >= 0"
        )
    if not parameter.is_contiguous():
        raise BadInput(
            "parameter: not contiguous in memory; the step is in place over flat memory, "
            "so call .contiguous() when you create it"
        )
    options = (optimizer, lr, step, betas, eps, weight_decay, largest, bias_correction)
    if use_triton("optimizer_step", parameter.numel(), parameter, backend):
        return _launch(parameter, gradient.contiguous(), state, *options)
    return reference_step(parameter, gradient, state, *options)


def fuses(parameters: Sequence[torch.Tensor]) -> bool:
    """Whether one step of these is faster tensor by tensor in the kernel than all together in torch's foreach
    functions: fp32 parameters on a GPU.
    """
    plain = all(p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
    return plain and use_triton("optimizer_step", sum(p.numel() for p in parameters), parameters[0])


def _configuration(name: str, kind: str, moment: str, lion: bool, phase: int, states: int) -> Configuration:
    types = {
        "p_ptr": f"*{kind}",
        "g_ptr": f"*{kind}",
        "m_ptr": f"*{moment}",
        "v_ptr": f"*{moment}",
        "c_ptr": f"*{kind}",
        "norms_ptr": "*fp32",
    }
    types |= dict.fromkeys(("ms_ptr", "vs_ptr", "mk_ptr", "vk_ptr"), "*fp32")
    types |= dict.fromkeys(("lr", "b1", "b2", "one_b1", "one_b2", "c1", "c2", "eps", "decay"), "fp32")
    constants = {
        "LION": lion,
        "PHASE": phase,
        "STATES": states,
        "COMPENSATED": kind != "fp32",
        "GROUPS": 8,
        "WIDTH": GROUP,
    }
    return Configuration(name, types, constants)


KERNELS = (
    Kernel(
        "optimizer_step.step",
        _step,
        (
            _configuration("adamw-fp32", "fp32", "fp32", False, 0, 0),
            _configuration("adamw-bf16-compensated", "bf16", "bf16", False, 0, 0),
            _configuration("adamw-bf16-int8", "bf16", "u8", False, 0, 1),
            _configuration("adamw-bf16-fp8", "bf16", "u8", False, 0, 2),
            _configuration("lion-bf16-int8", "bf16", "u8", True, 0, 1),
            _configuration("lamb-fp32-moments", "fp32", "fp32", False, 1, 0),
            _configuration("lamb-fp32-parameters", "fp32", "fp32", False, 2, 0),
            _configuration("lamb-bf16-int8-moments", "bf16", "u8", False, 1, 1),
        ),
    ),
)


def cases() -> list[Case]:
    """2^26 parameters against PyTorch's foreach AdamW, fp32."""
    n = 2**26

    def make(
        optimizer: str, states: str, device: torch.device
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        p, g = torch.randn(2, n, device=device).unbind(0)
        state = new_state(p, optimizer, states)
        usual = torch.nn.Parameter(p.clone())
        usual.grad = g
        comparator = torch.optim.AdamW([usual], foreach=True)
        return lambda: optimizer_step(p, g, state, optimizer, 1e-3, 10, backend="triton"), comparator.step

    traffic = {
        ("adamw", "fp32"): 28,
        ("adamw", "int8"): 16,
        ("adamw", "fp8"): 16,
        ("lion", "fp32"): 20,
        ("lamb", "fp32"): 44,
    }
    return [
        Case(
            "optimizer_step",
            f"{o}, {s} states, 2^26 fp32",
            n,
            float(b * n),
            20.0 * n,
            lambda device, o=o, s=s: make(o, s, device),  # type: ignore[misc]
            comparator="foreach AdamW",
        )
        for (o, s), b in traffic.items()
    ]
