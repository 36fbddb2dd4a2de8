"""Learned roundings against brute force and against their own starting point;
block-wise and sequential calibration.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench
from tests.conftest import ARCHITECTURES
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization import Quantize, rounding_order
from workbench.quantization.activations.sequential import block_calls, paired_moments, target
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import Grid
from workbench.quantization.rounding.blockwise import output_of, windows
from workbench.quantization.rounding.learned import (
    AdaRound,
    Learned,
    LearnedLowRank,
    LowRankAdaRound,
    keep_best,
)
from workbench.quantization.rounding.nearest import rounded
from workbench.quantization.rounding.problem import Problem
from workbench.quantization.rounding.rounding import ROUNDING

LEARNED = ROUNDING.with_trait("learned")
SMALL = {"calibration_examples": 8, "predict_examples": 0, "test_examples": 4, "group_size": 16}


def learned(one: Problem, method: str, steps: int = 150) -> tuple[torch.Tensor, Grid]:
    return rounded(one, method, **({"steps": steps} if method in LEARNED else {}))


def problem(
    rows: int = 24, width: int = 32, name: str = "int3", granularity: str = "group", **more: object
) -> Problem:
    inputs = torch.randn(300, width) @ (torch.eye(width) + 0.4 * torch.randn(width, width))
    return Problem(torch.randn(rows, width), inputs.T @ inputs, named(name), granularity, 16, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("name", ["int3", "uint3"])
@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
def test_better_than_nearest_and_on_the_grid(method: str, name: str, granularity: str) -> None:
    one = problem(name=name, granularity=granularity)
    values, grid = learned(one, method)
    assert torch.allclose(grid.round(values), values, atol=1e-5)
    nearest = one.error(rounded(one, "nearest")[0])
    assert one.error(values) < 0.97 * nearest


def test_signround_clips_the_weights_own_extremes() -> None:
    """s = (max W a - min W b) / (2^b - 1), eq. 4, not the ends of the grid, which lie up to half a step off;
    a range that was clipped stays clipped.
    """
    one = problem(name="uint4")
    low, high = (getattr(one.weight.reshape(24, 2, 16), end)(-1) for end in ("amin", "amax"))
    made = rounding_of(one)
    assert torch.equal(made.range[0], low) and torch.equal(made.range[1], high)
    made.alpha.data.fill_(0.75)
    made.beta.data.fill_(0.625)
    scale, zero = made.grid_soft()
    assert torch.equal(scale, ((0.75 * high - 0.625 * low) / 15).half().float())
    assert torch.equal(zero, torch.round(-0.625 * low / scale))
    clipped = rounding_of(replace(one, rule="mse"))
    share = clipped.base.scale / made.base.scale
    assert (share < 1).any() and torch.allclose(clipped.range[1], high * share)
    whole = rounding_of(problem(name="uint4", granularity="tensor"))
    assert whole.range[0].shape == (1, 1)


@pytest.mark.parametrize("method", ["signround", "flexround"])
def test_what_is_rounded_to_an_end_still_learns(method: str) -> None:
    """clip(round(u)): within half a step beyond an end there is a gradient, farther out there is none."""
    made = rounding_of(problem(name="int4", granularity="channel"), method)
    units = torch.tensor([[-8.6, -8.4, 6.0, 7.4, 7.6]], requires_grad=True)
    made.clipped_units(units).sum().backward()
    assert units.grad is not None and units.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]


def rounding_of(one: Problem, method: str = "signround") -> Any:
    return ROUNDING.chosen(method)(one)


def test_rows_with_one_shared_zero_point_are_kept_as_a_whole() -> None:
    """The kind: rows are mixed of two solutions whose shared step is one and whose zero points differ."""
    one = problem(name="uint3", granularity="tensor")
    grid = one.grid()
    assert grid.zero is not None
    moved = replace(grid, zero=grid.zero + 1)
    error = torch.tensor([1.0, 0.0] * 12)
    values, found, _ = keep_best(
        grid.round(one.weight), grid, error, moved.round(one.weight), moved, 1 - error + 0.1
    )
    assert torch.equal(found.round(values), values)


@pytest.mark.parametrize("name", ["e2m1", "nf4"])
@pytest.mark.parametrize("method", ["flexround", "signround", "adaquant"])
def test_other_formats(method: str, name: str) -> None:
    one = problem(name=name)
    values, grid = learned(one, method)
    assert torch.allclose(grid.round(values), values, atol=1e-5)
    assert one.error(values) < one.error(rounded(one, "nearest")[0])


def test_adaround_comes_close_to_the_best_of_all_roundings() -> None:
    """Ten weights, every one of the 2^10 up-or-down choices tried."""
    one = problem(rows=1, width=10, name="int4-odd", granularity="channel")
    found = one.error(rounded(one, "adaround", steps=800)[0])
    grid = one.grid()
    floor = torch.floor(one.weight / grid.scale)
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=10)))
    best = min(one.error((floor + c).clamp(-7, 7) * grid.scale) for c in choices)
    nearest = one.error(rounded(one, "nearest")[0])
    assert best <= found * (1 + 1e-6) and found - best < 0.25 * (nearest - best)


def test_adaround_starts_at_the_weights_and_ends_at_bits() -> None:
    one = problem()
    module = AdaRound(one, Learned())
    inside = (module.units.abs() < 3) & ((module.units - module.floor - 0.5).abs() < 0.48)
    assert torch.allclose(module.soft(0.0)[inside], one.weight[inside], atol=1e-4)
    values, _ = module.hard()
    offset = values / module.step - module.floor
    assert torch.isin(offset.round(decimals=3)[module.floor.abs() < 3], torch.tensor([0.0, 1.0])).all()


def test_half_quadratic_lowers_its_norm_and_keeps_zeros() -> None:
    mask = torch.rand(24, 32) < 0.6
    one = problem(name="uint3", mask=mask)
    one.weight = one.weight * mask
    values, grid = rounded(one, "hqq")
    start = one.masked(one.grid().round(one.weight))
    assert (values - one.weight).abs().pow(0.7).mean() < (start - one.weight).abs().pow(0.7).mean()
    assert (values[~mask] == 0).all()
    assert grid.bytes((24, 32)) == (24 * 32 * 3 + 48 * (16 + 16)) / 8


def test_half_quadratic_finds_a_grid_that_is_not_whole_at_zero() -> None:
    """Weights at s (k - z) with a fractional z, as any range's ends give:
    the exact zero point leaves them where they are.
    """
    weight = 0.125 * (
        torch.stack([torch.randperm(16) for _ in range(8)]).float() - torch.linspace(3.1, 11.9, 8)[:, None]
    )
    one = Problem(weight, torch.eye(16), named("uint4"), "channel")
    values, grid = rounded(one, "hqq")
    assert torch.allclose(values, weight, atol=0.125 * 1e-2) and (grid.round(weight) == values).all()
    assert not torch.allclose(rounded(one, "nearest")[0], weight, atol=0.125 * 1e-2)


@pytest.mark.parametrize("method", [*LEARNED, "gptq"])
def test_masked_weights_stay_zero(method: str) -> None:
    mask = torch.rand(24, 32) < 0.5
    one = problem(mask=mask)
    one.weight = one.weight * mask
    values, _ = learned(one, method)
    assert (values[~mask] == 0).all() and one.error(values) < one.error(rounded(one, "nearest")[0])


def test_the_asymmetric_target_minimises_the_error_to_the_dense_output() -> None:
    dense, noisy = torch.randn(200, 16), None
    noisy = dense + 0.3 * torch.randn(200, 16)
    weight = torch.randn(8, 16)
    best = target(weight, noisy.T @ noisy, dense.T @ noisy, 1e-8)
    expected = torch.linalg.lstsq(noisy, dense @ weight.T).solution.T
    assert torch.allclose(best, expected, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "fields",
    [
        {"rounding": "gptq", "sequential": True},
        {"rounding": "signround", "rounding.objective": "block"},
        {
            "rounding": "flexround",
            "rounding.objective": "block",
            "sequential": True,
            "rounding.objective.window": 2,
        },
    ],
)
def test_block_by_block_on_every_architecture(
    checkpoints: dict[str, Path], architecture: str, fields: dict[str, object]
) -> None:
    on = workbench.subject(checkpoints[architecture], data="random")
    few = {} if fields["rounding"] == "gptq" else {"rounding.steps": 8}
    result = Quantize(**(SMALL | fields | few | {"format": "int3"})).run(on, Progress(), cache=False)
    assert len(result.table) == len(on.layers())
    assert result.subject is not None
    for layer in result.subject.layers():
        assert torch.isfinite(layer.weight).all()
        assert torch.allclose(
            layer.changes[-1].change(layer.original.mT if layer.transposed else layer.original),
            layer.weight,
            atol=1e-6,
        )


def test_windows_cover_every_block() -> None:
    assert [list(w) for w in windows(4, 2, 1)] == [[0, 1], [1, 2], [2, 3]]
    assert [list(w) for w in windows(5, 2, 0)] == [[0, 1], [2, 3], [3, 4]] and [
        list(w) for w in windows(3, 1, 0)
    ] == [[0], [1], [2]]
    assert [list(w) for w in windows(2, 4, 1)] == [[0, 1]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_in_a_window_are_chained_exactly(checkpoints: dict[str, Path], architecture: str) -> None:
    on = workbench.subject(checkpoints[architecture], data="random")
    names = [name for name, _ in on.blocks()][:2]
    calls = [block_calls(on, name, 8) for name in names]
    parts = [on.model.get_submodule(name) for name in names]
    with torch.no_grad():
        found = output_of(parts, [{}, {}], [c[0] for c in calls])
    assert torch.allclose(found, calls[1][0].output, atol=1e-5)


def test_a_window_lowers_the_error_behind_it_and_low_rank_rounding_has_few_parameters(
    checkpoints: dict[str, Path],
) -> None:
    on = workbench.subject(checkpoints["bert"], data="random")
    outputs, shared = (
        {},
        SMALL
        | {
            "format": "int2",
            "granularity": "channel",
            "rounding.steps": 120,
            "rounding.objective": "block",
            "rounding": "flexround",
        },
    )
    nearest = SMALL | {"format": "int2", "granularity": "channel"}
    for name, fields in {
        "dense": None,
        "nearest": None,
        "one": {},
        "two": {"rounding.objective.window": 2},
        "two, low rank": {"rounding.objective.window": 2, "rounding": "lowrank-adaround"},
    }.items():
        made = (
            on
            if name == "dense"
            else Quantize(**(nearest if fields is None else shared | fields))
            .run(on, Progress(), cache=False)
            .subject
        )
        assert made is not None
        with torch.no_grad():
            outputs[name] = made.model(
                **made.task.inputs(next(iter(made.batches("calibration", 8)))), output_hidden_states=True
            ).hidden_states[-1]
    errors = {k: float((v - outputs["dense"]).square().mean()) for k, v in outputs.items()}
    assert errors["two"] < errors["one"] < errors["nearest"] and errors["two, low rank"] < errors["nearest"]
    module = LowRankAdaRound(problem(), LearnedLowRank())
    assert sum(p.numel() for p in module.parameters()) == 5 * (24 + 32) + module.base.scale.numel()


def test_low_rank_rounding_learns_its_steps() -> None:
    """d loss / d log s is <g, values>, and what it ends on lies on the grid that it hands over."""
    one = problem()
    module = LowRankAdaRound(one, LearnedLowRank(steps=100))
    upstream = torch.randn_like(one.weight)
    values = module.soft(0.0)
    values.backward(upstream)
    assert module.log_step.grad is not None
    expected = 0.02 * (upstream * values.detach()).unflatten(1, (-1, 16)).sum(-1)
    torch.testing.assert_close(module.log_step.grad, expected, rtol=1e-3, atol=1e-5)
    found, grid = module.learned()
    assert not torch.equal(grid.scale, module.base.scale)
    torch.testing.assert_close(grid.round(found), found)


def test_low_rank_rounding_has_two_targets(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the dense blocks give on dense inputs, and on those of the quantized prefix (CBQ)."""
    on = workbench.subject(checkpoints["llama"], data="random")
    dense, seen = on.copy(), []

    def note(
        model: Any, blocks: Any, layers: Any, modules: Any, calls: Any, targets: Any, *rest: Any, **more: Any
    ) -> None:
        seen.append((blocks, calls, targets))

    monkeypatch.setattr(rounding_order, "reconstruct", note)
    fields = {"format": "int2", "rounding": "lowrank-adaround", "rounding.objective": "block"}
    Quantize(**SMALL, **fields).run(on, Progress(), cache=False)
    for blocks, calls, (first, second) in seen:
        parts = [dense.model.get_submodule(block) for block in blocks]
        wanted = block_calls(dense, blocks[-1], 8)
        with torch.no_grad():
            again = [output_of(parts, [{} for _ in parts], call) for call in calls]
        for mine, theirs in zip((*first, *second), (*[c.output for c in wanted], *again), strict=True):
            torch.testing.assert_close(mine, theirs)
    _, _, (first, second) = seen[-1]
    assert not torch.allclose(first[0], second[0], atol=1e-4), (
        "the last block reads what rounding has changed"
    )


