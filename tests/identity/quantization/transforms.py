"""Equivalent transforms and rotations beside their authors' code, and by dense matrices."""

from __future__ import annotations

import random

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from tests.identity.pairs import Draw, beside
from tests.identity.quantization.learned_roundings import problem_of
from tests.identity.quantization.quantized_training import joined
from tests.identity.quantization.quantized_training_derived import in_16_bits
from tests.identity.repositories import loaded, source
from workbench.storage.identity import AUTHORS, FP64


@beside(
    "hadamard",
    **source("spcl/QuaRot"),
    kind=AUTHORS,
    compared="rows times the Hadamard matrix",
    inputs="5 normal rows of 64 features",
    tolerance=1e-6,
)
def hadamard_rows(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.quantization.transform.hadamard_orders import mixed

    needless = ("fast_hadamard_transform",)
    peer = loaded("spcl/QuaRot", "hadamard_utils", root="fake_quant", without=needless)
    rows = draw.normal(5, 64)
    return peer.matmul_hadU(rows), mixed(rows, 64)


@beside(
    "hadamard",
    peer="Paley 1933",
    kind=FP64,
    compared="an online rotation's inputs and weights, and their product",
    inputs="30 x 40 normal inputs, 16 x 40 normal weights (40 = 20 x 2), fp64",
    tolerance=1e-9,
)
def online_hadamard(draw: Draw) -> tuple[Tensor, Tensor]:
    """The order 20 by quadratic residues modulo 19, one by one, times Sylvester's order 2."""
    from workbench.quantization.number.formats import named
    from workbench.quantization.rounding.problem import Problem
    from workbench.quantization.transform.transform import in_coordinates

    inputs, weight = draw.normal(30, 40, dtype=torch.float64), draw.normal(16, 40, dtype=torch.float64)
    given = Problem(weight, inputs.T @ inputs, named("int4"), generator=torch.Generator().manual_seed(3))
    moved, transform = in_coordinates(given, "hadamard")
    assert transform is not None
    squares = {(n * n) % 19 for n in range(1, 19)}
    core = np.eye(20)
    core[0, 1:], core[1:, 0] = 1, -1
    for i in range(19):
        for j in range(19):
            if i != j:
                core[1 + i, 1 + j] = 1 if (i - j) % 19 in squares else -1
    matrix = np.kron(core, hadamard(2)) / np.sqrt(40)
    signs = torch.randint(0, 2, (40,), generator=torch.Generator().manual_seed(3)).numpy() * 2 - 1
    turn = signs[:, None] * matrix
    first, second = weight.numpy() @ turn, inputs.numpy() @ np.linalg.inv(turn).T
    theirs = (first, second, inputs.numpy() @ weight.numpy().T)
    found = transform.inputs(inputs)
    return joined(*map(torch.from_numpy, theirs)), joined(moved.weight, found, found @ moved.weight.T)


@beside(
    "spinquant",
    **source("facebookresearch/SpinQuant"),
    kind=AUTHORS,
    compared="the rotation after five Cayley steps (theirs solves by five fixed-point iterations)",
    inputs="a Haar 24 x 24 matrix, normal gradients, steps of angle 0.1",
    tolerance=1e-6,
)
def cayley(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.quantization.rotation.learned import cayley_step
    from workbench.quantization.transform.coordinates import haar

    peer = loaded("facebookresearch/SpinQuant", "train_utils.optimizer", packages=("train_utils",))
    ours = haar(24, draw.generator)
    theirs = nn.Parameter(ours.clone())
    random.seed(1)
    for _ in range(5):
        gradient = draw.normal(24, 24, dtype=torch.float64)
        half = 0.5 * gradient @ theirs.detach().T
        rate = 0.1 / float((half - half.T).norm())
        theirs.grad = gradient.clone()
        peer.SGDG([theirs], lr=rate, stiefel=True).step()
        ours = cayley_step(ours, gradient, 0.1)
    draw.shapes = [[24, 24]]
    return theirs, ours


@beside(
    "flatquant",
    **source("ruikangliu/FlatQuant"),
    kind=AUTHORS,
    compared="inputs and weights in the coordinates of a scale and two invertible factors, and the factors' "
    "sizes for eight widths",
    inputs="40 x 24 normal inputs, 16 x 24 normal weights, normal factors 4 x 4 and 6 x 6, fp64",
    tolerance=1e-9,
)
def flatquant(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.quantization.transform.coordinates import Transform
    from workbench.quantization.transform.flatquant import factors_of

    packages = ("flatquant",)
    peer = loaded("ruikangliu/FlatQuant", "flatquant.trans_utils", packages=packages)
    inputs, weight = draw.normal(40, 24, dtype=torch.float64), draw.normal(16, 24, dtype=torch.float64)
    left, right = (draw.normal(n, n, dtype=torch.float64) / 2 + 2 * torch.eye(n).double() for n in (4, 6))
    scale = draw.normal(24, dtype=torch.float64).exp()
    theirs = peer.InvDecomposeTransMatrix(4, 6, add_diag=True, diag_init_para=1 / scale).double()
    for linear, factor in ((theirs.linear_left, left), (theirs.linear_right, right)):
        linear.weight.data = torch.linalg.inv(factor).T.contiguous()
    ours = Transform(scale=scale, left=left, right=right)
    utilities = loaded("ruikangliu/FlatQuant", "flatquant.function_utils", packages=packages)
    widths = (64, 96, 128, 384, 576, 768, 1536, 11008)
    sizes = [torch.tensor([f(n) for n in widths]) for f in (utilities.get_decompose_dim, factors_of)]
    return (
        joined(theirs(inputs), theirs(weight, inv_t=True), sizes[0]),
        joined(ours.inputs(inputs), ours.weight(weight), sizes[1]),
    )


@beside(
    "resq",
    "principal",
    **source("utkarsh-dmx/project-resq"),
    kind=AUTHORS,
    compared="the projections on the wide eighth and on the rest of the coordinates",
    inputs="the second moment of 256 correlated inputs of 32 features, fp64",
    tolerance=1e-9,
)
def resq(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their principal components times their random turns; components' signs are anybody's choice."""
    from workbench.quantization.number.formats import named
    from workbench.quantization.rounding.problem import Problem
    from workbench.quantization.transform.transform import in_coordinates

    needless = (
        "datasets",
        "fast_hadamard_transform",
        "transformers.models.mllama.modeling_mllama",
        "transformers.models.qwen2_vl.modeling_qwen2_vl",
        "train_utils.fsdp_trainer",
        "train_utils.main",
        "train_utils.optimizer",
        "utils.data_utils",
        "utils.process_args",
        "utils.fuse_norm_utils",
        "utils.quant_utils",
        "utils.utils",
    )
    peer = loaded("utkarsh-dmx/project-resq", "get_basis", root="fake_quant", without=needless)
    peer.utils.DEV = "cpu"
    inputs = draw.inputs(256, 32, dtype=torch.float64)
    gram = inputs.T @ inputs
    _, vectors = peer.perform_eigen_decomp(gram.clone())
    torch.manual_seed(draw.seed)
    turns = [peer.random_orthogonal_matrix(n, "cpu") for n in (28, 4)]
    theirs = vectors @ torch.block_diag(*turns)
    given = Problem(draw.normal(16, 32, dtype=torch.float64), gram, named("int4"), generator=draw.generator)
    _, transform = in_coordinates(given, "resq")
    assert transform is not None and transform.right is not None
    both = []
    for basis in (theirs, transform.right):
        high, low = basis[:, 28:], basis[:, :28]
        both.append(joined(high @ high.T, low @ low.T))
    return both[0], both[1]


@beside(
    "teq",
    peer="Cheng et al. 2023, TEQ",
    kind=FP64,
    compared="the scales after 30 steps of Adam",
    inputs="24 x 64 normal weights, 3 bits, a scale a row, 256 correlated inputs, fp64",
    tolerance=1e-9,
)
def teq(draw: Draw) -> tuple[Tensor, Tensor]:
    """By hand: e_ij = c_ij D_i / s_j with c the distance in steps and D_i = |W_ik s_k| / 4 at the largest,
    its gradient in log s, Adam, the best kept, in 16 bits.
    """
    from workbench.quantization.transform.transform import TRANSFORM

    problem = problem_of(draw, "int3")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ours = TRANSFORM.chosen("teq", steps=30)(problem).scale
    finally:
        torch.set_default_dtype(before)
    w, gram = problem.weight.numpy(), problem.gram.numpy()
    gram = gram / np.diag(gram).mean()
    unit = np.einsum("oi,ij,oj->", w, gram, w)
    log, first, second = (np.zeros(64) for _ in range(3))
    best, least, rows = np.ones(64), np.inf, np.arange(24)
    for step in range(30):
        s = np.exp(log)
        moved = w * s
        top = np.abs(moved).argmax(1)
        peak = np.abs(moved[rows, top])
        sign = np.where(moved.max(1) > -moved.min(1), -1, 1)
        scale = in_16_bits(sign * peak / 4)[:, None]
        gap = np.clip(np.rint(moved / scale), -4, 3) * scale - moved
        error = gap / s
        loss = np.einsum("oi,ij,oj->", error, gram, error) / unit
        if loss < least:
            best, least = in_16_bits(s), loss
        slope = 2 * error @ gram / unit
        gradient = -(slope * error).sum(0)
        np.add.at(gradient, top, (slope * error).sum(1))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        rate = 1e-2 * (1 - step / 30)
        unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        log = log - rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    return torch.from_numpy(best), ours


@beside(
    "teq",
    **source("intel/neural-compressor"),
    kind=AUTHORS,
    compared="a layer's outputs with rounded weights at drawn scales (theirs holds the steps fixed in the "
    "scales' gradient, ours moves them)",
    inputs="40 x 64 normal inputs, 24 x 64 weights that span whole steps of 1/8 when scaled, 4 bits",
    tolerance=1e-4,
)
def teq_outputs(draw: Draw) -> tuple[Tensor, Tensor]:
    from tests.identity.quantization.quantizers import on_steps
    from workbench.quantization.number.formats import named
    from workbench.quantization.rounding.problem import Problem
    from workbench.quantization.transform.coordinates import Transform

    parts = "neural_compressor.torch.algorithms.weight_only".split(".")
    packages = tuple(".".join(parts[: end + 1]) for end in range(4))
    peer = loaded(
        "intel/neural-compressor",
        "neural_compressor.torch.algorithms.weight_only.modules",
        packages=packages,
        without=("neural_compressor.torch.utils",),
    )
    inputs, scale = draw.normal(40, 64), (draw.normal(64) / 2).exp()
    weight = on_steps(draw.normal(24, 64), 64, 0.125, 15) / scale
    linear = nn.Linear(64, 24, bias=False)
    linear.weight.data = weight
    theirs = peer.TEQLinearFakeQuant(linear, nn.Parameter(scale), 4, -1, "asym")(inputs)
    transform = Transform(scale=scale)
    moved = Problem(weight, inputs.T @ inputs, named("uint4"), "channel").moved(transform)
    return theirs, transform.inputs(inputs) @ moved.grid().round(moved.weight).T
