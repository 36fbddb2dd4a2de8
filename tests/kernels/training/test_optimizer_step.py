"""Fused optimizer steps: equal to PyTorch's own where it has them, to the formulas elsewhere,
and kernel = reference.
"""

from __future__ import annotations

import copy

import pytest
import torch
from pytorch_optimizer import Lion

from workbench.errors import BadInput
from workbench.kernels.training.optimizer_state import (
    OPTIMIZERS,
    STATES,
    load_moment,
    new_state,
    store_moment,
)
from workbench.kernels.training.optimizer_step import optimizer_step


def run(
    optimizer: str, backend: str, states: str, kind: torch.dtype, n: int, steps: int = 3, **options: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(n)
    p = torch.randn(n).to(kind)
    state = new_state(p, optimizer, states)
    for step in range(1, steps + 1):
        optimizer_step(
            p,
            torch.randn(n).to(kind),
            state,
            optimizer,
            0.01,
            step,
            weight_decay=0.1,
            backend=backend,
            **options,
        )  # type: ignore[arg-type]
    return p, [load_moment(state, i) for i in range(len(state.moments))]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize(("kind", "n"), [(torch.float32, 1500), (torch.bfloat16, 129), (torch.float32, 1)])
def test_kernel_equals_reference(optimizer: str, states: str, kind: torch.dtype, n: int) -> None:
    (a, a_moments), (b, b_moments) = (
        run(optimizer, backend, states, kind, n) for backend in ("torch", "triton")
    )
    # exp2 and log2 differ by an ulp between libraries, so an fp8 code on a boundary may go the other way.
    close = (
        {"atol": 2e-3, "rtol": 2e-2}
        if states == "fp8" or kind == torch.bfloat16
        else {"atol": 1e-6, "rtol": 1e-5}
    )
    torch.testing.assert_close(a, b, **close)
    for x, y in zip(a_moments, b_moments, strict=True):
        torch.testing.assert_close(x, y, **(close if states != "fp8" else {"atol": 5e-3, "rtol": 0.13}))


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_fp32_steps_equal_an_independent_implementation(optimizer: str) -> None:
    p = torch.nn.Parameter(torch.randn(700))
    mine = p.detach().clone()
    options = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    other = (
        torch.optim.AdamW([p], **options)
        if optimizer == "adamw"
        else Lion([p], weight_decouple=True, **options)
    )
    state = new_state(mine, optimizer)
    for step in range(1, 4):
        p.grad = torch.randn(700)
        optimizer_step(
            mine, p.grad, state, optimizer, 0.01, step, (0.9, 0.99), weight_decay=0.1, backend="triton"
        )
        other.step()
        torch.testing.assert_close(mine, p.detach(), atol=1e-6, rtol=1e-5)


def test_lamb_equals_the_algorithm_written_out() -> None:
    mine = torch.randn(700)
    x, state = mine.double(), new_state(mine, "lamb")
    m = v = torch.zeros(700, dtype=torch.float64)
    for step in range(1, 4):
        g = torch.randn(700)
        optimizer_step(mine, g, state, "lamb", 0.01, step, (0.9, 0.99), weight_decay=0.1, backend="triton")
        m, v = 0.9 * m + 0.1 * g.double(), 0.99 * v + 0.01 * g.double() ** 2
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8) + 0.1 * x
        x = x - 0.01 * x.norm() / update.norm() * update
        torch.testing.assert_close(mine, x.float(), atol=1e-6, rtol=1e-5)


def test_compensation_keeps_steps_too_small_for_bf16() -> None:
    torch.manual_seed(0)
    exact = torch.ones(256)
    p = torch.ones(256, dtype=torch.bfloat16)
    plain = p.clone()
    state, exact_state = new_state(p, "lion"), new_state(exact, "lion")
    lossy = copy.deepcopy(state)
    lossy.compensation = torch.zeros_like(p)
    for step in range(1, 101):
        g = torch.ones(256)
        optimizer_step(exact, g, exact_state, "lion", 1e-4, step, backend="torch")
        optimizer_step(p, g.bfloat16(), state, "lion", 1e-4, step, backend="triton")
        lossy.compensation.zero_()
        optimizer_step(plain, g.bfloat16(), lossy, "lion", 1e-4, step, backend="triton")
    assert (plain == 1).all()  # one step is 1e-4, half the spacing of bf16 below 1 is 2e-3
    torch.testing.assert_close(p.float(), exact, atol=4e-3, rtol=0)
    assert not (p == 1).any()


@pytest.mark.parametrize("states", ["int8", "fp8"])
def test_stored_moments_keep_their_size_and_no_denominator_vanishes(states: str) -> None:
    p = torch.zeros(1000)
    state = new_state(p, "adamw", states)
    assert state.bytes_per_parameter < 2.2
    values = torch.randn(1000) * torch.exp(torch.randn(1000))
    store_moment(state, 0, values)
    assert (load_moment(state, 0) - values).norm() < (0.02 if states == "int8" else 0.08) * values.norm()
    squares = 10.0 ** torch.linspace(-12, 0, 1000)
    store_moment(state, 1, squares)
    assert (load_moment(state, 1) > 0).all()


def test_range_expansion_uses_the_whole_of_fp8() -> None:
    values = 1 + torch.rand(1280)  # a narrow range: plain E4M3 has 8 codes between 1 and 2
    state = new_state(values, "lion", "fp8")
    store_moment(state, 0, values)
    assert len(torch.unique(state.moments[0][:128])) > 30
    plain = (values / values.max() * 448).to(torch.float8_e4m3fn).float() / 448 * values.max()
    assert (load_moment(state, 0) - values).norm() < 0.5 * (plain - values).norm()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_extreme_gradients_and_empty_tensors(backend: str) -> None:
    p = torch.ones(4)
    state = new_state(p, "adamw")
    optimizer_step(p, torch.tensor([0.0, 1e-40, 1e18, float("nan")]), state, "adamw", 0.1, 1, backend=backend)
    torch.testing.assert_close(
        p, torch.tensor([1.0, 1.0, 0.9, float("nan")]), equal_nan=True, atol=1e-5, rtol=0
    )
    empty = torch.zeros(0)
    optimizer_step(empty, empty, new_state(empty, "lamb"), "lamb", 0.1, 1, backend=backend)


def test_impossible_requests_are_refused_in_words() -> None:
    p = torch.zeros(4, 4)
    with pytest.raises(BadInput, match="'sgd'"):
        new_state(p, "sgd")
    state = new_state(p, "lion")
    with pytest.raises(BadInput, match="not contiguous"):
        optimizer_step(p.t(), p.t(), state, "lion", 0.1, 1)
    with pytest.raises(BadInput, match="step = 0"):
        optimizer_step(p, p, state, "lion", 0.1, 0)
