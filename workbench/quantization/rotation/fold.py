"""Rotations of the residual stream, folded into the weights
(Ashkboos et al. 2024, QuaRot; Liu et al. 2025, SpinQuant's R1).

RMSNorm without its scale commutes with rotations: norm(R x) = R norm(x). So with the norms' scales moved into
the layers that read them, every reader becomes W R^T and every writer R W, and the function is unchanged for
any orthogonal R. LayerNorm also subtracts the mean: that projection, I - 11'/d, is moved into the writers
first (Ashkboos et al. 2024, SliceGPT), and R is made to keep the direction of ones, so that the mean stays
zero. Post-norm models (BERT) add the normalised state back to the stream, so their norms' scales cannot move
and nothing can be folded: there, use `Quantize(transform="hadamard")`, which stays online.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.errors import BadInput
from workbench.quantization.transform.coordinates import haar
from workbench.quantization.transform.hadamard_orders import matrix_of_order, widest
from workbench.subjects import Subject
from workbench.subjects.changes import bake


@dataclass
class Stream:
    """What reads and writes the residual stream. `heads` holds, for each block, the value projection,
    its rows and the output projection.
    """

    embeddings: list[nn.Embedding]
    blocks: list[list[tuple[Any, list[Any], Any]]]  # (norm, its readers, the writer)
    norm: nn.Module
    head: nn.Linear
    heads: list[tuple[Any, slice, Any]]
    head_size: int


def stream_of(model: Any) -> Stream:
    """The residual stream of a Llama- or GPT-2-like causal language model;
    `BadInput` (saying why) for any other.
    """
    name = type(model).__name__
    if hasattr(model, "transformer") and hasattr(model.transformer, "wte"):
        inner = model.transformer
        blocks = [
            [(b.ln_1, [b.attn.c_attn], b.attn.c_proj), (b.ln_2, [b.mlp.c_fc], b.mlp.c_proj)] for b in inner.h
        ]
        width = inner.wte.weight.shape[1]
        heads = [(b.attn.c_attn, slice(2 * width, 3 * width), b.attn.c_proj) for b in inner.h]
        return Stream(
            [inner.wte, inner.wpe], blocks, inner.ln_f, model.lm_head, heads, width // model.config.n_head
        )
    inner = getattr(model, "model", None)
    first = next(iter(inner.layers), None) if inner is not None and hasattr(inner, "layers") else None
    if (
        inner is None
        or first is None
        or not hasattr(first, "input_layernorm")
        or not hasattr(getattr(first, "mlp", None), "down_proj")
    ):
        raise BadInput(
            f"subject: {name} has no residual stream that rotations can be folded into (a pre-norm causal "
            "model with RMSNorm or "
            "LayerNorm is needed); use quantize with transform hadamard, which stays online"
        )
    blocks, heads = [], []
    for b in inner.layers:
        attention, mlp = b.self_attn, b.mlp
        blocks.append(
            [
                (b.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], attention.o_proj),
                (b.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], mlp.down_proj),
            ]
        )
        heads.append((attention.v_proj, slice(None), attention.o_proj))
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Stream([inner.embed_tokens], blocks, inner.norm, model.lm_head, heads, int(size))


def random_rotation(width: int, kind: str, generator: torch.Generator) -> Tensor:
    """An orthogonal (width, width), float64: "hadamard" (with random signs), "orthogonal"
    (Haar), "identity".
    """
    if kind == "identity":
        return torch.eye(width, dtype=torch.float64)
    if kind == "hadamard":
        order = widest(width)
        signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
        return torch.block_diag(*[matrix_of_order(order)] * (width // order)) * signs
    if kind == "orthogonal":
        return haar(width, generator)
    raise BadInput(f"kind: {kind!r} is unknown; accepted: hadamard, orthogonal, identity")


def keep_mean(matrix: Tensor) -> Tensor:
    """The rotation followed by the reflection that brings the direction of ones back to itself:
    LayerNorm's mean stays zero.
    """
    ones = torch.full((len(matrix),), len(matrix) ** -0.5, dtype=matrix.dtype, device=matrix.device)
    across = matrix @ ones - ones
    size = across.square().sum()
    return (
        matrix if float(size.detach()) < 1e-24 else matrix - 2 * torch.outer(across, across @ matrix) / size
    )


@torch.no_grad()
def change_of_outputs(on: Subject, made: Subject) -> tuple[float, float]:
    """(largest change of any output on four calibration examples, largest output)."""
    batch = next(on.batches("calibration", 4))
    before = on.task.output(on.model, batch).float()
    return float((made.task.output(made.model, batch).float() - before).abs().max()), float(
        before.abs().max()
    )


def same_function(on: Subject, made: Subject) -> float:
    """The largest change of any output. Raises `BadInput` where what was folded changed the function: a norm
    that is no plain multiple of its weight (Gemma's 1 + weight), or one more between the stream and the
    layers.
    """
    change, largest = change_of_outputs(on, made)
    coarse = min(torch.finfo(p.dtype).bits for p in on.model.parameters()) < 32
    if not change <= (0.1 if coarse else 1e-3) * max(largest, 1.0):
        raise BadInput(
            f"subject: {type(on.model).__name__} does not keep its function when its norms' scales move "
            f"(outputs change by {change:.2g}, the largest is {largest:.2g}); use quantize with a transform, "
            "which stays online"
        )
    return change


@torch.no_grad()
def rotate(
    subject: Subject,
    kind: str = "hadamard",
    seed: int = 0,
    rotation: Tensor | None = None,
    heads: Sequence[Tensor] = (),
) -> Subject:
    """A subject with the same function whose residual stream is rotated by an orthogonal (width, width)
    matrix.

    heads : an orthogonal (head size, head size) for each block, which turns what its heads read and write
        (SpinQuant's R2) Changes on its weights are baked in first;
        a head tied to the embedding is untied (its norm's scale moves into it).
    """
    made = subject.copy()
    model: Any = bake(made.model)
    stream = folded(model)
    width = stream.embeddings[0].weight.shape[1]
    matrix = (
        random_rotation(width, kind, torch.Generator().manual_seed(seed))
        if rotation is None
        else rotation.double()
    )
    for name, found, size in [
        ("rotation", matrix, width),
        *(("heads", h.double(), stream.head_size) for h in heads),
    ]:
        if found.shape != (size, size) or not torch.allclose(
            found @ found.T, torch.eye(size, dtype=torch.float64, device=found.device), atol=1e-8
        ):
            raise BadInput(
                f"{name}: an orthogonal matrix of shape ({size}, {size}) is needed, got {tuple(found.shape)}"
            )
    device = stream.head.weight.device
    for (module, tensor), value in turned(
        stream, matrix.to(device), [h.double().to(device) for h in heads]
    ).items():
        getattr(module, tensor).copy_(value)
    turned_subject = made.with_model(model)
    same_function(subject, turned_subject)
    return turned_subject


@torch.no_grad()
def folded(model: Any) -> Stream:
    """The stream of a model after its norms' scales and biases went into the layers that read them
    (in place), and LayerNorm's centring into the layers that write:
    from here on any rotation leaves the function alone.
    """
    stream = stream_of(model)
    untie(model, stream)
    centre = isinstance(stream.norm, nn.LayerNorm)
    if centre:
        for embedding in stream.embeddings:
            embedding.weight.sub_(embedding.weight.mean(1, keepdim=True))
    for norm, readers, writer in [part for block in stream.blocks for part in block] + [
        (stream.norm, [stream.head], None)
    ]:
        for reader in readers:
            read_from(reader, norm)
        reset(norm)
        if centre and writer is not None:
            matrix = matrix_of(writer)
            matrix.sub_(matrix.mean(0))
            if writer.bias is not None:
                writer.bias.sub_(writer.bias.mean())
    return stream


def turned(
    stream: Stream, matrix: Tensor, heads: Sequence[Tensor] = ()
) -> dict[tuple[nn.Module, str], Tensor]:
    """(module, tensor) -> its value in the rotated stream: readers W R^T, writers R W.
    Differentiable in the rotations, in their dtype.
    """
    if isinstance(stream.norm, nn.LayerNorm):
        matrix = keep_mean(matrix)
    found: dict[tuple[nn.Module, str], Tensor] = {
        (e, "weight"): e.weight.detach().to(matrix.dtype) @ matrix.T for e in stream.embeddings
    }

    def now(module: Any, tensor: str) -> Tensor:
        """The value so far, matrices as (out, in)."""
        value = found.get((module, tensor), getattr(module, tensor).detach().to(matrix.dtype))
        return value.mT if tensor == "weight" and isinstance(module, Conv1D) else value

    def then(module: Any, tensor: str, value: Tensor) -> None:
        found[module, tensor] = value.mT if tensor == "weight" and isinstance(module, Conv1D) else value

    for (value, rows, output), turn in zip(stream.heads, heads, strict=bool(heads)):
        for tensor in ("weight", "bias"):
            if getattr(value, tensor, None) is not None:
                whole = now(value, tensor)
                part = whole[rows].unflatten(0, (-1, stream.head_size))
                part = torch.einsum("ij,hj...->hi...", turn, part).flatten(0, 1)
                then(
                    value,
                    tensor,
                    part
                    if rows == slice(None)
                    else torch.cat([whole[: rows.start], part, whole[rows.stop :]]),
                )
        then(
            output, "weight", (now(output, "weight").unflatten(1, (-1, stream.head_size)) @ turn.T).flatten(1)
        )
    for _, readers, writer in [part for block in stream.blocks for part in block]:
        for reader in readers:
            then(reader, "weight", now(reader, "weight") @ matrix.T)
        then(writer, "weight", matrix @ now(writer, "weight"))
        if writer.bias is not None:
            then(writer, "bias", matrix @ now(writer, "bias"))
    then(stream.head, "weight", now(stream.head, "weight") @ matrix.T)
    return found


def matrix_of(module: Any) -> Tensor:
    """The weight as (out, in), sharing its storage."""
    return module.weight.mT if isinstance(module, Conv1D) else module.weight


def read_from(reader: Any, norm: Any) -> None:
    """W (g * n + b) + c = (W diag(g)) n + (c + W b)."""
    weight, shift = matrix_of(reader), getattr(norm, "bias", None)
    if shift is not None and bool((shift != 0).any()):
        moved = weight.double() @ shift.double()
        if reader.bias is None:
            reader.bias = nn.Parameter(moved.to(reader.weight.dtype), requires_grad=False)
        else:
            reader.bias.copy_((reader.bias.double() + moved).to(reader.bias.dtype))
    weight.mul_(norm.weight)


def reset(norm: Any) -> None:
    norm.weight.fill_(1.0)
    if getattr(norm, "bias", None) is not None:
        norm.bias.zero_()


def untie(model: Any, stream: Stream) -> None:
    """Give the head its own weight when it shares the embedding's: they rotate differently."""
    if stream.head.weight is stream.embeddings[0].weight:
        stream.head.weight = nn.Parameter(stream.head.weight.detach().clone())
        model.config.tie_word_embeddings = False
