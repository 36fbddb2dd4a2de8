"""Salient weights on a wider grid, binarisation about the mean, learned scales:
closed forms, bytes as stored, refusals.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import workbench
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization import Quantize, fit, named
from workbench.quantization.number.packing import packed_layer, quantizer_of, unpacked_layer
from workbench.quantization.number.split_grid import Salient, SplitGrid, effective_bits, index_bits
from workbench.quantization.rounding.learned import Learned, Scales
from workbench.quantization.rounding.nearest import rounded
from workbench.quantization.rounding.problem import Problem

BINARY = {
    "format": "binary",
    "range": "centred",
    "granularity": "channel",
    "salient": "columns",
    "salient.share": 0.2,
}
SMALL = {"calibration_examples": 8, "predict_examples": 0, "test_examples": 4, "group_size": 16}


def problem(
    rows: int = 24, width: int = 40, name: str = "binary", rule: str = "centred", **more: object
) -> Problem:
    inputs = (
        torch.randn(300, width)
        @ (torch.eye(width) + 0.4 * torch.randn(width, width))
        * torch.linspace(0.2, 3, width)
    )
    return Problem(
        torch.randn(rows, width) + 0.1, inputs.T @ inputs, named(name), "channel", 16, rule, **more
    )  # type: ignore[arg-type]


def test_centred_binarisation_is_the_best_scale_about_the_mean() -> None:
    """m + s sign(w - m) with s the mean of |w - m|: no other s on a line is better."""
    weight = torch.randn(5, 12) + 0.5
    grid = fit(weight, named("binary"), "channel", rule="centred")
    mean = weight.mean(1, keepdim=True)
    spread = (weight - mean).abs().mean(1, keepdim=True)
    assert torch.allclose(grid.round(weight), mean + spread * torch.sign(weight - mean), atol=2e-3)
    found = (grid.round(weight) - weight).square().sum(1)
    for factor in torch.linspace(0.5, 1.5, 41):
        assert (
            found <= (mean + factor * spread * torch.sign(weight - mean) - weight).square().sum(1) + 1e-3
        ).all()


def test_the_mask_is_of_the_features_with_the_most_energy_or_of_single_weights() -> None:
    one = problem(rows=3, width=10)
    columns = Salient(0.2).mask(one.weight, one.gram)
    assert columns.shape == (1, 10) and columns[0].nonzero().flatten().tolist() == sorted(
        one.gram.diagonal().topk(2).indices.tolist()
    )
    single = Salient(0.2, pattern="weights").mask(one.weight, one.gram)
    score = one.weight.square() * one.gram.diagonal()
    assert (single.sum(1) == 2).all() and (
        score[single].view(3, 2).amin(1) >= score[~single].view(3, 8).amax(1)
    ).all()
    assert Salient(0.0).count(10) == 1 and Salient(1.0).count(10) == 9


@pytest.mark.parametrize("pattern", ["columns", "weights"])
@pytest.mark.parametrize("name", ["binary", "int2", "uint2", "mxfp4"])
def test_a_split_grid_is_its_two_parts(pattern: str, name: str) -> None:
    one = problem(name=name, rule="auto", salient=Salient(0.2, 4, pattern))
    one.granularity = "auto"
    values, grid = rounded(one, "nearest")
    assert (
        isinstance(grid, SplitGrid)
        and torch.allclose(grid.round(values), values, atol=1e-5)
        and torch.allclose(grid.decode(grid.codes(values)), values, atol=1e-5)
    )
    mask = grid.mask.expand_as(values)
    inside = one.weight[mask].view(24, 8)
    assert torch.equal(values[mask].view(24, 8), fit(inside, named("uint4"), "group", 16).round(inside))
    outside = one.weight[~mask].view(24, 32)
    assert torch.equal(values[~mask].view(24, 32), fit(outside, named(name), "auto", 16).round(outside))
    low, high = grid.bounds(40)
    assert (values >= low - 1e-5).all() and (values <= high + 1e-5).all()


def test_bits_are_counted_with_the_mask_and_the_scales() -> None:
    for pattern, column_factors in (("columns", False), ("columns", True), ("weights", False)):
        one = problem(salient=Salient(0.2, 4, pattern))
        _, grid = rounded(one, "scales" if column_factors else "nearest")
        assert grid.bytes((24, 40)) * 8 / 960 == pytest.approx(
            effective_bits(24, 40, 0.2, pattern=pattern, column_factors=column_factors)
        )
    assert effective_bits(4096, 4096, 0.2) == pytest.approx(
        0.8 + 0.2 * 4 + 1 / 4096 + 52 / 4096, abs=1e-3
    )  # the paper's 1.61
    assert index_bits(10, 3) == math.ceil(math.log2(math.comb(10, 3)))
    share = 0.07
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    assert index_bits(4000, 280) / 4000 == pytest.approx(entropy, abs=2e-3)


def test_learned_scales_come_close_to_the_best_of_all_scales() -> None:
    """Codes are fixed, so one row's best scale is a least-squares quotient: learning reaches it."""
    one = problem(rows=1, width=12, rule="mean")
    module = Scales(one, Learned(steps=80))
    module.log_column.requires_grad_(False)
    signs = torch.sign(one.weight)
    best = float((signs @ one.gram @ one.weight.T) / (signs @ one.gram @ signs.T))
    optimizer = torch.optim.Adam([module.log_group, module.log_row], 2e-2)
    for _ in range(150):
        gap = module.soft(0.0) - one.weight
        optimizer.zero_grad()
        ((gap @ one.gram) * gap).sum().backward()
        optimizer.step()
    assert float(module.grid().scale) == pytest.approx(best, rel=2e-2)


