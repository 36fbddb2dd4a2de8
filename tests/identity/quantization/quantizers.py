"""Roundings without training, salient weights, activations and block types beside others' code."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.identity.pairs import Draw, beside
from tests.identity.quantization.learned_roundings import problem_of, rounding
from tests.identity.quantization.quantized_training import joined
from tests.identity.quantization.quantized_training_derived import half_to_even
from tests.identity.repositories import loaded, source
from workbench.storage.identity import AUTHORS, FP64, PEER


def on_steps(weight: Tensor, group: int, step: float, levels: int) -> Tensor:
    """Weights whose groups span whole steps that 16 bits hold, from about a third below zero."""
    groups = weight.reshape(-1, group)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    below = torch.round(-low / (high - low) * levels).clamp(1, levels - 1)
    return (((groups - low) / (high - low) * levels - below) * step).reshape(weight.shape)


@beside(
    "hqq",
    peer="hqq",
    kind=AUTHORS,
    compared="the zero points: of 20 alternations by their step, those with the least |error|^0.7 of a "
    "group, which ours keeps (theirs keeps the last before the mean |error| of all rises)",
    inputs="24 x 128 normal weights, groups of 64 that span whole steps of 1/8, 4 bits",
    tolerance=1e-2,
)
def hqq(draw: Draw) -> tuple[Tensor, Tensor]:
    from hqq.core.optimize import optimize_weights_proximal_legacy_step as alternated

    from workbench.quantization.number.formats import named
    from workbench.quantization.rounding.problem import Problem

    weight = on_steps(draw.normal(24, 128), 64, 0.125, 15)
    _, grid = rounding(Problem(weight, torch.eye(128), named("uint4"), "group", 64), "hqq")
    groups = weight.reshape(-1, 64)
    scale = 15 / (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True))
    zero, beta = -groups.amin(1, keepdim=True) * scale, 10.0
    best, least = zero, torch.full_like(zero, torch.inf)
    for _ in range(20):
        read, _, following, _ = alternated(groups, scale, zero, [0, 15], beta, 0.7, 1)
        error = (groups - read).abs().pow(0.7).mean(1, keepdim=True)
        best, least = torch.where(error < least, zero, best), torch.minimum(error, least)
        zero, beta = following, beta * 1.01
    return best.half().float(), grid.zero


@beside(
    "loftq",
    **source("yxli2123/LoftQ"),
    kind=AUTHORS,
    compared="the rounded weight and the low-rank product of the alternation with the least residual, of "
    "five on their 2-bit NormalFloat (theirs keeps the last)",
    inputs="64 x 128 normal weights, rank 8, fp64",
    tolerance=1e-9,
)
def loftq(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.quantization.number.formats import named
    from workbench.quantization.number.grid import fit
    from workbench.quantization.rounding.adapters import ADAPTER
    from workbench.quantization.rounding.problem import Problem

    peer = loaded("yxli2123/LoftQ", "utils", root="glue")
    weight = draw.normal(64, 128, dtype=torch.float64)

    def rounder(problem: Any) -> tuple[Tensor, Any]:
        values = peer.weight_quant_fn(problem.weight, 2, "normal_float")
        return values, fit(problem.weight, problem.format)

    with redirect_stdout(io.StringIO()):
        left, right, tried = torch.zeros(64, 8).double(), torch.zeros(8, 128).double(), []
        for _ in range(5):
            _, left, right, rounded, rest = peer.quant_first_iter(weight, left, right, 8, 2, "normal_float")
            tried.append((float(rest.norm()), rounded, left @ right))
        problem = Problem(weight, torch.eye(128), named("nf2"))
        values, _, term = ADAPTER.chosen("loftq", alternations=5, rank=8)(problem, rounder)
    _, rounded, product = min(tried, key=lambda found: found[0])
    return joined(rounded, product), joined(values, term[0] @ term[1])


@beside(
    "awq",
    **source("mit-han-lab/llm-awq"),
    kind=AUTHORS,
    compared="the rounded weights of their quantizer, a scale and a zero point a group (ours keeps scales in "
    "16 bits)",
    inputs="24 x 128 normal weights, groups of 64 that span whole steps of 1/8, 4 bits",
    tolerance=1e-6,
)
def awq_grid(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.quantization.number.formats import named
    from workbench.quantization.number.grid import fit

    packages, kernels = ("awq", "awq.quantize", "awq.utils"), ("awq_inference_engine",)
    peer = loaded("mit-han-lab/llm-awq", "awq.quantize.quantizer", packages=packages, without=kernels)
    weight = on_steps(draw.normal(24, 128), 64, 0.125, 15)
    theirs = peer.pseudo_quantize_tensor(weight, n_bit=4, q_group_size=64)
    return theirs, fit(weight, named("uint4"), "group", 64).round(weight)


@beside(
    "clipping-search",
    **source("ruikangliu/FlatQuant"),
    kind=PEER,
    compared="the clipped scales of every row (ours keeps them in 16 bits)",
    inputs="64 x 128 normal weights, 3 bits with a zero point, shares from 1 to 0.3 by 1/40, p = 2",
    tolerance=1e-3,
)
def clipping(draw: Draw) -> tuple[Tensor, Tensor]:
    """GPTQ's search of `find_params`, told our powers and shares."""
    from workbench.quantization.number.formats import named
    from workbench.quantization.number.grid import fit

    peer = loaded("ruikangliu/FlatQuant", "flatquant.quant_utils", packages=("flatquant",))
    weight = draw.normal(64, 128)
    theirs = peer.WeightQuantizer()
    theirs.configure(3, perchannel=True, sym=False, mse=True, norm=2.0, grid=40, maxshrink=0.7251)
    theirs.find_params(weight)
    return theirs.scale, fit(weight, named("uint3"), "channel", rule="mse").scale


