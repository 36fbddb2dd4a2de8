"""Other libraries' roundings on one layer (out, in), as functions to values in float32;
used by `bench_quantization.py peers`.

None of these libraries is a dependency: install them elsewhere and name the folder in PYTHONPATH. A library
that cannot be imported is reported as absent. Modules are imported by name because their packages come
without types and are not in the environment.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import fit
from workbench.quantization.rounding import nearest
from workbench.quantization.rounding.problem import Problem
from workbench.quantization.rounding.rounding import ROUNDING

STEPS = 200  # of SignRound, AutoRound's default


@dataclass(frozen=True)
class Peer:
    """One algorithm on one grid, by a library and by the workbench:
    (weight, second moment of the inputs) -> values.
    """

    package: str
    what: str
    theirs: Callable[[Tensor, Tensor], Tensor]
    ours: Callable[[Tensor, Tensor], Tensor]

    @property
    def version(self) -> str | None:
        """The installed version, or None."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def rounded(
    method: str, bits: int, group: int, symmetric: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    def values(weight: Tensor, gram: Tensor) -> Tensor:
        problem = Problem(weight, gram, named("int", bits, symmetric), "group", group)
        learns = method in ROUNDING.with_trait("learned")
        return nearest.rounded(problem, method, **({"steps": STEPS} if learns else {}))[0]

    return values


def in_format(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    def values(weight: Tensor, gram: Tensor) -> Tensor:
        return fit(weight, named(name), "auto", 64).round(weight)

    return values


def torchao_nearest(bits: int, group: int, symmetric: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def values(weight: Tensor, gram: Tensor) -> Tensor:
        found: Any = importlib.import_module("torchao.quantization.quant_primitives")
        low, high = (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
        kind = found.MappingType.SYMMETRIC if symmetric else found.MappingType.ASYMMETRIC
        block, dtype = (1, group), torch.int8 if symmetric else torch.uint8
        scale, zero = found.choose_qparams_affine(
            weight, kind, block, dtype, low, high, scale_dtype=torch.float16
        )
        scale = scale.float()
        codes = found.quantize_affine(weight, block, scale, zero, dtype, low, high)
        return found.dequantize_affine(codes, block, scale, zero, dtype, low, high)

    return values


def torchao_hqq(bits: int, group: int) -> Callable[[Tensor, Tensor], Tensor]:
    def values(weight: Tensor, gram: Tensor) -> Tensor:
        found: Any = importlib.import_module("torchao.quantization.quant_primitives")
        codes, scale, zero, _ = found._choose_qparams_and_quantize_affine_hqq(
            weight, bits, group, device="cpu", raw_output=True
        )
        steps, shift = (t.float().repeat_interleave(group, 1) for t in (scale, zero))
        return (codes.float() - shift) * steps

    return values


def torchao_nf4(weight: Tensor, gram: Tensor) -> Tensor:
    found: Any = importlib.import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    return found.to_nf4(weight, 64, 256).get_original_weight()


def torchao_mxfp4(weight: Tensor, gram: Tensor) -> Tensor:
    found: Any = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
    return found.MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)


def hqq(bits: int, group: int) -> Callable[[Tensor, Tensor], Tensor]:
    def values(weight: Tensor, gram: Tensor) -> Tensor:
        found: Any = importlib.import_module("hqq.core.quantize")
        codes, meta = found.Quantizer.quantize(weight, bits, True, group, axis=1, bitpack=False, device="cpu")
        return found.Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})

    return values


def quanto(bits: int, group: int, half_quadratic: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def values(weight: Tensor, gram: Tensor) -> Tensor:
        found: Any = importlib.import_module("optimum.quanto")
        optimizer = found.HqqOptimizer() if half_quadratic else found.MaxOptimizer()
        kind = {2: found.qint2, 4: found.qint4}[bits]
        scale, shift = optimizer(weight, kind, 0, group)
        return found.quantize_weight(weight, kind, 0, scale, shift, group, optimized=False).dequantize()

    return values


def auto_round(bits: int, group: int) -> Callable[[Tensor, Tensor], Tensor]:
    """AutoRound's own rounding, optimizer, bounds and linear decay (rate 1 / steps) on one linear layer; its
    loss, the mean squared error of the outputs, from the second moment; its best step is kept."""

    def values(weight: Tensor, gram: Tensor) -> Tensor:
        rounding: Any = importlib.import_module("auto_round.data_type.int").quant_tensor_asym
        optimizer_class: Any = importlib.import_module(
            "auto_round.algorithms.quantization.sign_round.sign_sgd"
        ).SignSGD
        groups = weight.numel() // group
        offset = torch.zeros(groups, group, requires_grad=True)
        low, high = (torch.ones(groups, requires_grad=True) for _ in range(2))
        optimizer = optimizer_class([offset, low, high], lr=1 / STEPS, weight_decay=0)
        schedule = torch.optim.lr_scheduler.LinearLR(
            optimizer, start_factor=1.0, end_factor=0.0, total_iters=STEPS
        )
        best, least = weight, float("inf")
        for _ in range(STEPS):
            with torch.no_grad():
                low.clamp_(0, 1)
                high.clamp_(0, 1)
                offset.clamp_(-0.5, 0.5)
            found, *_ = rounding(weight, bits, group, v=offset, min_scale=low, max_scale=high)
            gap = found - weight
            loss = (gap @ gram * gap).sum()
            if float(loss.detach()) < least:
                best, least = found.detach(), float(loss.detach())
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return best

    return values


PEERS = [
    Peer(
        "torchao",
        "nearest, symmetric int4, groups of 64",
        torchao_nearest(4, 64, True),
        rounded("nearest", 4, 64, True),
    ),
    *(
        Peer(
            "torchao",
            f"nearest, uint{b} with zero point, groups of 64",
            torchao_nearest(b, 64, False),
            rounded("nearest", b, 64),
        )
        for b in (3, 4)
    ),
    Peer("torchao", "NF4, blocks of 64", torchao_nf4, in_format("nf4")),
    Peer("torchao", "MXFP4", torchao_mxfp4, in_format("mxfp4")),
    *(
        Peer("torchao", f"half-quadratic, {b} bits, groups of 64", torchao_hqq(b, 64), rounded("hqq", b, 64))
        for b in (3, 4)
    ),
    *(
        Peer("hqq", f"half-quadratic, {b} bits, groups of 64", hqq(b, 64), rounded("hqq", b, 64))
        for b in (2, 3, 4)
    ),
    *(
        Peer(
            "optimum-quanto",
            f"half-quadratic, {b} bits, groups of 64",
            quanto(b, 64, True),
            rounded("hqq", b, 64),
        )
        for b in (2, 4)
    ),
    Peer("optimum-quanto", "nearest, qint4, groups of 64", quanto(4, 64, False), rounded("nearest", 4, 64)),
    *(
        Peer(
            "auto-round",
            f"SignRound, {b} bits, groups of 64, {STEPS} steps",
            auto_round(b, 64),
            rounded("signround", b, 64),
        )
        for b in (2, 3, 4)
    ),
]
