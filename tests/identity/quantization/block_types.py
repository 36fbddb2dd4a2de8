"""Entries of axes that users choose by name: formats, block types, roundings, ranges, rotations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.identity.pairs import Draw, beside
from tests.identity.quantization.learned_roundings import problem_of, rounding
from tests.identity.quantization.quantized_training import joined
from tests.identity.quantization.quantized_training_derived import in_16_bits
from tests.identity.quantization.quantizers import on_steps
from tests.identity.repositories import loaded, source
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import fit
from workbench.storage.identity import AUTHORS, FP64, PEER, TABLE

WEIGHTS = "24 x 128 normal weights"


def written(weight: Tensor, format: str, kind: str) -> tuple[Tensor, Tensor]:
    """The bytes that gguf makes of weights on a grid, and ours of the same weights and that grid."""
    from gguf import GGMLQuantizationType, quants

    from workbench.quantization.gguf_blocks import encoded

    grid = fit(weight, named(format), "group", 32)
    values = grid.round(weight)
    theirs = quants.quantize(values.numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(theirs.astype(np.float64)), torch.from_numpy(
        encoded(values, grid, kind).rows.astype(np.float64)
    )


@beside(
    "int",
    peer="gguf",
    kind=PEER,
    compared="the bytes of blocks Q4_0, Q4_1, Q5_0 and Q5_1",
    inputs=f"{WEIGHTS} on a grid of 32, those of Q4_1 and Q5_1 spanning whole steps of 1/8",
    tolerance=0.0,
)
def integer_blocks(draw: Draw) -> tuple[Tensor, Tensor]:
    weight = draw.normal(24, 128)
    found = [
        written(weight, "int4", "Q4_0"),
        written(on_steps(weight, 32, 0.125, 15), "uint4", "Q4_1"),
        written(weight, "int5", "Q5_0"),
        written(on_steps(weight, 32, 0.125, 31), "uint5", "Q5_1"),
    ]
    return joined(*(theirs for theirs, _ in found)), joined(*(ours for _, ours in found))


@beside(
    "int",
    peer="gguf",
    kind=PEER,
    compared="the numbers of blocks Q8_0 (theirs has steps max/127, so a grid without the lowest value)",
    inputs=f"{WEIGHTS} on a grid of 32",
    tolerance=0.0,
)
def byte_blocks(draw: Draw) -> tuple[Tensor, Tensor]:
    return written(draw.normal(24, 128), "int8-odd", "Q8_0")


@beside(
    "mxfp4",
    peer="gguf",
    kind=PEER,
    compared="the numbers that a reader makes of our blocks MXFP4",
    inputs=WEIGHTS,
    tolerance=0.0,
)
def mxfp4_blocks(draw: Draw) -> tuple[Tensor, Tensor]:
    from gguf import GGMLQuantizationType, quants

    from workbench.quantization.gguf_blocks import encoded

    weight = draw.normal(24, 128)
    grid = fit(weight, named("mxfp4"))
    values = grid.round(weight)
    read = quants.dequantize(encoded(values, grid, "MXFP4").rows, GGMLQuantizationType.MXFP4)
    return torch.from_numpy(read), values


@beside(
    "int",
    "nearest",
    peer="auto-round",
    kind=AUTHORS,
    compared="nearest rounding on 4, 8 and 16 values, the scale's sign towards the longer side",
    inputs=f"{WEIGHTS}, 2, 3 and 4 bits, groups of 32",
    tolerance=1e-6,
)
def signed_scales(draw: Draw) -> tuple[Tensor, Tensor]:
    from auto_round.data_type.int import quant_tensor_rtn_sym

    from workbench.quantization.rounding.problem import Problem

    weight, found = draw.normal(24, 128), []
    for bits in (2, 3, 4):
        given = Problem(weight, torch.eye(128), named(f"int{bits}"), "group", 32)
        theirs, *_ = quant_tensor_rtn_sym(weight.clone(), bits, 32)
        found.append((theirs, rounding(given, "nearest")[0]))
    return joined(*(theirs for theirs, _ in found)), joined(*(ours for _, ours in found))


#: Max 1960, "Quantizing for minimum distortion", table I: the positive values of 4, 8 and 16.
MAX = (
    (0.4528, 1.510),
    (0.2451, 0.7560, 1.344, 2.152),
    (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
)


@beside(
    "quantile",
    peer="Max 1960, table I",
    kind=TABLE,
    compared="the positive values of 4, 8 and 16",
    inputs="2, 3 and 4 bits, to four digits",
    tolerance=5.1e-4,
)
def lloyd_max(draw: Draw) -> tuple[Tensor, Tensor]:
    ours = [named(f"quantile{bits}").element.values() for bits in (2, 3, 4)]
    return joined(*map(torch.tensor, MAX)), joined(*(values[values > 0] for values in ours))


@beside(
    "fp16",
    peer="torch",
    kind=PEER,
    compared="the rounded numbers",
    inputs="64 x 128 seeded normal numbers of sizes 2^-30 to 2^15",
    tolerance=0.0,
)
def half_precision(draw: Draw) -> tuple[Tensor, Tensor]:
    values = (draw.normal(64, 128) * torch.logspace(-30, 15, 128, base=2)).clamp(-65504, 65504)
    return values.half(), named("fp16").element.round(values)


@beside(
    "binary",
    **source("LiqunMa/FBI-LLM"),
    kind=PEER,
    compared="signs times a row's mean magnitude",
    inputs="24 x 128 normal weights whose rows have a mean magnitude of 1/2",
    tolerance=1e-6,
)
def binary(draw: Draw) -> tuple[Tensor, Tensor]:
    from tests.identity.quantization.quantized_training import rows_of_size

    peer = loaded("LiqunMa/FBI-LLM", "qat.base_binarizer", packages=("qat",))
    weight = rows_of_size(draw, 24, 128, 0.5)
    return peer.BiRealLinear(weight, None).quant_weight(), fit(weight, named("binary"), "channel").round(
        weight
    )


def rounded_by(inputs: Tensor, ranges: Any, format: str, granularity: str) -> Tensor:
    """What a layer that passes its inputs on makes of them."""
    from workbench.quantization.activations.activations import quantize_activations
    from workbench.subjects import Layer

    width = inputs.shape[-1]
    layer = Layer("linear", nn.Linear(width, width, bias=False))
    layer.module.weight.data = torch.eye(width)
    quantize_activations(layer, ranges, format, granularity)
    return torch.as_tensor(layer.module(inputs))


@beside(
    "token",
    **source("ruikangliu/FlatQuant"),
    kind=PEER,
    compared="inputs rounded with a scale and a zero point a token",
    inputs="40 tokens of 32 features whose ranges span whole steps of 1/8, 4 and 8 bits",
    tolerance=1e-6,
)
def token_ranges(draw: Draw) -> tuple[Tensor, Tensor]:
    peer = loaded("ruikangliu/FlatQuant", "flatquant.quant_utils", packages=("flatquant",))
    theirs, ours = [], []
    for bits in (4, 8):
        inputs = on_steps(draw.inputs(40, 32), 32, 0.125, 2**bits - 1)
        theirs.append(peer.ActivationQuantizer(bits)(inputs))
        ours.append(rounded_by(inputs, None, f"uint{bits}", "token"))
    return joined(*theirs), joined(*ours)


@beside(
    "tensor",
    peer="torch",
    kind=PEER,
    compared="inputs rounded with a scale and a zero point seen in calibration",
    inputs="256 correlated inputs of 32 features whose range spans whole steps of 1/8, 8 bits; new inputs",
    tolerance=1e-5,
)
def tensor_range(draw: Draw) -> tuple[Tensor, Tensor]:
    from torch.ao.quantization.observer import MinMaxObserver

    seen, new = on_steps(draw.inputs(256, 32), 256 * 32, 0.125, 255), draw.inputs(40, 32)
    observer = MinMaxObserver(torch.quint8, quant_min=0, quant_max=255)
    observer(seen)
    scale, zero = observer.calculate_qparams()
    theirs = torch.fake_quantize_per_tensor_affine(new, float(scale), int(zero), 0, 255)
    ranges: Any = SimpleNamespace(low=seen.amin(0)[None], high=seen.amax(0)[None])
    return theirs, rounded_by(new, ranges, "uint8", "tensor")


@beside(
    "orthogonal",
    **source("spcl/QuaRot"),
    kind=PEER,
    compared="a rotation from the Haar measure, by the same seed",
    inputs="24 x 24, fp64",
    tolerance=1e-12,
)
def haar_rotation(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.quantization.rotation.fold import random_rotation

    needless = ("fast_hadamard_transform", "monkeypatch")
    peer = loaded("spcl/QuaRot", "rotation_utils", root="fake_quant", without=needless)
    torch.manual_seed(draw.seed)
    return peer.random_orthogonal_matrix(24, "cpu"), random_rotation(24, "orthogonal", draw.generator)


@beside(
    "smooth",
    **source("mit-han-lab/smoothquant"),
    kind=AUTHORS,
    compared="a layer's weight in the coordinates of its scale (ours in 16 bits: 2^-11 of a number)",
    inputs="24 x 64 normal weights, 256 correlated inputs, alpha 1/2",
    tolerance=4e-3,
)
def smooth(draw: Draw) -> tuple[Tensor, Tensor]:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from workbench.quantization.transform.transform import in_coordinates

    peer = loaded("mit-han-lab/smoothquant", "smoothquant.smooth", packages=("smoothquant",))
    problem = problem_of(draw, "int8", dtype=torch.float32)
    problem.largest = draw.inputs(256, 64).abs().amax(0)
    linear = nn.Linear(64, 24, bias=False)
    linear.weight.data = problem.weight.clone()
    peer.smooth_ln_fcs_llama_like(LlamaRMSNorm(64), linear, problem.largest, 0.5)
    moved, _ = in_coordinates(problem, "smooth")
    return linear.weight, moved.weight


@beside(
    "activation-aware",
    peer="after Lin et al. 2023, AWQ, section 3.2",
    kind=FP64,
    compared="the scale of the power with the least output error",
    inputs="24 x 64 normal weights, 3 bits, a scale a row, 256 correlated inputs, fp64",
    tolerance=1e-9,
)
def activation_aware(draw: Draw) -> tuple[Tensor, Tensor]:
    """From the inputs themselves; the nearest of eight values by distance."""
    from workbench.quantization.transform.transform import TRANSFORM

    problem = problem_of(draw, "int3")
    again = Draw(draw.seed)
    w = again.normal(24, 64, dtype=torch.float64).numpy()
    x = again.inputs(256, 64, dtype=torch.float64).numpy()
    tried = []
    for power in np.arange(21) / 20:
        scale = np.sqrt(np.square(x).sum(0)) ** power
        scale = in_16_bits(scale / np.sqrt(scale.max() * scale.min()))
        moved, rounded = w * scale, np.zeros_like(w)
        for row, values in enumerate(moved):
            low, high = np.float32(values.min()), np.float32(values.max())
            step = float(np.float16((-high if high > -low else -low) / np.float32(4)))
            grid = np.arange(-4, 4) * step
            rounded[row] = grid[np.abs(values[:, None] - grid).argmin(1)]
        error = float(np.square(x @ (rounded / scale - w).T).sum())
        tried.append((error, power, scale))
    ours = TRANSFORM.chosen("activation-aware")(problem).scale
    return torch.from_numpy(min(tried, key=lambda found: found[0])[2]), ours


@beside(
    "weights",
    peer="llmcompressor",
    kind=PEER,
    compared="the half of each row that stays wide (those that Wanda keeps)",
    inputs="64 x 128 normal weights, 512 correlated inputs",
    tolerance=0.0,
)
def salient_weights(draw: Draw) -> tuple[Tensor, Tensor]:
    from llmcompressor.modifiers.pruning.wanda import wanda_sparsify

    from tests.identity.solvers import layer_of
    from workbench.quantization.number.split_grid import Salient

    layer, inputs = layer_of(draw)
    sums = wanda_sparsify.make_empty_row_scalars(layer)
    sums, _ = wanda_sparsify.accumulate_row_scalars(inputs, layer, sums, 0)
    theirs = wanda_sparsify.sparsify_weight(layer, {layer: sums}, 0.5, 0, 0)
    ours = Salient(0.5, 4, "weights").mask(layer.weight.detach(), inputs.T @ inputs)
    return (theirs != 0).double(), ours.double()
