"""ZipLM: the removal of structures beside its authors' code and derived a second time, and the search for a
speed-up.
"""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

from tests.identity.pairs import Draw, beside
from tests.identity.pruning.given import flat
from tests.identity.repositories import absent, loaded, source
from workbench.pruning.allocation import latency
from workbench.pruning.axes import Damped
from workbench.pruning.engine.structures import Scored
from workbench.pruning.solvers import ziplm as solver
from workbench.storage.identity import AUTHORS, FP64


@beside(
    "ziplm",
    "ziplm-minilm",
    peer="LAPACK's least squares on the inputs, for every unit that is left",
    kind=FP64,
    compared="the order in which units go, the output error after each, and the weights refitted to the "
    "three that stay longest",
    inputs="10 x 24 normal weights, 8 units of 3 columns, 120 correlated inputs, damp 0.01",
    tolerance=1e-9,
)
def one_after_the_other(draw: Draw) -> tuple[Tensor, Tensor]:
    weight = draw.normal(10, 24, dtype=torch.float64)
    x = draw.inputs(120, 24, dtype=torch.float64)
    units = torch.arange(24).reshape(8, 3)
    damp = Damped().damp
    gram = x.T @ x / len(x)
    order, errors = solver.removal_order(weight, gram, units, damp)
    kept = torch.ones(24, dtype=torch.bool)
    kept[units[order[:5]].flatten()] = False
    ours = solver.refit(weight, gram, kept, damp)
    # the damp as inputs of their own
    more = (len(x) * damp * gram.diagonal().mean()).sqrt() * torch.eye(24, dtype=torch.float64)
    rows = torch.cat([x, more]) / len(x) ** 0.5

    def refitted(left: list[int]) -> tuple[float, Tensor]:
        found, columns = torch.zeros_like(weight), units[left].flatten()
        if left:
            found[:, columns] = torch.linalg.lstsq(
                rows[:, columns], rows @ weight.T, driver="gelsd"
            ).solution.T
        return float((rows @ (weight - found).T).square().sum()), found

    left, gone, lost, wanted = list(range(8)), [], [], weight
    while left:
        trials = {u: refitted([v for v in left if v != u])[0] for u in left}
        best = min(trials, key=trials.__getitem__)
        left.remove(best)
        gone.append(float(best))
        lost.append(trials[best])
        if len(left) == 3:
            wanted = refitted(left)[1]
    theirs = torch.tensor([*gone, *lost], dtype=torch.float64)
    return torch.cat([theirs, wanted.flatten()]), torch.cat([order.double(), errors, ours.flatten()])


@beside(
    "ziplm",
    "ziplm-minilm",
    **source("IST-DASLab/DarwinLM"),
    kind=AUTHORS,
    compared="the weights after every removal, of heads and of neurons (its pruning is ZipLM's, in float32)",
    inputs="10 x 24 normal weights, 8 heads of 3 columns or 24 neurons, 120 correlated inputs, damp 0.01",
    tolerance=1e-4,
)
def darwin(draw: Draw) -> tuple[Tensor, Tensor]:
    absent("src.model_utils", get_number_of_rows_and_cols=lambda layer: layer.weight.shape)
    theirs = loaded("IST-DASLab/DarwinLM", "src.fast_obc_struct", packages=("src",))
    weight, x = draw.normal(10, 24), draw.inputs(120, 24)
    gram = (x.double().T @ x.double()) / len(x)
    wanted, found = [], []
    for width, levels in ((3, 8), (1, 24)):
        layer = torch.nn.Linear(24, 10, bias=False)
        layer.weight.data = weight.clone()
        surgeon = theirs.FastOBCStruct(layer, Damped().damp)
        surgeon.update(x)
        surgeon.is_attn = width > 1
        removed = [width * level for level in range(1, levels)]
        with patch("builtins.print"), torch.no_grad():
            wanted += surgeon.prune_struct(removed, removed, width)
        units = torch.arange(24).reshape(levels, width)
        order, _ = solver.removal_order(weight.double(), gram, units, Damped().damp)
        for level in range(1, levels):
            kept = torch.ones(24, dtype=torch.bool)
            kept[units[order[:level]].flatten()] = False
            found.append(solver.refit(weight.double(), gram, kept, Damped().damp))
    return flat(wanted), flat(found)


@beside(
    "latency",
    "ziplm-minilm",
    peer="every choice tried",
    kind=FP64,
    compared="the units that each group loses, and their summed relative cost, at the least cost that is "
    "twice as fast by the table",
    inputs="3 groups of 4 heads and 3 of 32 neurons at 9 levels, a table in steps of a 400th of the saving",
    tolerance=1e-12,
)
def fast_enough(draw: Draw) -> tuple[Tensor, Tensor]:
    dense, speedup = 1.0, 2.0
    step = dense * (1 - 1 / speedup) / 400  # what the search counts in
    sizes = {"heads": 4, "neurons": 32}
    removed = {kind: latency.levels(SimpleNamespace(units=n, experts=1)) for kind, n in sizes.items()}  # type: ignore[arg-type]
    savings = {}
    for kind, counts in removed.items():
        gains = draw.normal(len(counts) - 1, dtype=torch.float64).abs() * 260 / len(counts)
        savings[kind] = [0, *(gains.cumsum(0).ceil() + 1).int().tolist()]
    seconds = {kind: [dense - 3 * (s + 1e-6) * step for s in found] for kind, found in savings.items()}
    for kind in seconds:
        seconds[kind][0] = dense
    table = latency.LatencyTable(dense, removed, seconds, dict.fromkeys(sizes, 3))
    scored, options = [], []
    for kind, units in sizes.items():
        for number in range(3):
            cost = torch.cat([torch.zeros(1), draw.normal(units).abs().cumsum(0)]).double()
            group = SimpleNamespace(name=f"{kind}{number}", kind=kind, units=units, experts=1)
            scored.append(Scored(group, torch.arange(units)[None], cost))  # type: ignore[arg-type]
            options.append(
                [(n, s, float(cost[n] / cost[-1])) for n, s in zip(removed[kind], savings[kind], strict=True)]
            )
    ours = latency.choose(scored, table, speedup)
    best = min(
        (choice for choice in product(*options) if sum(saved for _, saved, _ in choice) >= 400),
        key=lambda choice: sum(cost for *_, cost in choice),
    )
    spent = sum(float(s.cost[n] / s.cost[-1]) for s, n in zip(scored, ours, strict=True))
    theirs = [*(float(n) for n, *_ in best), sum(cost for *_, cost in best)]
    return torch.tensor(theirs, dtype=torch.float64), torch.tensor([*ours, spent], dtype=torch.float64)
