"""Trained masks and what stands beside them, beside their authors' code: forward passes, gradients, masks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tests.identity.pairs import Draw, beside
from tests.identity.pruning.given import flat, network, scores_of, subject_of
from tests.identity.repositories import absent, loaded, source
from workbench.pruning.axes import SPARSITY_SCHEDULE
from workbench.pruning.sparse_training import side_terms, trained_masks
from workbench.pruning.sparse_training.axes import MASKS
from workbench.storage.identity import AUTHORS
from workbench.subjects import Layer, LowRank, Mask

LAYER = "a 16 x 32 layer and 24 inputs, normal"


def linear(weight: Tensor) -> nn.Linear:
    """A layer without bias that has this weight."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight.clone())
    return made


def passed(module: Any, inputs: Tensor, upstream: Tensor, *given: Any) -> list[Tensor]:
    """The outputs, and the gradients of the inputs and of what learns, in the order of the parameters."""
    x = inputs.clone().requires_grad_()
    outputs = module(x, *given)
    learned = [p for p in module.parameters() if p.requires_grad]
    return [outputs, *torch.autograd.grad(outputs, [x, *learned], upstream, allow_unused=True)]


def drawn(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (16, 32), inputs (24, 32) and gradients of the outputs (24, 16), in double precision."""
    return tuple(draw.normal(*s, dtype=torch.float64) for s in ((16, 32), (24, 32), (24, 16)))  # type: ignore[return-value]


@beside(
    "movement",
    **source("huggingface/transformers-research-projects"),
    kind=AUTHORS,
    compared="weights and scores after ten steps of gradient descent on both, a quarter kept",
    inputs=LAYER + ", fp64",
    tolerance=1e-12,
)
def movement(draw: Draw) -> tuple[Tensor, Tensor]:
    theirs = loaded("huggingface/transformers-research-projects", *MOVED)
    weight, inputs, wanted = drawn(draw)
    scores = draw.normal(16, 32, dtype=torch.float64)
    masked: Any = theirs.MaskedLinear(32, 16, bias=False, pruning_method="topK")
    masked.weight.data, masked.mask_scores.data = weight.clone(), scores.clone()
    mine = linear(weight)
    layer = Layer("layer", mine)
    layer.attach(trained_masks.MovementScores(scores.clone(), sparsity=0.75))
    ours: Any = layer.changes[0]
    for _ in range(10):
        both: Any = (
            ([masked.weight, masked.mask_scores], masked(inputs, 0.25)),
            ([layer.original, ours.score], mine(inputs)),
        )
        for learned, outputs in both:
            found = torch.autograd.grad((outputs - wanted).square().mean(), learned)
            with torch.no_grad():
                for parameter, gradient in zip(learned, found, strict=True):
                    parameter -= 2.0 * gradient
    return flat([masked.weight, masked.mask_scores]), flat([layer.original, ours.score])


MOVED = ("emmental.modules.masked_nn", "movement-pruning", ("emmental", "emmental.modules"))


def block_pruning() -> Any:
    """Their module; Python 3.11 asks that a dataclass that is another's default can be hashed."""
    import dataclasses
    import functools

    hashed = functools.partial(dataclasses.dataclass, unsafe_hash=True)
    with patch.object(dataclasses, "dataclass", hashed):
        return loaded(
            "huggingface/nn_pruning",
            "nn_pruning.modules.masked_nn",
            packages=("nn_pruning", "nn_pruning.modules"),
        )


@beside(
    "block-movement",
    **source("huggingface/nn_pruning"),
    kind=AUTHORS,
    compared="outputs and the gradients of inputs, weight and scores, and the penalty, for 4 x 8 blocks and "
    "for whole rows and columns",
    inputs=LAYER + ", threshold 0.4, fp64",
    tolerance=1e-12,
)
def block_movement(draw: Draw) -> tuple[Tensor, Tensor]:
    """Theirs averages the sigmoids over a matrix's scores, ours over its weights: the same for blocks."""
    theirs = block_pruning()
    weight, inputs, upstream = drawn(draw)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for rows, columns in ((4, 8), (1, 32), (16, 1)):
        score = draw.normal(16 // rows, 32 // columns, dtype=torch.float64)
        about = theirs.LinearPruningArgs(
            method="sigmoied_threshold",
            submethod="default",
            ampere_method="disabled",
            block_rows=rows,
            block_cols=columns,
            min_elements=0.0,
        )
        context = theirs.BlockLinearPruningContextModule((16, 32), about)
        context.mask_scores = nn.Parameter(score.clone())
        module = theirs.MaskedLinear(linear(weight), [context], None, about)
        module.get_context_data = lambda name: 0.4
        found[0].extend([*passed(module, inputs, upstream), context.regularization("l1")])
        mine = linear(weight)
        gates = trained_masks.Gates(score.clone(), rows, columns, threshold=0.4)
        Layer("layer", mine).attach(gates)
        found[1].extend([*passed(mine, inputs, upstream), gates.expected((16, 32)) / weight.numel()])
    return flat(found[0]), flat(found[1])


@beside(
    "ast",
    **source("thu-ml/Adaptive-Sparse-Trainer"),
    kind=AUTHORS,
    compared="outputs, gradients of inputs, weight and block sums, and the mask after the weight has moved "
    "(without the decay, which theirs adds behind Adam's first moment and ours to the gradient)",
    inputs=LAYER + ", 2:4, 8 inputs share a number, fp64",
    tolerance=1e-12,
)
def adaptive(draw: Draw) -> tuple[Tensor, Tensor]:
    absent("wandb")
    theirs = loaded("thu-ml/Adaptive-Sparse-Trainer", "sparse_modeling")
    weight, inputs, upstream = drawn(draw)
    step = draw.normal(16, 32, dtype=torch.float64) / 2
    module = theirs.SparseLinear(32, 16, theirs.SparseLinearConfig(SLoRB_k=8), bias=False)
    module.weight.data = weight.clone()
    module.initialize()
    module.init_SLoRB()
    module.x_proj.data, module.SLoRB_Weight.data = module.x_proj.double(), module.SLoRB_Weight.double()
    module.x_proj.requires_grad_(False)
    mine = linear(weight)
    layer = Layer("layer", mine)
    mask = trained_masks.AdaptiveMask(torch.ones(32, dtype=torch.float64), "2:4")
    layer.attach(mask)
    side_terms.add_blocks(layer, mask.mask_of(weight), weight, 8)
    found = [passed(module, inputs, upstream), passed(mine, inputs, upstream)]
    for kept in (module.weight, layer.original):
        kept.data += step
    module.update_mask()
    found[0].append(module.weight.mask.double())
    found[1].append(mask.mask_of(layer.original.detach()).double())
    return flat(found[0]), flat(found[1])


@beside(
    "pst",
    **source("alibaba/AliceMind"),
    kind=AUTHORS,
    compared="outputs, gradients of inputs and of the scores' A, B, R and C (theirs lets |W| pass a gradient "
    "to the adapters as well, which ours holds still)",
    inputs=LAYER + ", half pruned, ranks 8, fp64",
    tolerance=1e-12,
)
def low_rank_scores(draw: Draw) -> tuple[Tensor, Tensor]:
    theirs = loaded("alibaba/AliceMind", "pst.sparse", root="S4/PST", packages=("pst",))
    weight, inputs, upstream = drawn(draw)
    u, v, a, b, r, c = (
        draw.normal(*s, dtype=torch.float64) / 3
        for s in ((16, 8), (8, 32), (16, 8), (8, 32), (16, 1), (1, 32))
    )
    module = theirs.SparseLinear(32, 16, bias=False)
    module.weight.data, module.weight_U.data, module.weight_V.data = weight.clone(), u.clone(), v.clone()
    module.mask_scores_A.data, module.mask_scores_B.data = a.clone(), b.clone()
    module.mask_scores_R.data, module.mask_scores_C.data = r[:, 0].clone(), c[0].clone()
    module.cur_sparsity = 0.5
    mine = linear(weight)
    layer = Layer("layer", mine)
    layer.attach(LowRank(u, v))
    scores = trained_masks.LowRankScores(a, b, r, c, sparsity=0.5)
    layer.attach(scores)
    x = inputs.clone().requires_grad_()
    names = [getattr(module, f"mask_scores_{name}") for name in "ABRC"]
    found = module(x)
    kept = mine(y := inputs.clone().requires_grad_())
    learned = [scores.left, scores.right, scores.row, scores.column]
    return (
        flat([found, *torch.autograd.grad(found, [x, *names], upstream)]),
        flat([kept, *torch.autograd.grad(kept, [y, *learned], upstream)]),
    )


@beside(
    "slope",
    **source("Mohammad-Mozaffari/slope"),
    kind=AUTHORS,
    compared="outputs with adapters and the gradients of inputs and adapters, of a weight that is 2:4 along "
    "both sides on the way back",
    inputs=LAYER + ", rank 4, fp64",
    tolerance=1e-12,
)
def double_pruned(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their pruning is a CUDA kernel, so both products get the masks that a sort by size leaves.
    Theirs divides the adapters' product by their rank, ours is given a right factor so divided.
    """
    from workbench.pruning.pattern import NM
    from workbench.pruning.sparse_training.axes import BACKWARD

    for name in ("slope.ops.addmm", "slope.ops.matvec_add", "slope.utils", "pruning_kernels.sparse_backend"):
        absent(
            name,
            addmm=None,
            matvec_add=None,
            pruner=None,
            prune_row_wise=None,
            prune_column_wise=None,
        )
    theirs = loaded("Mohammad-Mozaffari/slope", "slope.slope", packages=("slope",))
    weight, inputs, upstream = drawn(draw)
    left, right = (draw.normal(*s, dtype=torch.float64) for s in ((32, 4), (4, 16)))

    def two_of_four(matrix: Tensor) -> Tensor:
        groups = matrix.abs().unflatten(-1, (-1, 4))
        return (groups.argsort(-1).argsort(-1) >= 2).flatten(-2)

    mask = two_of_four(weight)
    sparse = weight * mask
    twice = sparse * two_of_four(sparse.T).T
    module = nn.Module()
    module.lora_left, module.lora_right = nn.Parameter(left.clone()), nn.Parameter(right.clone())
    about = {"merge_lora": False, "lora_rank": 4, "bias": None, "d_in": 32, "d_out": 16, "mask": mask}
    for name, value in about.items():
        setattr(module, name, value)
    module.weight, module.weight_t = sparse, twice.T.contiguous()
    module.forward = lambda x: theirs.slope_linear_forward(module, x)
    mine = linear(weight)
    layer = Layer("layer", mine)
    layer.attach(Mask(mask))
    layer.attach(side_terms.SideLowRank(right.T / 4, left.T))
    change: Any = layer.changes[-1]
    x = inputs.clone().requires_grad_()
    with BACKWARD.chosen("double-pruned")([layer], NM(2, 4)):
        outputs = mine(x)
        ours = torch.autograd.grad(outputs, [x, change.down, change.up], upstream)
    found = passed(module, inputs, upstream)
    return flat(found), flat([outputs, ours[0], ours[1].T, ours[2].T / 4])


@beside(
    "dsl",
    "regrow",
    **source("shuyao-wang/DSL"),
    kind=AUTHORS,
    compared="the mask after an exchange by size and gradient, where nothing given up has a large gradient "
    "(theirs may take it back at once, ours not)",
    inputs="a 32 x 40 layer, 20 % kept, 25 % of it exchanged",
    tolerance=0.0,
)
def exchange(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.pruning.sparse_training import regrow

    theirs = loaded("shuyao-wang/DSL", "core", root="MultVAE/util")
    weight, gradient = draw.normal(32, 40), draw.normal(32, 40)
    kept = weight.abs() >= weight.abs().flatten().kthvalue(1025).values
    gradient = torch.where(kept, gradient / 1000, gradient)
    layer = linear(weight * kept)
    layer.weight.grad = gradient.clone()
    masking = theirs.Masking(
        torch.optim.SGD([layer.weight], 1.0),
        death_rate=0.25,
        growth_mode="gradient",
        args=SimpleNamespace(fix=False, update_frequency=1),
    )
    masking.modules, masking.masks = [layer], {"weight": kept.float()}
    masking.truncate_weights()
    mine = linear(weight)
    ours = Layer("layer", mine)
    ours.attach(Mask(kept))
    regrow.exchange([ours], {"layer": gradient.abs()}, 0.25)
    mask = trained_masks.mask_in_force(ours)
    assert mask is not None and int((masking.masks["weight"] != kept).sum()) == 128
    return masking.masks["weight"], mask.float()


@beside(
    "dsl",
    "regrow",
    **source("shuyao-wang/DSL"),
    kind=AUTHORS,
    compared="the share exchanged at each of 21 steps, on the way down to none",
    inputs="30 % at first",
    tolerance=1e-7,
)
def exchanged_share(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their cosine ends at 0.005 unless it is told otherwise."""
    from workbench.pruning.sparse_training import regrow

    theirs = loaded("shuyao-wang/DSL", "core", root="MultVAE/util").CosineDecay(0.3, 20, eta_min=0.0)
    shares = []
    for _ in range(21):
        shares.append(theirs.get_dr())
        theirs.step()
    first = MASKS.chosen("regrow").options.exchanged
    ours = [regrow.exchanged_share(first, step, 20) for step in range(21)]
    return torch.tensor(shares, dtype=torch.float64), torch.tensor(ours, dtype=torch.float64)


@beside(
    "app",
    **source("landskape-ai/Progressive-Pruning"),
    kind=AUTHORS,
    compared="the masks of five stages by |g w| over all layers, at 0.8^n for n evenly spaced",
    inputs="a network 12-19-17-5 with 40 examples, to 90 %",
    tolerance=0.0,
)
def progressive(draw: Draw) -> tuple[Tensor, Tensor]:
    import numpy as np

    from workbench.pruning.pattern import smallest

    tools = loaded("landskape-ai/Progressive-Pruning", "tools.pruning_utils", packages=("tools",))
    layers = loaded("landskape-ai/Progressive-Pruning", "tools.layers", packages=("tools",))
    net, inputs, labels = network(draw, (12, 19, 17, 5), layers.Linear)
    last = np.log(0.1) / np.log(0.8)
    found = []
    for level in np.linspace(1, last, 5):
        pairs: list[Any] = [(m.weight_mask, m.weight) for m in net if isinstance(m, nn.Linear)]
        for mask, _ in pairs:
            mask.fill_(1.0)
        pruner = tools.SNIP(pairs)
        pruner.score(net, nn.CrossEntropyLoss(), [(inputs, labels)], "cpu")
        pruner.mask(0.8**level, "global")
        found.append(torch.cat([mask.detach().flatten() for mask, _ in pairs]).clone())
    plain, *_ = network(Draw(draw.seed), (12, 19, 17, 5))
    scores = scores_of("gradient", subject_of(plain, inputs, labels))
    shares = SPARSITY_SCHEDULE.chosen("geometric")(0.9, 5)
    ours = [~smallest(scores, round(share * len(scores))) for share in shares]
    return torch.cat(found), torch.cat(ours).float()