def test_the_first_block_sees_the_dense_inputs(checkpoints: dict[str, Path]) -> None:
    on = workbench.subject(checkpoints["bert"], data="random")
    layers = on.layers("*.layer.0.*")
    sums, cross = paired_moments(on, on, on.blocks()[0][0], layers, 8)
    for layer in layers:
        gram = sums[layer.name].gram
        assert gram is not None and torch.allclose(gram[0], cross[layer.name], rtol=1e-4, atol=1e-3)
        weight = layer.weight.detach()
        assert torch.allclose(target(weight, gram[0], cross[layer.name], 0.01), weight, atol=1e-4)


def test_block_objective_lowers_the_block_error(checkpoints: dict[str, Path]) -> None:
    on = workbench.subject(checkpoints["bert"], data="random")
    hidden = {}
    for name, fields in {
        "dense": None,
        "nearest": {"rounding": "nearest"},
        "flexround": {"rounding": "flexround", "rounding.objective": "block", "rounding.steps": 80},
    }.items():
        subject = on
        if fields is not None:
            made = (
                Quantize(
                    **(SMALL | {"format": "int3", "granularity": "channel", "layers": "*.layer.0.*"} | fields)
                )
                .run(on, Progress(), cache=False)
                .subject
            )
            assert made is not None
            subject = made
        batch = next(iter(subject.batches("calibration", 8)))
        with torch.no_grad():
            hidden[name] = subject.model(
                **subject.task.inputs(batch), output_hidden_states=True
            ).hidden_states[1]
    errors = {k: float((v - hidden["dense"]).square().mean()) for k, v in hidden.items()}
    assert errors["flexround"] < 0.8 * errors["nearest"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rounding": "adaround", "format": "nf4"}, "adaround"),
        ({"rounding": "hqq"}, "hqq"),
        ({"rounding": "flexround", "format": "mxfp4"}, "flexround"),
        ({"rounding": "gptq", "rounding.objective": "block"}, "objective"),
        ({"rounding": "adaround", "rounding.objective.window": 2}, "window"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(
    checkpoints: dict[str, Path], fields: dict[str, object], text: str
) -> None:
    on = workbench.subject(checkpoints["bert"], data="random")
    with pytest.raises(BadInput, match=text):
        Quantize(**(SMALL | fields)).run(on, Progress(), cache=False)
