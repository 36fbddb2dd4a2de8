"""Roundings that are trained, beside their authors' or others' code: values and gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.identity.pairs import Draw, beside
from tests.identity.repositories import loaded, source
from workbench.storage.identity import AUTHORS, PEER


def told(**options: object) -> Any:
    """Settings whose method has these options."""
    return SimpleNamespace(method=SimpleNamespace(options=SimpleNamespace(**options)))


def joined(*parts: Tensor | None) -> Tensor:
    """All numbers of several tensors in one."""
    return torch.cat([part.detach().double().flatten() for part in parts if part is not None])


def leaf(values: Tensor) -> Tensor:
    return values.clone().requires_grad_()


def rows_of_size(draw: Draw, rows: int, width: int, size: float) -> Tensor:
    """Normal weights whose rows have this mean magnitude, a number that 16 bits hold."""
    weight = draw.normal(rows, width, dtype=torch.float64)
    return (weight / weight.abs().mean(1, keepdim=True) * size).float()


@beside(
    "lsq",
    **source("zhutmost/lsq-net"),
    kind=PEER,
    compared="the step's start, the rounded weights, the gradients of weights and step",
    inputs="a row of 128 normal weights, 3 bits, one step, normal upstream gradients, fp64",
    tolerance=1e-9,
)
def lsq(draw: Draw) -> tuple[Tensor, Tensor]:
    """One group is the whole tensor, as theirs counts all weights of a tensor in the step's gradient."""
    from workbench.quantization.trained.trained_rounding import LearnedStep

    peer = loaded("zhutmost/lsq-net", "quan.quantizer.lsq", packages=("quan", "quan.quantizer"))
    weight, upstream = (draw.normal(1, 128, dtype=torch.float64) for _ in range(2))
    theirs = peer.LsqQuan(3, per_channel=False)
    theirs.init_from(weight)
    first = leaf(weight)
    rounded = theirs(first)
    rounded.backward(upstream)
    ours = LearnedStep.begin(weight, 128, told(bits=3))
    second = leaf(weight)
    found = ours(second)
    start = ours.step.detach().clone()
    found.backward(upstream)
    return (
        joined(theirs.s.reshape(1), rounded, first.grad, theirs.s.grad),
        joined(start, found, second.grad, ours.step.grad),
    )


@beside(
    "ternary",
    "trilm",
    peer="transformers",
    kind=PEER,
    compared="the ternary weights of its BitNet layers, and the weights' gradient",
    inputs="a row of 128 normal weights whose mean magnitude is 1/32, normal upstream gradients",
    tolerance=1e-7,
)
def ternary(draw: Draw) -> tuple[Tensor, Tensor]:
    from transformers.integrations.bitnet import WeightQuant

    from workbench.quantization.trained.trained_rounding import MeanScaled

    weight, upstream = rows_of_size(draw, 1, 128, 2.0**-5), draw.normal(1, 128)
    first, second = leaf(weight), leaf(weight)
    theirs = WeightQuant.apply(first)
    theirs.backward(upstream)
    ours = MeanScaled(format="ternary", group=128)(second)
    ours.backward(upstream)
    return joined(theirs, first.grad), joined(ours, second.grad)


