"""What learns: which of a subject's parameters get gradients.

all        everything
body       everything but the embeddings
adapters   low-rank terms, biases, norms (Zimmer et al. 2023) and whatever a change on a weight brought with
           it
half       in every block half of the attention matrices, half of the feed-forward matrices and half of the
           norms, drawn anew for every stage (Hui et al. 2024, HFT); everything outside the blocks
blocks     the blocks that are named and the head: whatever comes after the last block (Kaplun et al. 2023,
           SubTuning)
head       the head alone
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from workbench.errors import BadInput
from workbench.subjects import Change, Subject, all_layers, blocks
from workbench.values import number_of

TRAINABLE = ("all", "body", "adapters", "half", "blocks", "head")


def embedding_parameters(model: nn.Module) -> set[int]:
    return {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
    }


def set_trainable(on: Subject, kind: str, chosen: Sequence[int] = (), seed: int = 0) -> list[nn.Parameter]:
    """Let exactly the parameters of a kind learn; returns them in the model's order.

    chosen : indices of blocks, for kind `blocks`. seed : of the draw, for kind `half`.
    """
    embeddings = embedding_parameters(on.model)
    inside = {id(p): index for index, (_, block) in enumerate(blocks(on.model)) for p in block.parameters()}
    frozen = frozen_half(on, seed) if kind == "half" else set()
    added = {id(p) for m in on.model.modules() if isinstance(m, Change) for p in m.parameters()}
    learning, past = [], False
    for name, parameter in on.model.named_parameters():
        past = past or inside.get(id(parameter)) == max(inside.values(), default=-1)
        if kind == "adapters":
            learns = id(parameter) in added or name.endswith("bias") or parameter.ndim == 1
        elif kind in ("blocks", "head"):
            learns = inside[id(parameter)] in chosen if id(parameter) in inside else past
        else:
            learns = id(parameter) not in frozen
        learns = learns and (kind in ("all", "half") or id(parameter) not in embeddings)
        parameter.requires_grad_(learns)
        if learns:
            learning.append(parameter)
    return learning


def modules_by_category(block: nn.Module) -> dict[str, list[nn.Module]]:
    """A block's modules that hold weights: attention matrices, feed-forward matrices and norms, in order."""
    found: dict[str, list[nn.Module]] = {"attention": [], "feed-forward": [], "norms": []}
    matrices = {id(layer.module) for layer in all_layers(block)}
    for name, module in block.named_modules():
        own = list(module.parameters(recurse=False))
        if id(module) in matrices:
            attention = any(part in name.lower() for part in ("att", "q_proj", "k_proj", "v_proj", "o_proj"))
            found["attention" if attention else "feed-forward"].append(module)
        elif own and all(p.ndim == 1 for p in own):
            found["norms"].append(module)
    return found


def frozen_half(on: Subject, seed: int) -> set[int]:
    """Ids of the parameters of the half that rests. A category of odd size freezes the smaller half in one
    block, the larger in the next.
    """
    generator = torch.Generator().manual_seed(seed)
    resting: set[int] = set()
    found = blocks(on.model)
    if not found:
        raise BadInput(
            f"trainable: half is drawn inside repeated blocks and {type(on.model).__name__} has none; "
            "use all or adapters"
        )
    for index, (_, block) in enumerate(found):
        for modules in modules_by_category(block).values():
            order = torch.randperm(len(modules), generator=generator).tolist()
            for place in order[: (len(modules) + index % 2) // 2]:
                resting |= {id(p) for p in modules[place].parameters()}
    return resting


def parse_blocks(text: str, count: int) -> tuple[int, ...]:
    """'0,2' -> (0, 2); `BadInput` when a block is not there."""
    found = [number_of(part.strip(), "blocks") for part in text.split(",") if part.strip()]
    chosen = tuple(sorted({number for number in found if isinstance(number, int)}))
    if not all(isinstance(number, int) for number in found):
        raise BadInput(
            f"blocks: {text!r} is not accepted; give numbers of blocks separated by commas, 0 to {count - 1}"
        )
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise BadInput(f"blocks: {text!r} is not accepted; this model's blocks are 0 to {count - 1}")
    return chosen
