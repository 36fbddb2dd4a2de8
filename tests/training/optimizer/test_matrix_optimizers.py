"""Optimizers that treat a weight as a matrix, against their equations written out plainly,
in double precision, over several steps.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.training.optimizer.test_optimizers import LR, WD, compare, problem
from workbench.errors import BadInput
from workbench.training.optimizer.galore import GaLore, projection
from workbench.training.optimizer.kron import Kron, spectral_lower_bound
from workbench.training.optimizer.mkor import MKOR, rank_one_inverse
from workbench.training.optimizer.muon import Muon, orthogonalise, soft_cap, soft_cap_strength
from workbench.training.optimizer.optimizers import state_bytes
from workbench.training.optimizer.scion import Scion, steepest


def test_muon() -> None:
    def rule(w: Tensor, g: Tensor, s: dict, t: int) -> Tensor:
        s["m"] = 0.95 * s.get("m", 0 * g) + g
        d = g + 0.95 * s["m"]
        left, sigma, right = torch.linalg.svd(d / d.norm(), full_matrices=False)
        for _ in range(5):  # the iteration acts on each singular value alone
            sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
        return (1 - LR * WD) * w - LR * 0.2 * max(w.shape) ** 0.5 * left @ torch.diag(sigma) @ right

    compare(lambda ws: Muon(ws, lr=LR, weight_decay=WD), rule, count=2, tolerance=1e-9)


def test_muon_agrees_with_torch_to_bfloat16() -> None:
    torch.manual_seed(1)
    mine, theirs = (
        nn.Parameter(torch.randn(8, 12, generator=torch.Generator().manual_seed(0))) for _ in range(2)
    )
    first, second = (
        Muon([mine], lr=0.1, scale="rms"),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        gradient = torch.randn(8, 12)
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        first.step()
        second.step()
    torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=0.05, atol=0.03)


def test_orthogonalise_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((16, 16), (40, 8), (8, 40)):
        sigma = torch.linalg.svdvals(orthogonalise(torch.randn(*shape, dtype=torch.float64)))
        assert float(sigma.min()) > 0.3 and float(sigma.max()) < 1.21
    xs = torch.linspace(0, 1, 200001, dtype=torch.float64)
    for _ in range(5):
        xs = 3.4445 * xs - 4.7750 * xs**3 + 2.0315 * xs**5
        assert float(xs.max()) < 1.21 and float(xs.min()) >= 0


def test_soft_cap_never_lets_a_singular_value_out() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(12, 9, dtype=torch.float64))
    with torch.no_grad():
        weight.mul_(2.0 / torch.linalg.matrix_norm(weight, 2))
    optimizer = Muon([weight], lr=0.2, scale="none", weight_map="soft-cap", cap=2.0)
    for _ in range(40):
        weight.grad = -torch.outer(
            torch.ones(12), torch.ones(9)
        ).double()  # always pushes the same direction up
        optimizer.step()
        assert float(torch.linalg.matrix_norm(weight.detach(), 2)) <= 2.0 + 1e-9
    assert float(torch.linalg.matrix_norm(weight.detach(), 2)) > 1.5
    matrix, a = torch.randn(5, 7, dtype=torch.float64) / 4, soft_cap_strength(2.0, 0.1)
    left, s, right = torch.linalg.svd(matrix, full_matrices=False)
    y = s - a * s**3
    torch.testing.assert_close(
        soft_cap(matrix, a), left @ torch.diag(y + a * y**3) @ right, rtol=1e-10, atol=1e-10
    )
    with pytest.raises(BadInput, match="too long for a cap"):
        soft_cap_strength(0.1, 5.0)


@pytest.mark.parametrize("kind", ["normalise", "hammer"])
def test_hard_maps_hold_the_spectral_norm(kind: str) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(12, 9, dtype=torch.float64))
    optimizer = Muon([weight], lr=0.01, scale="none", weight_map=kind, cap=1.5)
    for _ in range(60):
        weight.grad = torch.ones(12, 9, dtype=torch.float64)
        optimizer.step()
    assert float(torch.linalg.matrix_norm(weight.detach(), 2)) < 1.5 * 1.05


def test_galore() -> None:
    def rule(w: Tensor, g: Tensor, s: dict, t: int) -> Tensor:
        if w.ndim == 1:
            r, back = g, lambda n: n
        elif w.shape[0] <= w.shape[1]:
            if (t - 1) % 4 == 0:
                s["p"] = torch.linalg.svd(g)[0][:, :3]
            r, back = s["p"].T @ g, lambda n: 0.25 * s["p"] @ n
        else:
            if (t - 1) % 4 == 0:
                s["p"] = torch.linalg.svd(g)[2][:3].T
            r, back = g @ s["p"], lambda n: 0.25 * n @ s["p"].T
        s["m"] = 0.9 * s.get("m", 0 * r) + 0.1 * r
        s["v"] = 0.999 * s.get("v", 0 * r) + 0.001 * r * r
        return w - LR * (back(s["m"] / (1 - 0.9**t) / ((s["v"] / (1 - 0.999**t)).sqrt() + 1e-8)) + WD * w)

    compare(lambda ws: GaLore(ws, lr=LR, weight_decay=WD, rank=3, refresh=4), rule, tolerance=1e-8)


def test_galore_state_is_as_small_as_stated() -> None:
    weight = nn.Parameter(torch.randn(64, 96))
    weight.grad = torch.randn(64, 96)
    optimizer = GaLore([weight], rank=8)
    optimizer.step()
    assert state_bytes(optimizer) == 4 * (2 * 96 * 8 + 64 * 8)
    basis, on_left = projection(torch.randn(96, 64), 8)
    assert basis.shape == (64, 8) and not on_left
    torch.testing.assert_close(basis.T @ basis, torch.eye(8), atol=1e-5, rtol=0)


def test_soap_is_adam_in_the_eigenbasis() -> None:
    """Vyas et al. 2024, algorithm 3, with the basis refreshed every step;
    the first call only makes the basis.
    """
    from pytorch_optimizer import SOAP

    weight = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    plain, generator = weight.detach().clone().double(), torch.Generator().manual_seed(1)
    optimizer = SOAP([weight], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, precondition_frequency=1000)
    first = second = torch.zeros(4, 4, dtype=torch.float64)
    for t in range(7):
        g = torch.randn(4, 4, generator=generator)
        weight.grad = g.clone()
        optimizer.step()
        g = g.double()
        if t == 0:
            assert torch.equal(plain.float(), weight.detach())
            left, right = torch.linalg.eigh(g @ g.T).eigenvectors, torch.linalg.eigh(g.T @ g).eigenvectors
            continue
        first, second = 0.9 * first + 0.1 * g, 0.95 * second + 0.05 * (left.T @ g @ right) ** 2
        corrected = (left.T @ first @ right) / (1 - 0.9**t) / ((second / (1 - 0.95**t)).sqrt() + 1e-8)
        plain -= 0.01 * left @ corrected @ right.T
    torch.testing.assert_close(weight.detach().double(), plain, rtol=1e-4, atol=1e-5)


def test_scion() -> None:
    def rule(w: Tensor, g: Tensor, s: dict, t: int) -> Tensor:
        s["d"] = 0.9 * s.get("d", 0 * g) + 0.1 * g
        left, sigma, right = torch.linalg.svd(s["d"] / s["d"].norm(), full_matrices=False)
        for _ in range(5):
            sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
        return (1 - LR * WD) * w - LR * 2.0 * (w.shape[0] / w.shape[1]) ** 0.5 * left @ torch.diag(
            sigma
        ) @ right

    compare(lambda ws: Scion(ws, lr=LR, weight_decay=WD, radius=2.0), rule, count=2, tolerance=1e-9)
    direction = torch.tensor([[3.0, -4.0], [0.0, 12.0]], dtype=torch.float64)
    assert torch.equal(
        steepest(direction, "sign"), torch.tensor([[0.5, -0.5], [0.0, 0.5]], dtype=torch.float64)
    )
    assert float(steepest(direction[:, 1], "rms").square().mean()) == pytest.approx(1.0)
    with pytest.raises(BadInput, match="norm"):
        Scion([nn.Parameter(torch.zeros(2, 2))], norm="nuclear")


def test_scion_agrees_with_pytorch_optimizer_to_bfloat16() -> None:
    from pytorch_optimizer import SCION

    mine, theirs = (
        nn.Parameter(torch.randn(8, 12, generator=torch.Generator().manual_seed(0))) for _ in range(2)
    )
    first, second = (
        Scion([mine], lr=0.1, radius=3.0),
        SCION([theirs], lr=0.1, momentum=0.1, scale=3.0, norm_type=2),
    )
    for t in range(3):
        gradient = torch.randn(8, 12, generator=torch.Generator().manual_seed(t))
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        first.step()
        second.step()
    torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=0.05, atol=0.03)


def test_kron_equals_pytorch_optimizer() -> None:
    """Step for step at the same draws: two matrices with a diagonal side each."""
    from pytorch_optimizer import Kron as Theirs

    weights, loss = problem()
    weights = weights[:2]
    twins = [nn.Parameter(w.detach().clone()) for w in weights]
    mine = Kron(weights, lr=LR, weight_decay=WD, largest=8)
    theirs = Theirs(
        twins, lr=LR, weight_decay=WD, max_size_triangular=8, balance_prob=0.0, precondition_dtype=None
    )
    for ws, optimizer in ((weights, mine), (twins, theirs)):
        torch.manual_seed(3)
        for _ in range(8):
            optimizer.zero_grad()
            loss(ws).backward()
            optimizer.step()
    for a, b in zip(weights, twins, strict=True):
        # their triangular solves are done in single precision
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-5)


def test_kron_whitens_its_gradients() -> None:
    """Li 2018: Q is fitted so that P g is white; for gradients of known Kronecker covariance its spread
    becomes even.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = torch.diag(torch.tensor([4.0, 1.0, 0.25])), torch.diag(torch.tensor([2.0, 0.5]))
    weight = nn.Parameter(torch.zeros(3, 2))
    optimizer = Kron([weight], lr=1e-9, momentum=0.0)
    torch.manual_seed(0)
    draw = lambda: left @ torch.randn(3, 2, generator=generator) @ right  # noqa: E731
    for _ in range(2000):
        weight.grad = draw()
        optimizer.step()
    a, b = optimizer.state[weight]["first"], optimizer.state[weight]["second"]
    images = torch.stack([a.T @ a @ draw() @ b.T @ b for _ in range(3000)])
    spread = images.reshape(-1, 6).var(0)
    assert float(spread.max() / spread.min()) < 3.0  # 4,096 before: (4 / 0.25 x 2 / 0.5)^2
    matrix = torch.randn(12, 12, generator=generator)
    matrix = matrix @ matrix.T
    assert 0.8 < float(spectral_lower_bound(matrix) / torch.linalg.matrix_norm(matrix, 2)) <= 1.0


