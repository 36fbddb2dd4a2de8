"""Adapters under a mask and beside it, and distillation, beside others' code and written out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.identity.pairs import Draw, beside
from tests.identity.pruning.given import flat
from tests.identity.pruning.small_models import llama
from tests.identity.pruning.sparse_training import LAYER, drawn, linear
from tests.identity.repositories import absent, loaded, source
from workbench.pruning.sparse_training import side_terms
from workbench.storage.identity import AUTHORS, FP64, PEER
from workbench.subjects import Layer, LowRank, Mask


@beside(
    "distillation",
    "recovery-minilm",
    **source("thu-ml/Adaptive-Sparse-Trainer"),
    kind=PEER,
    compared="cross-entropy + 4 KL at temperature 2 + the mean relative distance of hidden states, and its "
    "gradients (theirs without bfloat16's eps, which it adds to a state's size, and the mean over blocks)",
    inputs="a Llama of 3 blocks and a teacher of other weights, 8 sequences",
    tolerance=1e-6,
)
def distillation(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.pruning.recovery.recovery import distilled_loss

    absent("wandb")
    theirs = loaded("thu-ml/Adaptive-Sparse-Trainer", "sparse_modeling")
    student, teacher = llama(draw), llama(draw)
    batch = next(student.batches("train", 8))
    learned = [p for p in student.model.parameters() if p.requires_grad]

    def run(on: Any) -> tuple[Tensor, list[Tensor]]:
        states: list[Tensor] = []
        hooks = [
            block.register_forward_hook(
                lambda module, args, out: states.append(out[0] if isinstance(out, tuple) else out)
            )
            for block in on.model.model.layers
        ]
        logits = on.model(input_ids=batch["input_ids"]).logits
        for hook in hooks:
            hook.remove()
        return logits[:, :-1], states

    logits, states = run(student)
    with torch.no_grad():
        goals, wanted = run(teacher)
    task = F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    made = theirs.Distill_Model
    with patch.object(theirs.torch, "finfo", lambda kind: SimpleNamespace(eps=0.0)):
        near = made.layerwise_loss(None, states, wanted) / len(states)
    loss = task + made.kl_loss(None, logits, goals) + near
    ours = distilled_loss(student, teacher, batch)
    return tuple(  # type: ignore[return-value]
        flat([total[None], *torch.autograd.grad(total, learned)]) for total in (loss, ours)
    )


def masked_adapter(draw: Draw) -> tuple[list[Tensor], list[Tensor]]:
    """PERP's masked adapter and ours, 60 % of the weight gone: outputs, gradients and merged weights."""
    from workbench.pruning.recovery.recovery import merge

    theirs = loaded("ZIB-IOL/PERP", "customLayers")
    weight, inputs, upstream = drawn(draw)
    mask = draw.normal(16, 32, dtype=torch.float64) > 0.25
    up, down = (draw.normal(*s, dtype=torch.float64) / 3 for s in ((16, 8), (8, 32)))
    adapter: Any = nn.Module()
    adapter.weight, adapter.bias = nn.Parameter(weight * mask, requires_grad=False), None
    adapter.lora_A, adapter.lora_B = ({"default": linear(part)} for part in (down, up))
    adapter.scaling = {"default": 1.0}
    module = theirs.MaskLoRALayer(lora_layer=adapter, dropout_p=0.0)
    x = inputs.clone().requires_grad_()
    outputs = module(x)
    learned = [adapter.lora_B["default"].weight, adapter.lora_A["default"].weight]
    found = [outputs, *torch.autograd.grad(outputs, [x, *learned], upstream)]
    module.set_effective_weights()
    mine = linear(weight)
    layer = Layer("layer", mine)
    layer.attach(Mask(mask))
    layer.attach(LowRank(up, down))
    term: Any = layer.changes[0]
    y = inputs.clone().requires_grad_()
    outputs = mine(y)
    ours = [outputs, *torch.autograd.grad(outputs, [y, term.up, term.down], upstream)]
    merge(layer)
    return [*found, adapter.weight], [*ours, layer.weight]


ADAPTER = dict(
    **source("ZIB-IOL/PERP"),
    compared="outputs, gradients of inputs, B and A, and the merged weight",
    inputs=LAYER + ", 60 % pruned, rank 8, fp64",
    tolerance=1e-12,
)


@beside("perp", kind=AUTHORS, **ADAPTER)
def perp(draw: Draw) -> tuple[Tensor, Tensor]:
    theirs, ours = masked_adapter(draw)
    return flat(theirs), flat(ours)


@beside("sparse-peft", kind=PEER, **ADAPTER)
def sparse_peft(draw: Draw) -> tuple[Tensor, Tensor]:
    """PERP's masked adapter is SparsePEFT's: the mask is where the pruned weight is not zero."""
    return perp(draw)


@beside(
    "dsee",
    peer="planted parts",
    kind=FP64,
    compared="low-rank part and support of a matrix made of both (ours stops when the rest falls by a "
    "millionth of itself)",
    inputs="a 24 x 32 matrix of rank 3 with 20 entries of size 10, fp64",
    tolerance=1e-5,
)
def low_rank_plus_sparse(draw: Draw) -> tuple[Tensor, Tensor]:
    low = draw.normal(24, 3, dtype=torch.float64) @ draw.normal(3, 32, dtype=torch.float64)
    places = draw.normal(24 * 32).topk(20).indices.sort().values
    entries = draw.normal(20, dtype=torch.float64).sign() * 10
    planted = torch.zeros(24 * 32, dtype=torch.float64).scatter(0, places, entries).view(24, 32)
    found, support, _ = side_terms.low_rank_plus_sparse(low + planted, 3, 20)
    return flat([low, places.double()]), flat([found, support.sort().values.double()])


@beside(
    "dsee",
    peer="the sum written out",
    kind=FP64,
    compared="outputs of W M + B A + S2, and the gradients of B, A and S2",
    inputs=LAYER + ", rank 8, 20 entries, fp64",
    tolerance=1e-9,
)
def dually_sparse(draw: Draw) -> tuple[Tensor, Tensor]:
    weight, inputs, upstream = drawn(draw)
    mask = weight.abs() > 0.5
    up, down, values = (draw.normal(*s, dtype=torch.float64) for s in ((16, 8), (8, 32), (20,)))
    places = draw.normal(16 * 32).topk(20).indices
    layer = Layer("layer", linear(weight))
    layer.attach(Mask(mask))
    layer.attach(side_terms.SideEntries(places, values))
    layer.attach(side_terms.SideLowRank(up, down))
    ours: dict[str, Any] = {type(change).__name__: change for change in layer.changes}
    sides = [ours["SideLowRank"].up, ours["SideLowRank"].down, ours["SideEntries"].values]
    outputs = layer.module(inputs)
    mine = [outputs, *torch.autograd.grad(outputs, sides, upstream)]
    felt = upstream.T @ inputs  # by the loss, of a change of any entry
    total = inputs @ (weight * mask).T + inputs @ down.T @ up.T
    at = [divmod(place, 32) for place in places.tolist()]
    for (row, column), value in zip(at, values, strict=True):
        total[:, row] += inputs[:, column] * value
    theirs = [total, felt @ down.T, up.T @ felt, torch.stack([felt[place] for place in at])]
    return flat(theirs), flat(mine)