@beside(
    "bibert",
    **source("htqin/BiBERT"),
    kind=AUTHORS,
    compared="a layer's outputs from signs of inputs, and the gradients of weights and inputs",
    inputs="24 x 32 normal weights, rows of mean magnitude 1/2, 40 normal inputs, normal upstream gradients",
    tolerance=1e-5,
)
def bibert(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.quantization.activations.activations import SignInputs
    from workbench.quantization.trained.trained_rounding import CentredSign

    drawing = ("matplotlib", "matplotlib.pyplot", "seaborn")
    peer = loaded("htqin/BiBERT", "utils_quant", root="transformer", without=drawing)
    config = SimpleNamespace(quantize_act=True, weight_bits=1, input_bits=1, clip_val=2.5)
    theirs = peer.QuantizeLinear(32, 24, config=config)
    theirs.weight.data = rows_of_size(draw, 24, 32, 0.5)
    theirs.bias.data.zero_()
    inputs, upstream = draw.normal(40, 32), draw.normal(40, 24)
    first, second, weight = leaf(inputs), leaf(inputs), leaf(theirs.weight.detach())
    found = theirs(first)
    found.backward(upstream)
    ours = SignInputs().round(second) @ CentredSign(group=32)(weight).T
    ours.backward(upstream)
    return joined(found, theirs.weight.grad, first.grad), joined(ours, weight.grad, second.grad)


@beside(
    "fbi",
    "fbi-llm",
    **source("LiqunMa/FBI-LLM"),
    kind=AUTHORS,
    compared="the start of scales and offsets; from others that 16 bits hold, the weights and the gradients "
    "of weights, scales and offsets",
    inputs="24 x 32 normal weights, a scale and an offset a column, normal upstream gradients",
    tolerance=1e-5,
)
def fbi(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.quantization.trained.fbi_llm import ShiftedSign

    peer = loaded("LiqunMa/FBI-LLM", "qat.learnable_binarizer", packages=("qat",))
    weight, upstream = draw.normal(24, 32), draw.normal(24, 32)
    theirs = peer.BinaryLinearWscales(weight.clone(), None, "column")
    ours = ShiftedSign.begin(weight, 32, told(shared="column"))
    starts = joined(theirs.wscale, theirs.wbias), joined(ours.alpha, ours.beta)
    scale = 2.0 ** (torch.arange(32) % 4 - 2.0)
    offset = (torch.arange(32) % 7 - 3.0) / 8 * scale
    for holder, names in ((theirs, ("wscale", "wbias")), (ours, ("alpha", "beta"))):
        for name, value in zip(names, (scale, offset), strict=True):
            parameter = getattr(holder, name)
            parameter.data = value.reshape(parameter.shape).clone()
    outputs = theirs(torch.eye(32)).T
    outputs.backward(upstream)
    second = leaf(weight)
    found = ours(second)
    found.backward(upstream)
    return (
        joined(starts[0], outputs, theirs.weight.grad, theirs.wscale.grad, theirs.wbias.grad),
        joined(starts[1], found, second.grad, ours.alpha.grad, ours.beta.grad),
    )


@beside(
    "nipq",
    **source("ECoLab-POSTECH/NIPQ"),
    kind=AUTHORS,
    compared="the weights after training, rounded to the learned bound and width",
    inputs="24 x 32 normal weights, a bound of 7/4, 4 bits",
    tolerance=1e-5,
)
def nipq(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their functions are run as they are written: this torch's compiler refuses them."""
    from workbench.quantization.trained.chosen_widths import PseudoNoise

    with patch.object(torch.jit, "script", lambda function: function):
        peer = loaded("ECoLab-POSTECH/NIPQ", "nipq", root="my_lib")
    weight, bound, width = draw.normal(24, 32), torch.tensor(1.75), torch.tensor(4.0)
    share, ours_share = (width - 2) / 12, (width - PseudoNoise.low) / (PseudoNoise.high - PseudoNoise.low)
    theirs = peer.noise_quant(
        weight, torch.logit(share), torch.expm1(bound).log(), False, True, True, True, True
    )
    ours = PseudoNoise(bound.log().expand(24, 1).clone(), torch.logit(ours_share), group=32).eval()
    return theirs, ours(weight)


@beside(
    "halo",
    "rounded",
    **source("IST-DASLab/HALO"),
    kind=AUTHORS,
    compared="the product of a layer and both its gradients at levels 0, 1 and 2 (their CUDA kernels "
    "replaced by dense matrices in fp64)",
    inputs="32 x 64 normal inputs with one of forty times their size, 48 x 64 normal weights, int8, fp64",
    tolerance=1e-9,
)
def halo(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their three autograd functions, which ask for bfloat16: it is another name of float64 for them here."""
    from scipy.linalg import hadamard

    from workbench.quantization.number.formats import named
    from workbench.training.quantized_products import QuantizedLinear

    def turned(rows: Tensor, transpose: bool = False) -> Tensor:
        width = rows.shape[-1]
        return rows @ torch.from_numpy(hadamard(width) / width**0.5)

    def quantized(x: Tensor, transpose: bool = False) -> tuple[Tensor, Tensor]:
        step = x.abs().max() / 127
        codes = torch.round(x / step)
        return codes.T if transpose else codes, step

    inputs = draw.normal(32, 64, dtype=torch.float64)
    inputs[3, 5] = 40
    weight, upstream = draw.normal(48, 64, dtype=torch.float64), draw.normal(32, 48, dtype=torch.float64)
    packages = ("qllmt", "qllmt.nn", "qllmt.functional")
    needless = ("qllmt.functional.hadamard", "qllmt.nn.halo_helpers", "qllmt.nn.fsdp")
    theirs, ours = [], []
    for level in (0, 1, 2):
        peer = loaded("IST-DASLab/HALO", f"qllmt.nn.halo{level}_fns", packages=packages, without=needless)
        peer.torch = SimpleNamespace(**vars(torch) | {"bfloat16": torch.float64})
        peer.right_had, peer.contiguous_transpose = turned, lambda x: x.T
        peer.qfsdp_forward, peer.qfsdp_backward = lambda *given, **named: (None, None), lambda *given: None
        peer._quantize_fn_by_precision = lambda *given, **named: quantized
        peer._matmul_kernel_by_precision = lambda *given: lambda a, ca, b, cb, out_prec: (a * ca) @ (b * cb).T
        first, second = leaf(inputs), leaf(weight)
        product = getattr(peer, f"HaloFnLevel{level}").apply(first, second, {"halo_precision": "int8"})
        product.backward(upstream)
        theirs += [product, first.grad, second.grad]
        first, second = leaf(inputs), leaf(weight)
        product = QuantizedLinear.apply(first, second, named("int8"), level)
        product.backward(upstream)
        ours += [product, first.grad, second.grad]
    return joined(*theirs), joined(*ours)
