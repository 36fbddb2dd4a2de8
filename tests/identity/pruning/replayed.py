"""Runs of sparse training and of a choice of blocks, trained a second time by a loop written out here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import combinations
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.identity.pairs import Draw, beside
from tests.identity.pruning.given import network, subject_of
from tests.identity.pruning.own_model import Blocks
from tests.identity.pruning.small_models import llama
from tests.identity.repositories import absent, loaded, source
from workbench.pruning.sparse_training.train_sparse import TrainSparse
from workbench.storage.identity import AUTHORS, FP64, PEER
from workbench.subjects import Subject

LOOP = "AdamW, its cosine and the clipping written out, on the batches of our run"
STEPS, RATE, BATCH = 8, 0.01, 16
Again = Callable[..., None]


@contextmanager
def trained_on() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The batches that runs take while entered, in turn."""
    seen: list[tuple[Tensor, Tensor]] = []
    plain = Subject.loss

    def loss(on: Subject, batch: Any) -> Tensor:
        seen.append((batch["inputs"].clone(), batch["labels"].clone()))
        return plain(on, batch)

    with patch.object(Subject, "loss", loss):
        yield seen


def trained_again(
    net: nn.Module,
    rest: dict[str, Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    learning: dict[str, Tensor],
    masks: dict[str, Tensor],
) -> None:
    """AdamW without decay (betas 0.9 and 0.999) on gradients that are clipped to a norm of one; a masked
    weight is zero in the forward pass, and what the mask removes has no gradient. `rest` stays as it is.
    """
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in learning.items()}
    for step, (inputs, labels) in enumerate(batches, start=1):
        leaves = {n: p.detach().clone().requires_grad_() for n, p in learning.items()}
        seen = {n: p * masks[n] if n in masks else p for n, p in leaves.items()}
        loss = F.cross_entropy(torch.func.functional_call(net, {**rest, **seen}, (inputs,)), labels)
        grown = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = math.sqrt(sum(float((g * g).sum()) for g in grown.values()))
        rate = RATE * (1 + math.cos(math.pi * (step - 1) / len(batches))) / 2
        for name, gradient in grown.items():
            gradient = gradient * min(1.0, 1.0 / (norm + 1e-6))
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient**2)
            size = (second / (1 - 0.999**step)).sqrt() + 1e-8
            learning[name].sub_(rate * first / (1 - 0.9**step) / size)


