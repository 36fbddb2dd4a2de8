"""Equivalent transforms, rotations and folded scales beside their authors' code on a small Llama."""

from __future__ import annotations

import random
import tempfile
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from tests.identity.learned_roundings import problem_of
from tests.identity.pairs import Draw, beside
from tests.identity.quantized_training import joined
from tests.identity.repositories import loaded, source

AUTHORS, PEER, FP64 = "authors' code", "peer's code", "second derivation in fp64"
LLAMA = "a seeded Llama of 2 blocks, width 32, with norms' scales from 0.7 to 1.3"
INPUTS = f"{LLAMA}, 8 examples of 24 random tokens"


def llama(draw: Draw) -> Any:
    """A subject; embeddings without mean, which QuaRot's authors take off."""
    import transformers

    import workbench

    torch.manual_seed(draw.seed)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.7 + 0.6 * torch.rand(parameter.shape, generator=draw.generator))
            if "embed" in name:
                parameter.sub_(parameter.mean(-1, keepdim=True))
                parameter.mul_(torch.logspace(-0.5, 0.5, 32))
                parameter.sub_(parameter.mean(-1, keepdim=True))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return workbench.subject(folder, data="random", max_length=24)


def matrices(model: nn.Module) -> Tensor:
    """Every matrix and norm of a model, in order of their names."""
    return joined(*(tensor for _, tensor in sorted(model.state_dict().items())))


@beside(
    "quarot",
    "hadamard",
    **source("spcl/QuaRot"),
    kind=AUTHORS,
    compared="all matrices of the rotated model, by the same seed (their online Hadamard left out)",
    inputs=LLAMA,
    tolerance=1e-5,
)
def quarot(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their `rotate_model` after their `fuse_layer_norms`; their kernel for down and output projections
    needs CUDA.
    """
    import copy

    from workbench.quantization.rotation.fold import rotate

    needless = ("fast_hadamard_transform", "monkeypatch")
    peer = loaded("spcl/QuaRot", "rotation_utils", root="fake_quant", without=needless)
    on = llama(draw)
    theirs: Any = copy.deepcopy(on.model)
    peer.fuse_layer_norms(theirs)
    with (
        patch.object(peer, "apply_exact_had_to_linear", lambda *given, **named: None),
        patch.object(peer.utils, "cleanup_memory", lambda *given, **named: None),
    ):
        torch.manual_seed(5)
        peer.rotate_model(theirs, SimpleNamespace(rotate_mode="hadamard"))
    ours = rotate(on, "hadamard", 5)
    plain = {name: value for name, value in ours.model.state_dict().items() if "norm" not in name}
    found = theirs.state_dict()
    return joined(*(found[name] for name in plain)), joined(*plain.values())


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
    "learned",
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
    "smoothquant",
    **source("mit-han-lab/smoothquant"),
    kind=AUTHORS,
    compared="all matrices and norms of the smoothed model",
    inputs=INPUTS,
    tolerance=1e-5,
)
def smoothquant(draw: Draw) -> tuple[Tensor, Tensor]:
    """Largest inputs by hooks here, as in their `get_act_scales`."""
    import copy

    from workbench.progress import Progress
    from workbench.quantization import Equalize

    on = llama(draw)
    theirs: Any = copy.deepcopy(on.model)
    largest: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            seen = args[0].detach().abs().flatten(0, -2).amax(0)
            largest[name] = torch.maximum(largest.get(name, seen), seen)

        return hook

    for name, module in theirs.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note(name))
    for batch in on.batches("calibration", 8, 8):
        on.task.output(theirs, batch)
    peer = loaded("mit-han-lab/smoothquant", "smoothquant.smooth", packages=("smoothquant",))
    peer.smooth_lm(theirs, largest, 0.5)
    ours = Equalize(kind="smoothquant", calibration_examples=8).run(on, Progress(), cache=False).subject
    return matrices(theirs), matrices(ours.model)


@beside(
    "awq",
    **source("mit-han-lab/llm-awq"),
    kind=AUTHORS,
    compared="the scales that the search finds for all eight groups of layers",
    inputs=f"{INPUTS}, 3 bits, groups of 16, steps in 32 bits",
    tolerance=1e-4,
)
def awq(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their `auto_scale_block` on each block's own inputs in the dense model. Ours keeps steps in 16 bits,
    which moves the choice to a neighbour where two powers lose nearly the same: here in 32 bits, as theirs.
    """
    import copy
    import sys

    from workbench.progress import Progress
    from workbench.quantization.equalization.equalizations import EQUALIZATION
    from workbench.quantization.equalization.scale_groups import scale_groups
    from workbench.quantization.number import grid

    on = llama(draw)
    model: Any = copy.deepcopy(on.model)
    packages, kernels = ("awq", "awq.quantize", "awq.utils"), ("awq_inference_engine", "awq.quantize.qmodule")
    peer = loaded("mit-han-lab/llm-awq", "awq.quantize.auto_scale", packages=packages, without=kernels)
    quantizer = loaded("mit-han-lab/llm-awq", "awq.quantize.quantizer", packages=packages, without=kernels)
    inputs: dict[str, Tensor] = {}
    kwargs: dict[str, Any] = {}

    def note(name: str) -> Any:
        return lambda module, args: inputs.__setitem__(name, args[0].detach())

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note(name))
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda module, args, named: kwargs.update(named), with_kwargs=True)
    (batch,) = on.batches("calibration", 8, 8)
    with torch.no_grad():
        on.task.output(model, batch)
    given = {"position_embeddings": kwargs["position_embeddings"], "attention_mask": kwargs["attention_mask"]}
    theirs: dict[str, Tensor] = {}
    for index, block in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        features = {n.removeprefix(prefix): value for n, value in inputs.items() if n.startswith(prefix)}
        with patch.dict(sys.modules, {"awq.quantize.quantizer": quantizer, peer.__package__: SimpleNamespace()}):
            found = peer.auto_scale_block(
                block, dict(given), 3, {"zero_point": True, "q_group_size": 16}, features
            )
        theirs |= {f"{prefix}{readers[0]}": scale for _, readers, scale in found}
    search = EQUALIZATION.chosen("awq", format="uint3", group_size=16)
    with patch.object(grid, "stored", lambda scale, format, size=None: scale):
        ours = {s.group.readers[0]: s.scale for s in search(on, scale_groups(on.model), 8, Progress())}
    names = sorted(ours)
    return joined(*(theirs[name] for name in names)), joined(*(ours[name] for name in names))


