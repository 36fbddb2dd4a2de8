"""Roundings and prunings of a layer beside llm-compressor's, torch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.identity.pairs import Draw, beside
from workbench.storage.identity import PEER

LAYER = "64 x 128 normal weights, 512 correlated inputs"
COMPRESSOR = dict(peer="llmcompressor", kind=PEER, inputs=LAYER)


def layer_of(draw: Draw) -> tuple[nn.Linear, Tensor]:
    """A linear layer (64, 128) and its inputs (512, 128)."""
    layer = nn.Linear(128, 64, bias=False)
    layer.weight.data = draw.normal(64, 128)
    return layer, draw.inputs(512, 128)


def sparse_gpt(draw: Draw, keep: int, of: int) -> tuple[Tensor, Tensor]:
    from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify

    from workbench.pruning.pattern import NM
    from workbench.pruning.solvers.obs import sweep

    layer, inputs = layer_of(draw)
    hessian, _ = sgpt_sparsify.accumulate_hessian(inputs, layer, sgpt_sparsify.make_empty_hessian(layer), 0)
    with torch.no_grad():
        _, theirs = sgpt_sparsify.sparsify_weight(
            layer, {layer: hessian}, 0.5, of - keep, of, 128, 0.01, False
        )
    pattern = NM(keep, of) if of else None
    weight, gram = layer.weight.detach(), inputs.T @ inputs
    ours, _ = sweep(weight, gram, 0.01, sparsity=0.5, pattern=pattern)
    return theirs, ours


@beside("sparsegpt-2:4", compared="the pruned weights, 2:4", tolerance=1e-5, **COMPRESSOR)
def sparse_gpt_pattern(draw: Draw) -> tuple[Tensor, Tensor]:
    return sparse_gpt(draw, 2, 4)


@beside(
    "sparsegpt",
    compared="the weights with the same half pruned (theirs takes one weight more)",
    tolerance=1e-5,
    **COMPRESSOR,
)
def sparse_gpt_half(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their threshold is passed by one weight more than half; ours is given their mask."""
    from workbench.pruning.solvers.obs import sweep

    again = Draw(draw.seed)
    theirs, _ = sparse_gpt(draw, 0, 0)
    layer, inputs = layer_of(again)
    ours, _ = sweep(layer.weight.detach(), inputs.T @ inputs, 0.01, mask=theirs != 0)
    return theirs, ours


@beside("wanda", compared="the weights with half of each row pruned", tolerance=0.0, **COMPRESSOR)
def wanda(draw: Draw) -> tuple[Tensor, Tensor]:
    from types import SimpleNamespace

    from llmcompressor.modifiers.pruning.wanda import wanda_sparsify

    from workbench.axis import Options
    from workbench.pruning.pattern import smallest
    from workbench.pruning.saliency.weights import wanda as score

    layer, inputs = layer_of(draw)
    sums, _ = wanda_sparsify.accumulate_row_scalars(
        inputs, layer, wanda_sparsify.make_empty_row_scalars(layer), 0
    )
    theirs = wanda_sparsify.sparsify_weight(layer, {layer: sums}, 0.5, 0, 0)
    seen = SimpleNamespace(norm=lambda layer: inputs.square().mean(0).sqrt())
    weight = layer.weight.detach()
    scores = score(SimpleNamespace(weight=weight, shape=weight.shape), seen, None, Options())
    return theirs, weight * ~smallest(scores, 64)


@beside(
    "magnitude",
    peer="torch",
    kind=PEER,
    compared="the weights with half pruned by l1_unstructured",
    inputs="64 x 128 normal weights",
    tolerance=0.0,
)
def magnitude(draw: Draw) -> tuple[Tensor, Tensor]:
    from types import SimpleNamespace

    from torch.nn.utils import prune

    from workbench.axis import Options
    from workbench.pruning.pattern import smallest
    from workbench.pruning.saliency.weights import magnitude as score

    layer, _ = layer_of(draw)
    weight = layer.weight.detach().clone()
    prune.l1_unstructured(layer, "weight", 0.5)
    scores = score(SimpleNamespace(weight=weight, shape=weight.shape), None, None, Options())
    return layer.weight, weight * ~smallest(scores.flatten(), 4096).view_as(scores)


@beside("gptq", compared="the rounded weights, 4 bits a channel", tolerance=1e-5, **COMPRESSOR)
def gptq(draw: Draw) -> tuple[Tensor, Tensor]:
    """Both on the scales of our grid."""
    from dataclasses import replace

    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    from workbench.quantization.number.formats import named
    from workbench.quantization.number.grid import fit
    from workbench.quantization.rounding.feedback import linear_feedback
    from workbench.quantization.rounding.gptq import gptq as ours

    layer, inputs = layer_of(draw)
    weight, gram = layer.weight.detach(), inputs.T @ inputs
    grid = replace(fit(weight, named("int4-odd"), "channel"), format=named("int4"))
    settings = QuantizationArgs(num_bits=4, symmetric=True, strategy="channel")
    theirs, _, _ = quantize_weight(
        weight[None].clone(),
        gram[None].clone(),
        grid.scale[None],
        torch.zeros_like(grid.scale)[None],
        None,
        settings,
    )
    return theirs[0], ours(weight, linear_feedback(gram, 0.01), grid)