def trained_by_torch(
    net: nn.Module,
    rest: dict[str, Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    learning: dict[str, Tensor],
    masks: dict[str, Tensor],
) -> None:
    """The same with torch's pruning, optimizer, schedule and clipping."""
    from torch.nn.utils import clip_grad_norm_, prune

    mine = deepcopy(net)
    mine.load_state_dict({**rest, **learning})
    modules = {name: mine.get_submodule(name.rpartition(".")[0]) for name in masks}
    for name, mask in masks.items():
        prune.custom_from_mask(modules[name], "weight", mask)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for inputs, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(mine(inputs), labels).backward()
        clip_grad_norm_(mine.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    for module in modules.values():
        prune.remove(module, "weight")
    for name, parameter in mine.named_parameters():
        learning[name].copy_(parameter.detach())


def sparse_then_dense(draw: Draw, method: str, again: Again) -> tuple[Tensor, Tensor]:
    """Weights after a sparse run, and after a dense one that starts from it with its mask lifted."""
    net, inputs, labels = network(draw, (12, 20, 16, 5))
    inputs, model = inputs.double(), net.double()
    mine = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings: dict[str, Any] = {
        "layers": "*",
        "steps": STEPS,
        "learning_rate": RATE,
        "batch_size": BATCH,
    }
    on = subject_of(model, inputs, labels)
    with trained_on() as first:
        sparse = TrainSparse(method=method, sparsity=0.75, **settings).run(on, cache=False).subject
    assert sparse is not None
    layers = sparse.layers("*")
    masks = {f"{layer.name}.weight": (layer.weight != 0).double() for layer in layers}
    found = [layer.weight.detach().clone() for layer in layers]
    with trained_on() as second:
        dense = TrainSparse(method="dense", masks="lifted", **settings).run(sparse, cache=False).subject
    assert dense is not None
    found += [layer.weight.detach() for layer in dense.layers("*")]
    assert all(abs(float(mask.mean()) - 0.25) < 0.01 for mask in masks.values())
    again(model, {}, first, mine, masks)
    for name, mask in masks.items():
        mine[name].mul_(mask)
    wanted = [mine[name].clone() for name in masks]
    again(model, {}, second, mine, {})
    wanted += [mine[name] for name in masks]
    return torch.cat([w.flatten() for w in wanted]), torch.cat([w.flatten() for w in found])


SPARSE = dict(
    peer=LOOP,
    kind=FP64,
    compared="the weights after 8 sparse steps under our random mask, and after 8 dense ones from there",
    inputs="a network 12-20-16-5 with 40 examples, 75 % masked, fp64",
    tolerance=1e-9,
)


@beside("spdf", **SPARSE)
def spdf(draw: Draw) -> tuple[Tensor, Tensor]:
    return sparse_then_dense(draw, "spdf", trained_again)


@beside("mediswift", **SPARSE)
def mediswift(draw: Draw) -> tuple[Tensor, Tensor]:
    return sparse_then_dense(draw, "mediswift", trained_again)


TORCH = SPARSE | {"peer": "torch", "kind": PEER}


@beside("spdf", **TORCH)
def spdf_of_torch(draw: Draw) -> tuple[Tensor, Tensor]:
    return sparse_then_dense(draw, "spdf", trained_by_torch)


@beside("mediswift", **TORCH)
def mediswift_of_torch(draw: Draw) -> tuple[Tensor, Tensor]:
    return sparse_then_dense(draw, "mediswift", trained_by_torch)


@beside(
    "subtuning",
    peer=LOOP,
    kind=FP64,
    compared="the validation loss of the head alone and of each set of blocks tried, and which are chosen",
    inputs="a network of 3 blocks of width 16 with 60 examples and as many others, fp64",
    seed=2,
    tolerance=1e-6,
)
def subtuning(draw: Draw) -> tuple[Tensor, Tensor]:
    result, tried = tuned(draw)
    chosen: tuple[int, ...] = ()
    while len(chosen) < 3:
        best = min(
            (b for b in tried if len(b) == len(chosen) + 1 and {*chosen} < {*b}), key=tried.__getitem__
        )
        if tried[best] > tried[chosen]:
            break
        chosen = best
    rows = [
        tuple(int(b) for b in str(name).split(",")) if name != "head" else () for name in result.table.blocks
    ]
    named = ",".join(map(str, chosen)) or "head"
    wanted = [*(tried[blocks] for blocks in rows), float(named == result.facts["chosen"])]
    found = [*result.table.loss, 1.0]
    return torch.tensor(wanted, dtype=torch.float64), torch.tensor(found, dtype=torch.float64)


@beside(
    "subtuning",
    **source("talswisa/SubTuning"),
    kind=AUTHORS,
    compared="the blocks that their greedy search chooses, of trainings written out here",
    inputs="a network of 3 blocks of width 16 with 60 examples and as many others, fp64",
    seed=2,
    tolerance=0.0,
)
def greedy_search(draw: Draw) -> tuple[Tensor, Tensor]:
    """Theirs looks for the largest value: e^-loss."""
    result, tried = tuned(draw)
    absent("src.train", train=lambda asked: math.exp(-tried[tuple(sorted(asked.model.layers_to_finetune))]))
    absent("src.models", MODEL_LAYERS={})
    theirs = loaded("talswisa/SubTuning", "src.greedy_subset_selection", packages=("src",))
    asked = SimpleNamespace(model=SimpleNamespace(layers_to_finetune=[]))
    wanted = theirs.GreedySubsetSearch([0, 1, 2], 0.0, asked, start="non").search()
    chosen = result.facts["chosen"]
    found = [] if chosen == "head" else [int(block) for block in chosen.split(",")]
    return (torch.tensor([float(b in blocks) for b in range(3)]) for blocks in (wanted, found))  # type: ignore[return-value]


def tuned(draw: Draw) -> tuple[Any, dict[tuple[int, ...], float]]:
    """Our run, and the validation loss of every set of blocks, trained again."""
    import workbench
    from workbench.pruning.studies.subtune import Subtune

    model = Blocks()
    for parameter in model.parameters():
        parameter.data = draw.normal(*parameter.shape, dtype=torch.float64) / 8
    splits = {
        name: {
            "inputs": draw.normal(60, 12, dtype=torch.float64),
            "labels": draw.normal(60, 5).argmax(-1),
        }
        for name in ("train", "validation", "test")
    }
    on = workbench.subject(model, data=splits)
    settings = {"steps": STEPS, "batch_size": BATCH, "learning_rate": RATE, "gain": 0.0, "most": 3}
    with trained_on() as batches:
        result = Subtune(**settings).run(on, cache=False)
    judged = splits["validation"]
    start = {n: p.detach().clone() for n, p in model.named_parameters()}

    def loss(blocks: tuple[int, ...]) -> float:
        learned = ("head.", *(f"blocks.{b}." for b in blocks))
        mine = {n: p.clone() for n, p in start.items()}
        learning = {n: p for n, p in mine.items() if n.startswith(learned)}
        trained_again(model, start, batches[:STEPS], learning, {})
        outputs = torch.func.functional_call(model, mine, (judged["inputs"],))
        return float(F.cross_entropy(outputs, judged["labels"]))

    sets = (blocks for size in range(4) for blocks in combinations(range(3), size))
    return result, {blocks: loss(blocks) for blocks in sets}


@beside(
    "hft",
    peer="counted by hand",
    kind=FP64,
    compared="how many matrices of attention and feed-forward, and norms, have moved in each block: half, "
    "the odd one in every other block; and that everything outside the blocks has",
    inputs="a Llama of 3 blocks (4 + 3 matrices and 2 norms each), two steps",
    tolerance=0.0,
)
def half_fine_tuning(draw: Draw) -> tuple[Tensor, Tensor]:
    on = llama(draw)
    before = {n: p.detach().clone() for n, p in on.model.named_parameters()}
    result = TrainSparse(method="hft", steps=2, batch_size=4).run(on, cache=False)
    assert result.subject is not None
    moved = {n: bool((p != before[n]).any()) for n, p in result.subject.model.named_parameters()}
    found = [
        sum(moved[name] for name in moved if f"layers.{block}." in name and part in name)
        for block in range(3)
        for part in ("self_attn", "mlp.", "layernorm")
    ]
    outside = [moved[name] for name in moved if ".layers." not in name]
    return torch.tensor([2, 2, 1, 2, 1, 1, 2, 2, 1, 1]), torch.tensor([*found, all(outside)])