@beside(
    "teq",
    peer="Cheng et al. 2023, TEQ",
    kind=FP64,
    compared="the scales after 30 steps of Adam",
    inputs="24 x 64 normal weights, 3 bits, a scale a row, 256 correlated inputs, fp64",
    tolerance=1e-9,
)
def teq(draw: Draw) -> tuple[Tensor, Tensor]:
    """By hand: e_ij = c_ij D_i / s_j with c the distance in steps and D_i = |W_ik s_k| / 4 at the largest, its
    gradient in log s, Adam, the best kept, in 16 bits.
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
        peak = moved[rows, top]
        reach, other = np.abs(peak) / 4, np.float32(moved)
        sign = np.where(other.max(1) > -other.min(1), -1, 1)
        scale = np.float16(sign * np.float32(np.abs(peak)) / np.float32(4)).astype(np.float64)[:, None]
        gap = np.clip(np.rint(moved / scale), -4, 3) * scale - moved
        error = gap / s
        loss = np.einsum("oi,ij,oj->", error, gram, error) / unit
        if loss < least:
            best, least = np.float16(s).astype(np.float64), loss
        slope = 2 * error @ gram / unit
        gradient = -(slope * error).sum(0)
        np.add.at(gradient, top, (slope * error).sum(1))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        rate = 1e-2 * (1 - step / 30)
        unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        log = log - rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    assert reach.all()
    return torch.from_numpy(best), ours
