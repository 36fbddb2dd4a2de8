"""A stored difference and a wider matrix beside the authors' code."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn

from tests.identity.pairs import Draw, beside
from tests.identity.repositories import source
from tests.identity.scripts import taken
from workbench.arithmetic import DIFFERENCE
from workbench.arithmetic.difference.difference import Matrix, packing_of
from workbench.arithmetic.growth.width import tiled
from workbench.storage.identity import AUTHORS


@beside(
    "bitdelta",
    **source("FasterDecoding/BitDelta"),
    kind=AUTHORS,
    compared="the weight of base, signs and scale, before the scales are distilled",
    inputs="a 64 x 96 base and a fine-tune of it",
    tolerance=1e-7,
)
def bitdelta(draw: Draw) -> tuple[Tensor, Tensor]:
    owner = "FasterDecoding/BitDelta"
    bits = taken(owner, "bitdelta/binary_gemm_kernel.py", "pack", "unpack", torch=torch)
    given = {"torch": torch, "nn": nn, "gc": gc, **bits}
    theirs = taken(owner, "bitdelta/diff.py", "BinaryDiff", **given)["BinaryDiff"]
    base = draw.normal(64, 96)
    tuned = base + 0.05 * draw.normal(64, 96)
    made = theirs(base, tuned)
    signs = bits["unpack"](made.mask).float() * 2 - 1
    their = made.base + made.coeff.detach() * signs
    packing: Any = packing_of(DIFFERENCE.chosen("bitdelta"))
    return their.T, packing.unpack(packing.pack(Matrix("m", base, tuned)), base)


@beside(
    "hypercloning",
    **source("apple/ml-hypercloning"),
    kind=AUTHORS,
    compared="a matrix three times as wide on both sides",
    inputs="a 16 x 24 matrix",
    tolerance=1e-7,
)
def hypercloning(draw: Draw) -> tuple[Tensor, Tensor]:
    names = ("clone_matrix", "add_noise", "get_noise_with_snr")
    theirs = taken("apple/ml-hypercloning", "hypercloning/common.py", *names, torch=torch)["clone_matrix"]
    weight = draw.normal(16, 24)
    model = nn.Sequential(nn.Linear(24, 16))
    return theirs((48, 72), weight), tiled(model, "0.weight", weight, (48, 72), weight, 0.0)