def test_rank_one_inverse_is_the_inverse() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, inverse = torch.eye(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    for _ in range(20):
        v = torch.randn(6, generator=generator, dtype=torch.float64)
        matrix, inverse = 0.9 * matrix + 0.1 * torch.outer(v, v), rank_one_inverse(inverse, v, 0.9)
        torch.testing.assert_close(inverse, torch.linalg.inv(matrix), rtol=1e-9, atol=1e-9)


def test_mkor() -> None:
    """Three steps of two linear layers against factors inverted directly, the inner optimizer plain SGD."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    twin = copy.deepcopy(model)
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=LR), decay=0.9, every=1)
    factors = [
        [torch.eye(n, dtype=torch.float64) for n in layer.weight.shape] for layer in (twin[0], twin[2])
    ]
    for _ in range(3):
        x, y = torch.randn(7, 4, dtype=torch.float64), torch.randint(3, (7,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        hidden = twin[0](x)
        out = twin[2](hidden.tanh())
        hidden.retain_grad(), out.retain_grad()
        twin.zero_grad()
        nn.functional.cross_entropy(out, y).backward()
        for layer, pair, g, a in (
            (twin[0], factors[0], hidden.grad.sum(0), x.mean(0)),
            (twin[2], factors[1], out.grad.sum(0), hidden.tanh().mean(0).detach()),
        ):
            pair[:] = [0.9 * f + 0.1 * torch.outer(v, v) for f, v in zip(pair, (g, a), strict=True)]
            step = torch.linalg.inv(pair[0]) @ layer.weight.grad @ torch.linalg.inv(pair[1])
            layer.weight.data -= LR * step * layer.weight.grad.norm() / step.norm()
            layer.bias.data -= LR * layer.bias.grad
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_mkor_draws_large_inverses_back() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    optimizer = MKOR(
        model, torch.optim.SGD(model.parameters(), lr=0.0), decay=0.1, every=1, stabiliser=0.5, threshold=5.0
    )
    model(torch.tensor([[1.0, 0.0, 0.0]])).sum().backward()
    optimizer.step()
    # unseen inputs: 1 / 0.1 = 10 passes the threshold, half-way to the identity is 5.5
    torch.testing.assert_close(optimizer.inverses["0"][1].diagonal(), torch.tensor([1.0, 5.5, 5.5]))
    assert state_bytes(optimizer) == 4 * (4 + 9)


def test_mkor_h_leaves_the_inner_optimizer_alone_when_the_loss_stalls() -> None:
    """Means over two steps fall by a half, a quarter, a hundredth:
    the last is below a tenth of the largest.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=LR), every=1, stall=0.1, window=2)
    switched = []
    for loss in (8.0, 8.0, 4.0, 4.0, 3.0, 3.0, 2.97, 2.97):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(6, 4)), torch.randint(3, (6,))).backward()
        optimizer.step()
        optimizer.observe(loss)
        switched.append(optimizer.switched)
    assert switched == [False] * 7 + [True]
    twin = copy.deepcopy(model)
    again = MKOR(twin, torch.optim.SGD(twin.parameters(), lr=LR), every=1, stall=0.1, window=2)
    again.load_state_dict(optimizer.state_dict())
    plain = copy.deepcopy(model)
    inner = torch.optim.SGD(plain.parameters(), lr=LR)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    for net, stepper in ((model, optimizer), (twin, again), (plain, inner)):
        stepper.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        stepper.step()
    assert again.switched and all(
        torch.equal(a, c) and torch.equal(b, c)
        for a, b, c in zip(*(m.parameters() for m in (model, twin, plain)), strict=True)
    )
