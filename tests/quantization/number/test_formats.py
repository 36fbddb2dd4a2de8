"""Number formats against ml_dtypes, torch and published constants."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.identity.quantization.number_formats import NF4 as PUBLISHED
from workbench.errors import BadInput
from workbench.quantization.number.elements import Codebook, lloyd_max, normal_float
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import fit
from workbench.quantization.number.number_format import NUMBER_FORMAT

#: Formats without options, each under its own name.
STANDARD = [name for name, entry in NUMBER_FORMAT.entries.items() if not entry.options.model_fields]

ORACLES = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e3m4ieee": ml_dtypes.float8_e3m4,
}


@pytest.mark.parametrize("name", ORACLES)
def test_every_code_and_cast_agree_with_the_oracle(name: str) -> None:
    element = named(name).element
    codes = torch.arange(2**element.bits)
    expected = (
        codes.numpy()
        .astype(np.uint16 if element.bits == 16 else np.uint8)
        .view(ORACLES[name])
        .astype(np.float32)
    )
    values = element.decode(codes)
    assert np.array_equal(values.numpy(), expected, equal_nan=True)
    numbers = ~torch.isnan(values)
    assert torch.equal(element.encode(values)[numbers], codes[numbers])
    x = torch.cat(
        [torch.randn(100_000) * torch.exp(6 * torch.randn(100_000)), values[torch.isfinite(values)]]
    )
    with np.errstate(over="ignore"):
        cast = x.numpy().astype(ORACLES[name]).astype(np.float32)
    assert np.array_equal(element.round(x, saturate=False).numpy(), cast, equal_nan=True)
    saturated = element.round(x)
    assert saturated.abs().max() == element.highest
    within = x.abs() <= element.highest
    assert np.array_equal(saturated[within].numpy(), cast[within.numpy()])


def test_torch_casts_agree() -> None:
    x = torch.randn(50_000) * torch.exp(3 * torch.randn(50_000))
    x = x[x.abs() < 440]
    assert torch.equal(named("e4m3fn").element.round(x), x.to(torch.float8_e4m3fn).float())
    assert torch.equal(named("e5m2").element.round(x), x.to(torch.float8_e5m2).float())
    assert torch.equal(named("bf16").element.round(x), x.bfloat16().float())


def test_bounds_and_counts() -> None:
    e4m3, e5m2 = named("e4m3fn").element, named("e5m2").element
    assert (e4m3.highest, e5m2.highest, named("e2m3").element.highest, named("e3m2").element.highest) == (
        448,
        57344,
        7.5,
        28,
    )
    assert int((e4m3.values() > 0).sum()) == 126 and int((e5m2.values() > 0).sum()) == 123
    assert (
        e4m3.values()[e4m3.values() > 0].min() == 2**-9 and e5m2.values()[e5m2.values() > 0].min() == 2**-16
    )
    assert named("e2m1").element.values().tolist() == [
        -6,
        -4,
        -3,
        -2,
        -1.5,
        -1,
        -0.5,
        0,
        0.5,
        1,
        1.5,
        2,
        3,
        4,
        6,
    ]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert named("e2m1").element.round(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_normal_float_equals_the_published_codebook() -> None:
    assert np.abs(np.array(normal_float(4)) - PUBLISHED).max() < 2e-7


def test_optimal_quantizers_of_a_gaussian() -> None:
    """Max (1960): squared error of the best 2^b values, from the closed form of the cells rather than from
    samples.
    """
    from scipy.stats import norm

    for bits, expected in zip(range(1, 6), (0.36338, 0.117482, 0.034548, 0.009501, 0.002505), strict=True):
        values = np.array(lloyd_max(bits))
        edges = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
        error = 1 - (values**2 * np.diff(norm.cdf(edges))).sum()  # E x^2 - E q^2, because q = E[x | cell]
        assert error == pytest.approx(expected, rel=3e-4)


@pytest.mark.parametrize(
    ("name", "errors"),
    {
        "nf4": (0.007626, 0.008462, 0.009161, 0.009760),
        "int4-odd": (0.009422, 0.011616, 0.013814, 0.016013),
        "int8-odd": (2.87e-5, 3.53e-5, 4.20e-5, 4.86e-5),
    }.items(),
)
def test_block_errors_of_a_gaussian(name: str, errors: tuple[float, ...]) -> None:
    x = torch.randn(1, 1 << 20)
    for block, expected in zip((32, 64, 128, 256), errors, strict=True):
        error = float((fit(x, named(name), "group", block).round(x) - x).square().mean())
        assert error == pytest.approx(expected, rel=6e-3)


def test_a_full_range_puts_the_largest_magnitude_on_its_lowest_value() -> None:
    """Cheng et al. 2023 (AutoRound): the scale takes the sign that makes room for it."""
    x = torch.tensor([[3.0, -2.0, 1.0, 0.5], [-3.0, 2.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    grid = fit(x, named("int3"), "channel")
    assert grid.scale.flatten().tolist() == [-0.75, 0.75, 1.0]
    assert grid.codes(x)[:2].tolist() == [[4, 3, 7, 7], [4, 3, 1, 1]]  # -4, 3, -1, -1: two's complement
    assert torch.equal(grid.decode(grid.codes(x)), grid.round(x))
    low, high = grid.bounds(4)
    assert low[:2, 0].tolist() == [-2.25, -3.0] and high[:2, 0].tolist() == [3.0, 2.25]


def test_the_full_range_halves_the_error_of_two_and_three_bits() -> None:
    x = torch.randn(1, 1 << 18)
    for bits, share in ((2, 0.4), (3, 0.65), (4, 0.85)):
        full, odd = (
            float((fit(x, named(name), "group", 64).round(x) - x).square().mean())
            for name in (f"int{bits}", f"int{bits}-odd")
        )
        assert full < share * odd


def test_block_formats_and_plain_casts_of_a_gaussian() -> None:
    x = torch.randn(1, 1 << 20)
    assert float((fit(x, named("mxfp4")).round(x) - x).square().mean()) == pytest.approx(0.013244, rel=6e-3)
    assert float((named("e4m3fn").element.round(x) - x).square().mean()) == pytest.approx(7.046e-4, rel=1e-2)
    assert float((named("e5m2").element.round(x) - x).square().mean()) == pytest.approx(2.797e-3, rel=1e-2)


@pytest.mark.parametrize("name", ["int{}", "int{}-odd"])
def test_best_uniform_steps_are_found_by_the_clipping_search(name: str) -> None:
    """The clipping search comes within its 2.5 % steps of the best uniform quantizer with 2^b or 2^b - 1
    levels.
    """
    x = torch.randn(1, 1 << 18)
    for bits in (3, 4, 5):
        element = named(name.format(bits)).element
        best = min(
            float(((x / s).round().clamp(element.lowest, element.highest) * s - x).square().mean())
            for s in np.linspace(0.05, 1.5, 600)
        )
        found = float((fit(x, named(name.format(bits)), "tensor", rule="mse").round(x) - x).square().mean())
        assert best <= found * (1 + 1e-3) and found <= 1.02 * best


@pytest.mark.parametrize("name", ["int4", "e2m1", "e4m3fn", "nf4", "ternary", "fixed8.4"])
def test_stochastic_rounding_is_unbiased(name: str) -> None:
    element = named(name).element
    generator = torch.Generator().manual_seed(1)
    points = torch.linspace(0.9 * element.lowest, 0.9 * element.highest, 37)
    draws = element.round(points.repeat(4000, 1), generator).double()
    assert torch.isin(draws, element.values()).all()
    error = draws.std(0) / 4000**0.5
    assert (
        (draws.mean(0) - points).abs() <= 4.5 * error + 1e-6 * element.highest
    ).all()  # 37 points: 4.5 keeps the chance of a false alarm below 1e-3


@pytest.mark.parametrize(
    "name",
    [*STANDARD, "e3m2", "e2m3", "e2m1", "nf4", "int4", "uint3", "e3m0", "fixed8.4", "nf3", "quantile3"],
)
def test_rounding_is_the_nearest_value_and_idempotent(name: str) -> None:
    element = named(name).element
    if element.bits > 8:
        pytest.skip("16-bit formats are compared with the oracle's cast")
    values = element.values()
    x = torch.cat([torch.randn(2000) * element.highest / 2, values])
    rounded = element.round(x)
    distance = (x[:, None] - values).abs()
    assert torch.allclose((rounded - x).abs(), distance.min(1).values, atol=1e-6 * element.highest)
    assert torch.equal(element.round(rounded), rounded)
    assert torch.equal(element.decode(element.encode(rounded)), rounded)


@pytest.mark.parametrize("name", ["int99", "e9m9", "float", "e4m0fn", "fixed40.1", "int1", ""])
def test_unknown_formats_are_refused_by_name(name: str) -> None:
    with pytest.raises(BadInput, match=f"format: '{name}'"):
        named(name)


def test_codebook_of_many_values_uses_the_same_rule() -> None:
    wide = Codebook(6, lloyd_max(6))
    x = torch.randn(5000)
    distance = (x[:, None] - torch.tensor(wide.table)).abs()
    assert torch.allclose((wide.round(x) - x).abs(), distance.min(1).values, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["nf4", "nf3", "nf8", "ternary", "binary", "quantile2", "quantile4", "quantile6"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codebooks_round_as_a_search_does(name: str, dtype: torch.dtype) -> None:
    """Random numbers, every value, every midpoint and its neighbours, far beyond the range, infinities:
    to the nearest, ties down.
    """
    element = named(name).element
    table = torch.tensor(element.table, dtype=dtype)
    middles = (table[1:] + table[:-1]) / 2
    ends = torch.tensor([-1e30, 1e30, -torch.inf, torch.inf], dtype=dtype)
    x = torch.cat(
        [
            torch.randn(20000, dtype=dtype),
            table,
            middles,
            torch.nextafter(middles, ends[1]),
            torch.nextafter(middles, ends[0]),
            ends,
        ]
    )
    assert torch.equal(element.round(x), table[torch.bucketize(x, middles)])
    assert element.round(torch.tensor([torch.nan], dtype=dtype)) == table[0]