@beside(
    "clipping-search",
    peer="least squares by search",
    kind=FP64,
    compared="the scales of groups whose errors are weighed by their inputs' energy",
    inputs="24 x 64 normal weights, 3 bits without a zero point, groups of 32, 256 correlated inputs",
    tolerance=1e-9,
)
def weighed_clipping(draw: Draw) -> tuple[Tensor, Tensor]:
    """Every share of a group's range by itself, the nearest of the eight values by distance."""
    from dataclasses import replace

    problem = replace(problem_of(draw, "int3", "group", torch.float32), group_size=32, rule="mse")
    weight, energy = problem.weight.double().numpy(), problem.gram.diagonal().double().numpy()
    theirs = []
    for row in weight:
        for part in (slice(0, 32), slice(32, 64)):
            group, trials = row[part], []
            top = -group.max() if group.max() > -group.min() else -group.min()
            for share in [1.0, *np.linspace(0.975, 0.3, 28)]:
                scale = float(np.float16(top * share / 4))
                values = np.arange(-4, 4) * scale
                gap = np.abs(group[:, None] - values).min(1)
                trials.append((float((energy[part] * gap**2).sum()), -share, scale))
            theirs.append(min(trials)[2])
    return torch.tensor(theirs, dtype=torch.float64), problem.grid().scale


@beside(
    "channel",
    "outliertune",
    peer="torch",
    kind=PEER,
    compared="inputs rounded with a scale and a zero point a feature, seen in calibration",
    inputs="256 correlated inputs of 32 features whose ranges span whole steps of 1/8, 6 bits; new inputs",
    tolerance=1e-5,
)
def channel_scales(draw: Draw) -> tuple[Tensor, Tensor]:
    """torch's per-channel observer and fake quantization."""
    from torch.ao.quantization.observer import PerChannelMinMaxObserver

    from workbench.quantization.activations.activations import InputRanges, quantize_activations
    from workbench.quantization.number.formats import named
    from workbench.subjects import Layer

    seen = on_steps(draw.inputs(256, 32).T.contiguous(), 256, 0.125, 63).T
    new = draw.inputs(40, 32)
    about: Any = {"dtype": torch.quint8, "qscheme": torch.per_channel_affine}
    observer = PerChannelMinMaxObserver(1, quant_min=0, quant_max=63, **about)
    observer(seen)
    scale, zero = observer.calculate_qparams()
    theirs = torch.fake_quantize_per_channel_affine(new, scale, zero, 1, 0, 63)
    nothing = torch.zeros(1, 32)
    ranges = InputRanges(seen.amin(0)[None], seen.amax(0)[None], nothing, nothing, torch.ones(1))
    layer = Layer("linear", torch.nn.Linear(32, 32, bias=False))
    layer.module.weight.data = torch.eye(32)
    quantize_activations(layer, ranges, named("uint6").name, "channel")
    return theirs, layer.module(new)


