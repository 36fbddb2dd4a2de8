from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from workbench import BadInput
from workbench.evidence.oracles.exact import best_subset, obs_path
from workbench.pruning.pattern import NM, obeys
from workbench.pruning.solvers import obs
from workbench.statistics.damping import damped


def case(out=6, width=20, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(out, width, generator=generator, dtype=torch.float64), inputs.T @ inputs / tokens


def error(weight, new, gram):
    return obs.output_error(new - weight, weight, gram)


def reference_sweep(weight, gram, damp, mask):
    """SparseGPT's recursion written directly: one column at a time,
    the inverse Hessian downdated by elimination.
    """
    hessian = damped(gram, damp)
    inverse = torch.linalg.inv(hessian)
    w = weight.clone()
    for j in range(weight.shape[1]):
        delta = torch.where(mask[:, j], 0, w[:, j])
        w -= torch.outer(delta / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1
    return w * mask


def test_sweep_with_a_given_mask_equals_the_recursion_whatever_the_block_sizes():
    weight, gram = case()
    mask = torch.rand(weight.shape) < 0.5
    want = reference_sweep(weight, gram, 0.01, mask)
    for block, inner in ((128, 32), (7, 3), (20, 1)):
        got, same = obs.sweep(weight, gram, 0.01, mask=mask, block=block, inner=inner)
        assert torch.allclose(got, want, atol=1e-9) and torch.equal(same, mask)


def test_least_squares_is_exact_and_no_compensation_beats_it():
    weight, gram = case(seed=3)
    mask = torch.rand(weight.shape) < 0.4
    exact = obs.least_squares(weight, gram, mask, 1e-9)
    hessian = damped(gram, 1e-9)
    for r in range(len(weight)):
        kept = mask[r]
        assert torch.allclose(
            exact[r, kept],
            torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[r]),
            rtol=1e-4,
            atol=1e-6,
        )
    swept = obs.sweep(weight, gram, 1e-9, mask=mask)[0]
    assert error(weight, exact, gram) <= min(error(weight, swept, gram), error(weight, weight * mask, gram))


def test_sparsity_chosen_on_the_way_is_exact_and_two_four_holds():
    weight, gram = case(width=24)
    new, mask = obs.sweep(weight, gram, 0.01, sparsity=0.5, block=8)
    assert int((~mask).sum()) == weight.numel() // 2 and torch.equal(new != 0, mask)
    new, mask = obs.sweep(weight, gram, 0.01, pattern=NM(2, 4))
    assert obeys(mask, NM(2, 4)) and int(mask.sum()) == weight.numel() // 2
    again, same = obs.sweep(new, gram, 0.01, pattern=NM(2, 4), removed=~mask)
    assert torch.equal(same, mask) and torch.allclose(again, new)


def test_dead_inputs_and_singular_hessians():
    weight, gram = case()
    gram[3], gram[:, 3] = 0, 0
    new, _ = obs.sweep(weight, gram, 0.01, sparsity=0.5)
    assert torch.isfinite(new).all()
    with pytest.raises(BadInput, match="calibration"):
        obs.inverse_factor(torch.zeros(4, 4), 0.01)
    x = torch.randn(3, 20)
    with pytest.raises(BadInput, match="damp"):
        obs.sweep(torch.randn(4, 20), (x.T @ x), 1e-12, sparsity=0.5)


BEST = [1719582, 1416694, 1362709, 1331431, 1287881, 1271494, 1267808, 1264715, 1264068, 1263986]
MAGNITUDE = [3792387, 2366666, 1792554, 1431387, 1330830, 1289068, 1274872, 1268251, 1264086, 1263986]


def test_best_subset_obs_and_magnitude_on_the_diabetes_regression():
    """Ordinary least squares on 10 features is exactly quadratic,
    so residual sums of squares can be enumerated.
    """
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    y = y - y.mean()
    weight = np.linalg.lstsq(x, y, rcond=None)[0]
    rest = float(((y - x @ weight) ** 2).sum())
    w, hessian = torch.tensor(weight), torch.tensor(x.T @ x)
    subset = [rest + 2 * best_subset(w, hessian, k)[1] for k in range(1, 11)]
    assert [round(v) for v in subset] == BEST
    path = obs_path(w, hessian)
    surgeon = [rest + 2 * path[9 - k][1] for k in range(1, 10)] + [rest]
    assert [round(v) for v in surgeon] == [1310871 if k == 5 else BEST[k - 1] for k in range(1, 11)]
    found = []
    for k in range(1, 11):
        kept = np.argsort(-abs(weight))[:k]
        found.append(round(float(((y - x[:, kept] @ weight[kept]) ** 2).sum())))
    assert found == MAGNITUDE


def test_brute_force_without_update_is_the_smallest_quadratic():
    weight, gram = case(out=1, width=9)
    w = weight[0]
    mask, loss = best_subset(w, gram, 4, update=False)
    for chosen in combinations(range(9), 5):
        delta = torch.zeros(9, dtype=torch.float64)
        delta[list(chosen)] = -w[list(chosen)]
        assert float(delta @ gram @ delta) / 2 >= loss - 1e-12
    assert int(mask.sum()) == 4


def test_the_inverse_factor_is_upper_triangular_and_gives_the_inverse():
    torch.manual_seed(0)
    for n in (1, 7, 128, 301):
        x = torch.randn(2 * n + 5, n, dtype=torch.float64)
        gram = x.T @ x / len(x)
        upper = obs.inverse_factor(gram, 0.01)
        assert torch.equal(upper, upper.triu()) and bool((upper.diagonal() > 0).all())
        assert torch.allclose(
            upper.T @ upper @ damped(gram, 0.01), torch.eye(n, dtype=torch.float64), atol=1e-9
        )
        assert torch.allclose(
            obs.triangular_inverse(upper, 4) @ upper, torch.eye(n, dtype=torch.float64), atol=1e-9
        )
