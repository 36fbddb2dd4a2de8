"""Rotations and scales that are folded into a small Llama, by their authors' code."""

from __future__ import annotations

import copy
import sys
import tempfile
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tests.identity.pairs import Draw, beside
from tests.identity.quantization.quantized_training import joined
from tests.identity.repositories import loaded, source
from workbench.storage.identity import AUTHORS

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
    "smoothquant",
    **source("mit-han-lab/smoothquant"),
    kind=AUTHORS,
    compared="all matrices and norms of the smoothed model",
    inputs=INPUTS,
    tolerance=1e-5,
)
def smoothquant(draw: Draw) -> tuple[Tensor, Tensor]:
    """Largest inputs by hooks here, as in their `get_act_scales`."""
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
        with patch.dict(
            sys.modules, {"awq.quantize.quantizer": quantizer, peer.__package__: SimpleNamespace()}
        ):
            found = peer.auto_scale_block(
                block, dict(given), 3, {"zero_point": True, "q_group_size": 16}, features
            )
        theirs |= {f"{prefix}{readers[0]}": scale for _, readers, scale in found}
    search = EQUALIZATION.chosen("awq", format="uint3", group_size=16)
    with patch.object(grid, "stored", lambda scale, format, size=None: scale):
        ours = {s.group.readers[0]: s.scale for s in search(on, scale_groups(on.model), 8, Progress())}
    names = sorted(ours)
    return joined(*(theirs[name] for name in names)), joined(*(ours[name] for name in names))
