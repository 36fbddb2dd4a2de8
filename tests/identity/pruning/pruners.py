"""Scores and masks of single weights beside their authors' code and others', and derived a second time."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.identity.pairs import Draw, beside
from tests.identity.pruning.given import (
    doubles,
    layer_of,
    measured_as,
    network,
    scores_of,
    subject_of,
)
from tests.identity.repositories import absent, loaded, source
from workbench.pruning.axes import COMPENSATION, PRUNING_METHOD, SALIENCY, SPARSITY_SCHEDULE
from workbench.statistics import StackedGradients
from workbench.storage.identity import AUTHORS, FP64, PEER

# ---- oBERT -------------------------------------------------------------------------------------------------
BLOCKS = "4 x 100 normal weights, 64 normal gradients, blocks of 50, damp 0.05, fp64"


def obert_of_the_authors() -> Any:
    """SparseML's file, which its authors wrote; what else it imports is no part of the scores."""
    parts = "sparseml.pytorch.sparsification"
    same = lambda *a, **k: lambda found: found  # noqa: E731
    absent(f"{parts}.modifier", ModifierProp=lambda: property, PyTorchModifierYAML=same)
    absent(f"{parts}.pruning.mask_creator", PruningMaskCreator=object, get_mask_creator_default=None)
    absent(f"{parts}.pruning.modifier_pruning_base", BaseGradualPruningModifier=object)
    absent(f"{parts}.pruning.scorer", PruningParamsGradScorer=object)
    absent("sparseml.pytorch.utils", MEMORY_BOUNDED="", GradSampler=object)
    absent("sparseml.pytorch.utils.logger", BaseLogger=object)
    absent("sparseml.utils", interpolate=None)
    packages = ("sparseml", "sparseml.pytorch", parts, f"{parts}.pruning")
    return loaded(
        "neuralmagic/sparseml", f"{parts}.pruning.modifier_pruning_obs", root="src", packages=packages
    )


def obert_pair(draw: Draw) -> tuple[Tensor, Tensor, Any, Any, Any]:
    """weight, gradients, their scorer with the gradients in it, and what our entries are given."""
    theirs = obert_of_the_authors()
    weight = draw.normal(4, 100, dtype=torch.float64)
    gradients = draw.normal(64, 4, 100, dtype=torch.float64)
    with doubles():
        inverse = theirs.EmpiricalBlockFisherInverse(64, 50, 400, 0.05, torch.device("cpu"))
        for gradient in gradients:
            inverse.add_grad(gradient.flatten())
    scorer = SimpleNamespace(
        _params=[nn.Parameter(weight.clone())],
        _finvs=[inverse],
        _masks=[torch.ones_like(weight)],
        _devices=[torch.device("cpu")],
        _eps=torch.finfo(torch.float32).eps,
        _mask_type="unstructured",
        _is_main_proc=True,
        _broadcast_list_from_main=lambda values: None,
    )
    return (
        weight,
        gradients,
        scorer,
        theirs.OBSPruningParamsScorer,
        measured_as(StackedGradients(gradients), 0.05),
    )


OBERT = dict(**source("neuralmagic/sparseml"), kind=AUTHORS, inputs=BLOCKS)


@beside(
    "obert",
    "obert-minilm",
    compared="the saliencies of all weights (theirs adds 1e-7 to the inverse's diagonal)",
    tolerance=1e-6,
    **OBERT,
)
def obert_scores(draw: Draw) -> tuple[Tensor, Tensor]:
    weight, _, scorer, made, calibration = obert_pair(draw)
    ours = SALIENCY.chosen("fisher")(layer_of(weight), calibration, None)
    return made.score_parameters(scorer)[0], ours


