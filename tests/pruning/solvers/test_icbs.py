from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch

import workbench
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.pruning.solvers import icbs
from workbench.statistics import StackedGradients


def problem(n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return a.T @ a / m, torch.randn(n, generator=generator, dtype=torch.float64) / 4


@pytest.mark.parametrize("seed", range(6))
def test_twelve_weights_reach_the_brute_force_optimum(seed):
    q, linear = problem(12, 30, seed)
    start = torch.tensor([1.0] * 6 + [0.0] * 6, dtype=torch.float64)
    best = min(
        float(
            icbs.objective(
                q, linear, torch.zeros(12, dtype=torch.float64).index_fill(0, torch.tensor(c), 1.0)
            )
        )
        for c in combinations(range(12), 6)
    )
    descent = icbs.swap_descent(q, linear, start)
    assert float(icbs.objective(q, linear, descent)) <= float(icbs.objective(q, linear, start))
    found = icbs.solve_block(q, linear, start, 8, torch.Generator().manual_seed(0))
    assert found.sum() == 6 and float(icbs.objective(q, linear, found)) == pytest.approx(best, abs=1e-9)


def test_refinement_never_raises_the_predicted_loss_and_keeps_the_count():
    torch.manual_seed(0)
    weight, g = torch.randn(6, 20), torch.randn(50, 6, 20)
    scores = weight.abs()
    mask = scores > scores.median()
    damp = 0.01

    def q(mask):
        gone = (weight * ~mask).double()
        along = torch.einsum("kri,ri->k", g.double(), gone)
        return float(damp * gone.square().sum() / 2 + along.square().mean() / 2)

    new, values = icbs.refine(weight, mask, scores, StackedGradients(g), damp, block=30, candidates=120)
    assert int(new.sum()) == int(mask.sum())
    assert all(b <= a + 1e-9 for a, b in pairwise(values)) and values[0] <= q(mask) + 1e-6
    assert q(new) == pytest.approx(values[-1], rel=1e-4)


def test_icbs_starts_from_wanda_and_lowers_the_loss():
    vit = workbench.subject("digits-vit")
    fields = {
        "sparsity": 0.4,
        "predict_examples": 0,
        "test_split": "validation",
    }
    wanda = Prune(method="wanda", **fields).run(vit, Progress(), cache=False).facts
    settings = {"name": "icbs", "gradients": 64, "damp": 1.0}
    refined = Prune(method=settings, **fields).run(vit, Progress(), cache=False).facts
    assert refined["sparsity"] == wanda["sparsity"] and refined["loss"] < wanda["loss"]


def test_more_starts_find_a_lower_quadratic_and_are_options_of_the_method():
    vit = workbench.subject("digits-vit")
    found = {}
    for restarts in (0, 2):
        method = {"name": "icbs", "gradients": 64, "damp": 1.0, "restarts": restarts, "candidates": 200}
        result = Prune(method=method, sparsity=0.5, predict_examples=0, layers="*fc1").run(
            vit, Progress(), cache=False
        )
        found[restarts] = result.subject
    masks = [torch.cat([(layer.weight == 0).flatten() for layer in found[r].layers("*fc1")]) for r in found]
    assert masks[0].sum() == masks[1].sum() and not torch.equal(*masks)