@pytest.mark.parametrize("pattern", ["columns", "weights"])
def test_learned_scales_keep_codes_and_salient_values(pattern: str) -> None:
    one = problem(salient=Salient(0.2, 4, pattern))
    start, before = rounded(one, "nearest")
    values, grid = rounded(one, "scales", steps=80)
    assert isinstance(grid, SplitGrid) and torch.allclose(grid.round(values), values, atol=1e-4)
    assert torch.equal(grid.codes(values), before.codes(start)) and one.error(values) < 0.95 * one.error(
        start
    )
    if pattern == "columns":
        assert torch.equal(values[:, grid.mask[0]], start[:, grid.mask[0]])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rounding": "scales"},
        {"rounding": "scales", "rounding.objective": "block", "sequential": True},
        {"format": "int2", "range": "auto"},
        {"granularity": "group"},
    ],
)
def test_packed_saved_and_opened_again(
    checkpoints: dict[str, Path], fields: dict[str, object], tmp_path: Path
) -> None:
    on = workbench.subject(checkpoints["bert"], data="random")
    result = Quantize(**(SMALL | BINARY | fields)).run(on, Progress(), cache=False)
    assert result.subject is not None
    for layer in result.subject.layers():
        change, stored = quantizer_of(layer), packed_layer(layer)
        assert isinstance(change.grid, SplitGrid) and torch.allclose(
            unpacked_layer(stored, change, layer.shape), layer.weight, atol=1e-5
        )
        claimed = change.grid.bytes(layer.shape) - (
            0 if change.grid.transform is None else change.grid.transform.bytes
        )
        assert (
            abs(sum(t.numel() * t.element_size() for k, t in stored.items() if k != "smooth") - claimed) < 4
        )
    result.save(tmp_path / "out")
    again = workbench.subject(tmp_path / "out")
    assert again.evaluate("test")["loss"] == pytest.approx(result.subject.evaluate("test")["loss"], abs=1e-5)


def test_each_step_lowers_the_loss() -> None:
    """Binary, then salient features, then learned scales; of a block, on the quantized prefix,
    they lower it as well.
    """
    on = workbench.subject("digits-vit")
    few = {"predict_examples": 0, "calibration_examples": 32}
    learned = BINARY | few | {"rounding": "scales", "rounding.steps": 30}
    steps: list[dict[str, object]] = [
        few | {name: BINARY[name] for name in ("format", "range", "granularity")},
        few | BINARY,
        learned,
        learned | {"rounding.objective": "block", "sequential": True},
    ]
    losses = [Quantize(**step).run(on, Progress(), cache=False).facts["loss"] for step in steps]
    assert losses[1] < losses[0] and max(losses[2:]) < 0.5 * losses[1]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rounding": "gptq"}, "salient: "),
        ({"rounding": "flexround"}, "salient: "),
        ({"format": "bf16", "range": "auto"}, "salient: "),
        ({"format": "int"}, "centred"),
        ({"rounding": "scales", "transform": "activation-aware"}, "scales"),
        ({"rounding": "scales", "format": "mxfp4", "granularity": "auto", "range": "auto"}, "scales"),
    ],
)
def test_what_means_nothing_is_refused(
    checkpoints: dict[str, Path], fields: dict[str, object], text: str
) -> None:
    with pytest.raises(BadInput, match=text):
        Quantize(**(SMALL | BINARY | fields)).run(
            workbench.subject(checkpoints["bert"], data="random"), Progress(), cache=False
        )


def test_experts_and_exports_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from workbench.quantization import to_compressed_tensors

    experts = workbench.subject(checkpoints["mixtral"], data="random")
    with pytest.raises(BadInput, match="experts"):
        Quantize(**(SMALL | BINARY)).run(experts, Progress(), cache=False)
    bert = workbench.subject(checkpoints["bert"], data="random")
    wide = (
        Quantize(
            **(
                SMALL
                | {
                    "format": "int4",
                    "salient": "columns",
                    "salient.share": 0.1,
                    "salient.bits": 8,
                    "layers": "*.0.*",
                }
            )
        )
        .run(bert, Progress(), cache=False)
        .subject
    )
    assert wide is not None
    with pytest.raises(BadInput, match="salient"):
        to_compressed_tensors(wide, tmp_path / "out")