@beside(
    "obert",
    "obert-minilm",
    compared="the weights updated for the cheapest one of each block (for several of a block theirs adds up "
    "their single updates, ours solves for all of them, eq. 4)",
    tolerance=1e-6,
    **OBERT,
)
def obert_update(draw: Draw) -> tuple[Tensor, Tensor]:
    weight, _, scorer, made, calibration = obert_pair(draw)
    gone = made.score_parameters(scorer)[0].reshape(8, 50).argmin(1)
    mask = torch.ones(8, 50).scatter(1, gone[:, None], 0.0).reshape(4, 100)
    made.mask_update(scorer, [mask], [mask - 1])
    ours = COMPENSATION.chosen("fisher")(layer_of(weight), mask.bool(), calibration)
    return scorer._params[0], ours


@beside(
    "obert-greedy",
    **source("IST-DASLab/OBC"),
    kind=AUTHORS,
    compared="the cost at which each weight goes, a running maximum (theirs in float32)",
    inputs="6 x 24 normal weights, one block a row, 60 gradients that all rows share",
    tolerance=1e-4,
)
def obert_greedy(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their exact brain surgeon on a layer whose Hessian is the block's Fisher matrix."""
    theirs = loaded("IST-DASLab/OBC", "trueobs")
    layer = nn.Linear(24, 6, bias=False)
    layer.weight.data = draw.normal(6, 24)
    row = draw.normal(60, 24, dtype=torch.float64)
    surgeon = theirs.TrueOBS(layer)
    surgeon.H = row.T @ row / 60 + 0.05 * torch.eye(24, dtype=torch.float64)
    with patch("torch.cuda.synchronize"), patch("builtins.print"), torch.no_grad():
        surgeon.prepare_unstr(parallel=6)
    (trace,) = surgeon.Traces  # (removals, rows, columns)
    removal = (trace != 0).sum(0)  # at which one a weight went: it is in as many traces before
    costs = surgeon.Losses.cummax(1).values.gather(1, removal)
    gradients = row[:, None].expand(60, 6, 24)
    calibration = measured_as(StackedGradients(gradients), 0.05)
    ours = SALIENCY.chosen("fisher-greedy")(layer_of(layer.weight.detach().double()), calibration, None)
    return costs, ours


# ---- scores of the first and second order ------------------------------------------------------------------
@beside(
    "snip",
    "gradient",
    **source("ganguli-lab/Synaptic-Flow"),
    kind=PEER,
    compared="|g w| as shares of their sum, from our factored gradients of each example",
    inputs="a network 12-20-16-5 with 40 examples",
    tolerance=1e-7,
)
def snip(draw: Draw) -> tuple[Tensor, Tensor]:
    pruners = loaded("ganguli-lab/Synaptic-Flow", "Pruners.pruners")
    layers = loaded("ganguli-lab/Synaptic-Flow", "Layers.layers")
    net, inputs, labels = network(draw, (12, 20, 16, 5), layers.Linear)
    pruner = pruners.SNIP([(m.weight_mask, m.weight) for m in net if isinstance(m, nn.Linear)])
    pruner.score(net, nn.CrossEntropyLoss(), [(inputs, labels)], "cpu")
    theirs = torch.cat([score.flatten() for score in pruner.scores.values()])
    plain, *_ = network(Draw(draw.seed), (12, 20, 16, 5))
    ours = scores_of("gradient", subject_of(plain, inputs, labels))
    return theirs, ours / ours.sum()


@beside(
    "obd",
    peer="the loss's own gradients, example by example",
    kind=FP64,
    compared="w^2 E[g^2] / 2 as a share of the largest (ours from factored gradients in float32)",
    inputs="a network 12-20-16-5 with 40 examples",
    tolerance=1e-6,
)
def obd(draw: Draw) -> tuple[Tensor, Tensor]:
    """Half the mean over examples of the squared derivative of the loss as w is scaled."""
    net, inputs, labels = network(draw, (12, 20, 16, 5))
    ours = scores_of("obd", subject_of(net, inputs, labels))
    weights = {n: p.detach().double() for n, p in net.double().named_parameters()}
    scales = {n: torch.ones_like(p) for n, p in weights.items() if n.endswith("weight")}

    def loss(scale: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        scaled = {n: p * scale[n] if n in scale else p for n, p in weights.items()}
        return F.cross_entropy(torch.func.functional_call(net, scaled, (x[None],)), label[None])

    grown = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(scales, inputs.double(), labels)
    theirs = torch.cat([(g**2).mean(0).flatten() / 2 for g in grown.values()])
    return theirs / theirs.max(), ours / ours.max()


@beside(
    "icbs",
    **source("amazon-science/icbs"),
    kind=AUTHORS,
    compared="the mask and the predicted loss of the best exchange (theirs tries every mask)",
    inputs="a 4 x 4 layer, half of it to go, 40 normal gradients, damp 0.5, fp64",
    tolerance=1e-9,
)
def icbs(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.pruning.solvers import icbs as solver

    absent("bitarray", bitarray=None)
    problems = loaded("amazon-science/icbs", "icbs.problem", root="src", packages=("icbs",))
    solvers = loaded("amazon-science/icbs", "icbs.solvers", root="src", packages=("icbs",))
    weight = draw.normal(4, 4, dtype=torch.float64)
    gradients = draw.normal(40, 4, 4, dtype=torch.float64)
    flat, g = weight.flatten(), gradients.flatten(1)
    hessian = g.T @ g / 40 + 0.5 * torch.eye(16, dtype=torch.float64)
    with doubles():
        problem = problems.Problem(hessian * flat * flat[:, None] / 2, 8)
        gone, loss = solvers.ExhaustiveSolver().solve(problem)
    scores = weight.abs()
    mask = scores > scores.flatten().kthvalue(8).values
    options: Any = PRUNING_METHOD["icbs"].options()
    kept, losses = solver.refine(
        weight,
        mask,
        scores,
        StackedGradients(gradients),
        0.5,
        block=options.block,
        candidates=options.candidates,
        rounds=options.rounds,
        restarts=options.restarts,
        slope=options.slope,
    )
    theirs = torch.cat([1 - gone.flatten(), torch.tensor([loss], dtype=torch.float64)])
    return theirs, torch.cat([kept.flatten().double(), torch.tensor(losses[-1:], dtype=torch.float64)])


# ---- shares and schedules ----------------------------------------------------------------------------------
@beside(
    "magnitude-global",
    peer="torch",
    kind=PEER,
    compared="the weights with half pruned by global_unstructured over all layers",
    inputs="a network 12-20-16-5",
    tolerance=0.0,
)
def magnitude_global(draw: Draw) -> tuple[Tensor, Tensor]:
    from torch.nn.utils import prune

    from workbench.pruning import Prune

    net, inputs, labels = network(draw, (12, 20, 16, 5))
    on = subject_of(net, inputs, labels)
    result = Prune(method="magnitude", allocation="global", layers="*").run(on, cache=False)
    assert result.subject is not None
    found = [layer.weight.detach().flatten() for layer in result.subject.layers("*")]
    mine, *_ = network(Draw(draw.seed), (12, 20, 16, 5))
    layers = [(m, "weight") for m in mine if isinstance(m, nn.Linear)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.5)
    return torch.cat([m.weight.detach().flatten() for m, _ in layers]), torch.cat(found)


@beside(
    "erdos-renyi",
    **source("Shiweiliuiiiiiii/In-Time-Over-Parameterization"),
    kind=PEER,
    compared="the densities of the layers, two of which come out dense",
    inputs="four layers of 4 x 30 to 300 x 400, 40 % dense in all",
    tolerance=1e-12,
)
def erdos_renyi(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their densities are read where they draw masks from them."""
    from workbench.pruning.allocation.shares import ErdosRenyi

    theirs = loaded("Shiweiliuiiiiiii/In-Time-Over-Parameterization", "sparselearning.core")
    shapes = ((4, 30), (300, 400), (20, 50), (200, 100))
    seen: list[float] = []

    class Drawn:
        def __init__(self, shape: Sequence[int]) -> None:
            self.shape = shape

        def __lt__(self, density: float) -> Tensor:
            seen.append(float(density))
            return torch.ones(self.shape, dtype=torch.bool)

    masking = SimpleNamespace(
        masks={str(n): torch.zeros(shape) for n, shape in enumerate(shapes)}, apply_mask=lambda: None
    )
    with (
        patch.object(theirs.torch, "rand", Drawn),
        patch.object(Tensor, "cuda", lambda kept: kept),
        patch("builtins.print"),
    ):
        theirs.Masking.init(masking, "ERK", density=0.4)
    layers = [SimpleNamespace(name=str(n), shape=s, original=torch.empty(s)) for n, s in enumerate(shapes)]
    ours = ErdosRenyi.shares(layers, {}, None, 0.6, None)  # type: ignore[arg-type]
    draw.shapes = [list(shape) for shape in shapes]
    return torch.tensor(seen, dtype=torch.float64), 1 - torch.tensor(list(ours.values()), dtype=torch.float64)


@beside(
    "gradual-magnitude",
    "cubic",
    peer="torch",
    kind=PEER,
    compared="the sparsity after each of six events by torch.ao.pruning.CubicSL",
    inputs="0 to 90 %",
    tolerance=1e-12,
)
def cubic(draw: Draw) -> tuple[Tensor, Tensor]:
    from torch.ao.pruning import CubicSL

    theirs = [CubicSL.sparsity_compute_fn(0.0, 0.9, t, 0, 1, 6) for t in range(1, 7)]
    ours = SPARSITY_SCHEDULE.chosen({"name": "cubic", "events": 6})(0.9, 1)
    return torch.tensor(theirs, dtype=torch.float64), torch.tensor(ours, dtype=torch.float64)


@beside(
    "recovery-minilm",
    **source("neuralmagic/sparseml"),
    kind=AUTHORS,
    compared="the sparsity after each of the four events of gradual oBERT",
    inputs="0 to 80 %",
    tolerance=1e-12,
)
def gradual_obert(draw: Draw) -> tuple[Tensor, Tensor]:
    absent("sparsezoo", Model=None)
    absent("sparsezoo.utils", load_numpy_list=None)
    packages = ("sparseml", "sparseml.utils")
    helpers = loaded("neuralmagic/sparseml", "sparseml.utils.helpers", root="src", packages=packages)
    theirs = [helpers.interpolate(t, 0, 4, 0.0, 0.8, "cubic") for t in range(1, 5)]
    ours = SPARSITY_SCHEDULE.chosen({"name": "cubic", "events": 4})(0.8, 1)
    return torch.tensor(theirs, dtype=torch.float64), torch.tensor(ours, dtype=torch.float64)


# ---- compensation ------------------------------------------------------------------------------------------
@beside(
    "least-squares",
    peer="LAPACK's least squares on the inputs, row by row",
    kind=FP64,
    compared="the weights refitted to the dense outputs (ours by conjugate gradients to 1e-6)",
    inputs="16 x 32 normal weights, 60 % gone at random, 256 correlated inputs, damp 0.01",
    tolerance=1e-5,
)
def least_squares(draw: Draw) -> tuple[Tensor, Tensor]:
    weight, x = draw.normal(16, 32, dtype=torch.float64), draw.inputs(256, 32, dtype=torch.float64)
    mask = draw.normal(16, 32, dtype=torch.float64) > 0.25
    gram = x.T @ x / len(x)
    ours = COMPENSATION.chosen("least-squares")(layer_of(weight), mask, measured_as(gram=gram))
    # the damp as rows of inputs of their own, which the refit has to leave alone as well
    more = (len(x) * 0.01 * gram.diagonal().mean()).sqrt() * torch.eye(32, dtype=torch.float64)
    rows = torch.cat([x, more])
    theirs = torch.zeros_like(weight)
    for r, kept in enumerate(mask):
        theirs[r, kept] = torch.linalg.lstsq(rows[:, kept], rows @ weight[r], driver="gelsd").solution
    return theirs, ours
