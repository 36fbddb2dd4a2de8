"""Gates that the two matrices of a feed-forward share, beside their authors' code."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.identity.pairs import Draw, beside
from tests.identity.pruning.given import doubles, flat, subject_of
from tests.identity.pruning.own_model import FeedForward
from tests.identity.pruning.sparse_training import block_pruning
from tests.identity.repositories import source
from workbench.pruning.sparse_training.block_movement import attach_gates
from workbench.pruning.sparse_training.trained_masks import Gates, selection_of
from workbench.storage.identity import AUTHORS


@beside(
    "block-movement",
    "hybrid",
    **source("huggingface/nn_pruning"),
    kind=AUTHORS,
    compared="the loss, and the gradients of weights and of the scores that a neuron's row and its column "
    "have between them",
    inputs="2 feed-forward blocks of 16 x 24 and 40 examples, threshold 0.4, fp64",
    tolerance=1e-12,
)
def shared_gates(draw: Draw) -> tuple[Tensor, Tensor]:
    theirs = block_pruning()
    model: Any = FeedForward()
    for parameter in model.parameters():
        parameter.data = draw.normal(*parameter.shape, dtype=torch.float64) / 3
    scores = [draw.normal(24, dtype=torch.float64) for _ in range(2)]
    inputs, labels = draw.normal(40, 16, dtype=torch.float64), draw.normal(40, 5).argmax(-1)
    about = theirs.LinearPruningArgs(
        method="sigmoied_threshold",
        submethod="1d_alt",
        ampere_method="disabled",
        block_rows=1,
        block_cols=1,
        min_elements=0.0,
    )
    other, shared, weights = copy.deepcopy(model), [], []
    for block, score in zip(other.blocks, scores, strict=True):
        rows = theirs.SingleDimensionLinearPruningContextModule((24, 16), True, about)
        columns = theirs.SingleDimensionLinearPruningContextModule((16, 24), False, about)
        rows.mask_scores = columns.mask_scores = nn.Parameter(score.clone())
        shared.append(rows.mask_scores)
        weights += [block.fc1.weight, block.fc2.weight]
        block.fc1 = theirs.MaskedLinear(block.fc1, [rows, None], None, about)
        block.fc2 = theirs.MaskedLinear(block.fc2, [None, columns], None, about)
        for module in (block.fc1, block.fc2):
            module.get_context_data = lambda name: 0.4
    with doubles():
        loss = F.cross_entropy(other(inputs), labels)
    wanted = [loss, *torch.autograd.grad(loss, [*weights, *shared])]
    on = subject_of(model, inputs, labels)
    layers = on.layers()
    attach_gates(on, layers, "hybrid 4x8", 0.4)
    gates: list[Any] = [selection_of(layer) for layer in layers]
    assert all(isinstance(gate, Gates) for gate in gates)
    assert gates[0].score is gates[1].score and gates[2].score is gates[3].score
    for gate, score in zip(gates[::2], scores, strict=True):
        gate.score.data = score[:, None].clone()
    loss = on.loss(next(on.batches("train", 40)))
    learned = [*(layer.original for layer in layers), gates[0].score, gates[2].score]
    return flat(wanted), flat([loss, *torch.autograd.grad(loss, learned)])
