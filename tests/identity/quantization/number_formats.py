"""Number formats beside torchao's, ml_dtypes' and ggml's, and beside published tables."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.identity.pairs import Draw, beside
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import fit
from workbench.storage.identity import PEER, TABLE

WEIGHTS = "64 x 128 seeded normal weights"


def wide(draw: Draw) -> Tensor:
    """Numbers of sizes from 2^-20 to 2^8."""
    values = draw.normal(64, 128)
    return values * torch.logspace(-20, 8, 128, base=2)


def rounded(draw: Draw, name: str, theirs: str) -> tuple[Tensor, Tensor]:
    """What a dtype of ml_dtypes keeps of numbers within the format's range."""
    import ml_dtypes
    import numpy as np

    element = named(name).element
    values = wide(draw).clamp(element.lowest, element.highest)
    kept = values.numpy().astype(getattr(ml_dtypes, theirs)).astype(np.float32)
    return torch.from_numpy(kept), element.round(values)


SIZES = "64 x 128 seeded normal numbers of sizes 2^-20 to 2^8"
ML = dict(peer="ml_dtypes", kind=PEER, compared="the rounded numbers", inputs=SIZES, tolerance=0.0)


@beside("e4m3fn", **ML)
def e4m3(draw: Draw) -> tuple[Tensor, Tensor]:
    return rounded(draw, "e4m3fn", "float8_e4m3fn")


@beside("fp8", **(ML | {"compared": "the numbers rounded to E4M3 and E5M2"}))
def fp8(draw: Draw) -> tuple[Tensor, Tensor]:
    first, second = e4m3(draw), e5m2(draw)
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])


@beside("e5m2", **ML)
def e5m2(draw: Draw) -> tuple[Tensor, Tensor]:
    return rounded(draw, "e5m2", "float8_e5m2")


@beside("bf16", "bfloat16", **ML)
def bf16(draw: Draw) -> tuple[Tensor, Tensor]:
    return rounded(draw, "bf16", "bfloat16")


@beside("ExMy", "minifloats", **(ML | {"compared": "the numbers rounded to E2M1, E2M3, E3M2 and E3M4"}))
def minifloats(draw: Draw) -> tuple[Tensor, Tensor]:
    pairs = [
        rounded(draw, ours, theirs)
        for ours, theirs in (
            ("e2m1", "float4_e2m1fn"),
            ("e2m3", "float6_e2m3fn"),
            ("e3m2", "float6_e3m2fn"),
            ("e3m4ieee", "float8_e3m4"),
        )
    ]
    return torch.cat([theirs for theirs, _ in pairs]), torch.cat([ours for _, ours in pairs])


def microscaled(draw: Draw, name: str, element: torch.dtype | str) -> tuple[Tensor, Tensor]:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    weight = draw.normal(64, 128)
    theirs = MXTensor.to_mx(weight, element, 32).dequantize(torch.float32)
    return theirs, fit(weight, named(name)).round(weight)


MX = dict(peer="torchao", kind=PEER, compared="the rounded weights", inputs=WEIGHTS, tolerance=0.0)


@beside("mxfp8", **MX)
def mxfp8(draw: Draw) -> tuple[Tensor, Tensor]:
    return microscaled(draw, "mxfp8", torch.float8_e4m3fn)


@beside("mxfp8-e5m2", **MX)
def mxfp8_wide(draw: Draw) -> tuple[Tensor, Tensor]:
    return microscaled(draw, "mxfp8-e5m2", torch.float8_e5m2)


@beside("mxfp6", **MX)
def mxfp6(draw: Draw) -> tuple[Tensor, Tensor]:
    return microscaled(draw, "mxfp6", "fp6_e3m2")


@beside("mxfp6-e2m3", **MX)
def mxfp6_fine(draw: Draw) -> tuple[Tensor, Tensor]:
    return microscaled(draw, "mxfp6-e2m3", "fp6_e2m3")


@beside("mxfp4", **MX)
def mxfp4(draw: Draw) -> tuple[Tensor, Tensor]:
    return microscaled(draw, "mxfp4", torch.float4_e2m1fn_x2)


@beside("nvfp4", **(MX | {"tolerance": 1e-6}))
def nvfp4(draw: Draw) -> tuple[Tensor, Tensor]:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    weight = draw.normal(64, 128)
    scale = per_tensor_amax_to_scale(weight.abs().max())
    theirs = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale).dequantize(torch.float32)
    return theirs, fit(weight, named("nvfp4")).round(weight)


#: Dettmers et al. 2023, QLoRA, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@beside(
    "nf",
    "nf4",
    peer="QLoRA, appendix E",
    kind=TABLE,
    compared="the sixteen values",
    inputs="4 bits",
    tolerance=1e-5,
)
def nf4(draw: Draw) -> tuple[Tensor, Tensor]:
    return torch.tensor(NF4), named("nf4").element.values()
