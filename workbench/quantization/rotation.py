"""Rotations of the residual stream, folded into the weights (Ashkboos et al. 2024, QuaRot; Liu et al. 2025, SpinQuant's R1).

RMSNorm without its scale commutes with rotations: norm(R x) = R norm(x). So with the norms' scales moved into the layers that
read them, every reader becomes W R^T and every writer R W, and the function is unchanged for any orthogonal R. LayerNorm also
subtracts the mean: that projection, I - 11'/d, is moved into the writers first (Ashkboos et al. 2024, SliceGPT), and R is made to
keep the direction of ones, so that the mean stays zero. Post-norm models (BERT) add the normalised state back to the stream, so their norms'
scales cannot move and nothing can be folded: there, use `Quantize(transform="hadamard")`, which stays online.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.instruments import BadInput
from workbench.quantization.transforms import hadamard, power_of_two
from workbench.subjects import Subject
from workbench.subjects.changes import bake


@dataclass
class Stream:
    """What reads and writes the residual stream. Weights are (module, transposed) with transposed for Conv1D's (in, out)."""

    embeddings: list[nn.Embedding]
    blocks: list[list[tuple[Any, list[tuple[Any, bool]], tuple[Any, bool]]]]  # (norm, its readers, the writer)
    norm: nn.Module
    head: nn.Linear


def stream_of(model: Any) -> Stream:
    """The residual stream of a Llama- or GPT-2-like causal language model; `BadInput` (saying why) for any other."""
    name = type(model).__name__
    if hasattr(model, "transformer") and hasattr(model.transformer, "wte"):
        inner = model.transformer
        blocks = [[(b.ln_1, [(b.attn.c_attn, True)], (b.attn.c_proj, True)), (b.ln_2, [(b.mlp.c_fc, True)], (b.mlp.c_proj, True))] for b in inner.h]
        return Stream([inner.wte, inner.wpe], blocks, inner.ln_f, model.lm_head)
    inner = getattr(model, "model", None)
    first = next(iter(inner.layers), None) if inner is not None and hasattr(inner, "layers") else None
    if first is None or not hasattr(first, "input_layernorm") or not hasattr(getattr(first, "mlp", None), "down_proj"):
        raise BadInput(f"subject: {name} has no residual stream that rotations can be folded into (a pre-norm causal model with RMSNorm or "
                       "LayerNorm is needed); use quantize with transform hadamard, which stays online")  # fmt: skip
    blocks = []
    for b in inner.layers:
        attention, mlp = b.self_attn, b.mlp
        readers = [(attention.q_proj, False), (attention.k_proj, False), (attention.v_proj, False)]
        blocks.append([(b.input_layernorm, readers, (attention.o_proj, False)),
                       (b.post_attention_layernorm, [(mlp.gate_proj, False), (mlp.up_proj, False)], (mlp.down_proj, False))])  # fmt: skip
    return Stream([inner.embed_tokens], blocks, inner.norm, model.lm_head)


def random_rotation(width: int, kind: str, generator: torch.Generator) -> Tensor:
    """An orthogonal (width, width), float64: "hadamard" (block Hadamard with random signs), "orthogonal" (Haar), "identity"."""
    if kind == "identity":
        return torch.eye(width, dtype=torch.float64)
    if kind == "hadamard":
        block = power_of_two(width)
        signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
        return torch.block_diag(*[hadamard(block, dtype=torch.float64)] * (width // block)) * signs
    if kind == "orthogonal":
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        return q * torch.sign(r.diagonal())
    raise BadInput(f"kind: {kind!r} is unknown; accepted: hadamard, orthogonal, identity")


def keep_mean(matrix: Tensor) -> Tensor:
    """The rotation followed by the reflection that brings the direction of ones back to itself: LayerNorm's mean stays zero."""
    ones = torch.full((len(matrix),), len(matrix) ** -0.5, dtype=matrix.dtype, device=matrix.device)
    across = matrix @ ones - ones
    size = across.square().sum()
    return matrix if float(size) < 1e-24 else matrix - 2 * torch.outer(across, across @ matrix) / size


@torch.no_grad()
def rotate(subject: Subject, kind: str = "hadamard", seed: int = 0, rotation: Tensor | None = None) -> Subject:
    """A subject with the same function whose residual stream is rotated by an orthogonal (width, width) matrix.

    Changes on its weights are baked in first; a head tied to the embedding is untied (its norm's scale moves into it).
    """
    made = subject.copy()
    model: Any = bake(made.model)
    stream = stream_of(model)
    width = stream.embeddings[0].weight.shape[1]
    matrix = random_rotation(width, kind, torch.Generator().manual_seed(seed)) if rotation is None else rotation.double()
    if matrix.shape != (width, width) or not torch.allclose(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), atol=1e-8):
        raise BadInput(f"rotation: an orthogonal matrix of shape ({width}, {width}) is needed, got {tuple(matrix.shape)}")
    matrix = matrix.to(stream.head.weight.device)
    untie(model, stream)
    centre = isinstance(stream.norm, nn.LayerNorm)
    project = torch.eye(width, dtype=torch.float64, device=matrix.device)
    if centre:
        project = project - 1 / width
        matrix = keep_mean(matrix)
    write = matrix @ project  # what is added to the stream goes through the centring, then the rotation
    for embedding in stream.embeddings:
        embedding.weight.copy_((embedding.weight.double() @ write.T).to(embedding.weight.dtype))
    for block in stream.blocks:
        for norm, readers, (writer, turned) in block:
            for reader, transposed in readers:
                read_from(reader, transposed, norm, matrix)
            reset(norm)
            weight = writer.weight.double().mT if turned else writer.weight.double()
            weight = write @ weight
            writer.weight.copy_((weight.mT if turned else weight).to(writer.weight.dtype))
            if writer.bias is not None:
                writer.bias.copy_((write @ writer.bias.double()).to(writer.bias.dtype))
    read_from(stream.head, False, stream.norm, matrix)
    reset(stream.norm)
    return made.with_model(model)


def read_from(reader: Any, transposed: bool, norm: Any, matrix: Tensor) -> None:
    """W (g * n + b) + c = (W diag(g) R^T) (R n) + (c + W b)."""
    weight = reader.weight.double().mT if transposed else reader.weight.double()
    shift = getattr(norm, "bias", None)
    if shift is not None and bool((shift != 0).any()):
        moved = weight @ shift.double()
        if reader.bias is None:
            reader.bias = nn.Parameter(moved.to(reader.weight.dtype), requires_grad=False)
        else:
            reader.bias.copy_((reader.bias.double() + moved).to(reader.bias.dtype))
    weight = (weight * norm.weight.double()) @ matrix.T
    reader.weight.copy_((weight.mT if transposed else weight).to(reader.weight.dtype))


def reset(norm: Any) -> None:
    norm.weight.fill_(1.0)
    if getattr(norm, "bias", None) is not None:
        norm.bias.zero_()


def untie(model: Any, stream: Stream) -> None:
    """Give the head its own weight when it shares the embedding's: they rotate differently."""
    if stream.head.weight is stream.embeddings[0].weight:
        stream.head.weight = nn.Parameter(stream.head.weight.detach().clone())
        model.config.tie_word_embeddings = False