@beside(
    "outlier-split",
    peer="Dettmers et al. 2022, LLM.int8()",
    kind=FP64,
    compared="a layer's outputs, four features of 64 in 8 bits and the others in 4, a scale a token",
    inputs="40 correlated inputs of 64 features, 24 x 64 normal weights",
    tolerance=5e-5,
)
def outliers_apart(draw: Draw) -> tuple[Tensor, Tensor]:
    """By loops over tokens: the features with the most energy, and for each part the nearest of its values;
    steps are kept in 16 bits and outputs in float32.
    """
    from workbench.quantization.activations.activations import quantize_activations, widest
    from workbench.subjects import Layer

    inputs, weight = draw.inputs(40, 64)[:, torch.randperm(64, generator=draw.generator)], draw.normal(24, 64)
    layer = Layer("linear", torch.nn.Linear(64, 24, bias=False))
    layer.module.weight.data = weight
    quantize_activations(layer, None, "int4", "token", wide=widest(inputs.T @ inputs, 0.0625))
    x = inputs.double().numpy()
    apart = np.zeros(64, dtype=bool)
    apart[sorted(range(64), key=lambda j: -float((x[:, j] ** 2).sum()))[:4]] = True
    rounded = np.zeros_like(x)
    for token, row in enumerate(x):
        part = row[~apart]
        step = float(np.float16(np.abs(part).max() / 7))
        rounded[token, ~apart] = np.clip(half_to_even(part / step), -8, 7) * step
        part = row[apart]
        low, high = min(part.min(), 0), max(part.max(), 0)
        step = float(np.float16((high - low) / 255))
        place = half_to_even(-low / step)
        rounded[token, apart] = (np.clip(half_to_even(part / step + place), 0, 255) - place) * step
    return torch.from_numpy(rounded @ weight.double().numpy().T), layer.module(inputs)


@beside(
    "ptq1.61",
    "scales",
    **source("zjq0455/PTQ1.61"),
    kind=AUTHORS,
    compared="the features that stay wide; the others' binary weights with moved scales and factors, on the "
    "means of our grid, and the gradients of scales and factors (theirs gives the wide features a grid of "
    "the whole row)",
    inputs="24 x 40 normal weights, a fifth of the features wide, factors of powers of two, normal upstream "
    "gradients",
    tolerance=1e-4,
)
def binary_scales(draw: Draw) -> tuple[Tensor, Tensor]:
    """Theirs takes the features whose activations are beyond the share-th largest, itself included: 9 of 40
    at a share that ours rounds to 9.
    """
    from workbench.quantization.number.formats import named
    from workbench.quantization.number.split_grid import Salient
    from workbench.quantization.rounding.problem import Problem

    packages = ("quantize", "models")
    peer = loaded("zjq0455/PTQ1.61", "models.int_llama_layer", packages=packages)
    weight, inputs, upstream = draw.normal(24, 40), draw.inputs(256, 40), draw.normal(24, 40)
    salient = Salient(9 / 40, 4, "columns")
    given = Problem(weight, inputs.T @ inputs, named("binary"), "channel", rule="centred", salient=salient)
    ours = rounding(given, "scales")
    energy = inputs.square().sum(0)
    mask = energy >= energy.sort(descending=True)[0][int(40 * 0.2)]
    sizes = ((24, 1), (24, 1), (40,))
    logs = [torch.randint(-2, 3, size, generator=draw.generator) * np.log(2) for size in sizes]
    for name, log in zip(("log_group", "log_row", "log_column"), logs, strict=True):
        getattr(ours, name).data = log.float()
    mine = ours.soft(0.0)
    (mine * upstream * ~mask).sum().backward()
    group, row, column = (log.float().exp() for log in logs)
    linear = torch.nn.Linear(40, 24, bias=False)
    holder: Any = torch.nn.Module()
    linear.weight.data = weight
    holder.proj = peer.QuantLinear(linear, {}, {})
    for place in (holder.proj._parameters, holder.proj._buffers):
        place.pop("weight", None)
    holder.proj.weight = weight
    base = ours.base
    for name, value in {
        "scaling_factors": base.scale * group,
        "scaling_means": -base.zero * base.scale,
        "scaling_rotate_1": row,
        "scaling_rotate_2": column[None],
    }.items():
        holder.register_parameter(f"proj_{name}", torch.nn.Parameter(value.clone(), name != "scaling_means"))
    holder.proj_mask = mask
    peer.QuantLlamaDecoderLayer.binary_temporary(holder, 4, "cpu", "mix")
    theirs = holder.proj.temp_weight * ~mask
    (theirs * upstream).sum().backward()
    by_scale, by_row, by_column = (
        getattr(holder, f"proj_scaling_{name}") for name in ("factors", "rotate_1", "rotate_2")
    )
    return (
        joined(mask, theirs, *(p.grad * p for p in (by_scale, by_row, by_column))),
        joined(base.mask, mine * ~mask, ours.log_group.grad, ours.log_row.grad, ours.log_column.grad),
    )
