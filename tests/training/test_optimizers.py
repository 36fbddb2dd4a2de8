"""Every optimizer against its equations, written out plainly, in double precision, over several steps."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.training.test_loop import net, same, small
from workbench.instruments import BadInput
from workbench.training import checkpoint, fit
from workbench.training.galore import GaLore, projection
from workbench.training.kron import Kron, spectral_lower_bound
from workbench.training.lamb import LAMB, LARS
from workbench.training.mkor import MKOR, rank_one_inverse
from workbench.training.muon import Muon, orthogonalise, soft_cap, soft_cap_strength
from workbench.training.onebit import OneBitAdam, compress, packed, unpacked
from workbench.training.optimizers import OPTIMIZERS, make_optimizer, state_bytes
from workbench.training.scion import Scion, steepest
from workbench.training.sophia import Sophia
from workbench.training.together import Together

LR, WD = 0.05, 0.1


def problem() -> tuple[list[nn.Parameter], Callable[[list[Tensor]], Tensor]]:
    generator = torch.Generator().manual_seed(4)
    weights = [nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64)) for shape in ((6, 9), (9, 5), (7,))]
    targets = [torch.randn(*w.shape, generator=generator, dtype=torch.float64) for w in weights]
    return weights, lambda ws: sum(((w - t) ** 2 * (1 + i)).sum() + (w**4).sum() / 10 for i, (w, t) in enumerate(zip(ws, targets, strict=False)))


def compare(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], rule: Callable[[Tensor, Tensor, dict, int], Tensor], count: int | None = None,
            steps: int = 6, tolerance: float = 1e-11) -> None:  # fmt: skip
    """Run the optimizer and the plain rule (w, g, state, t) -> w side by side."""
    weights, loss = problem()
    weights = weights[:count]
    plain, states = [w.detach().clone() for w in weights], [{} for _ in weights]
    optimizer = make(weights)
    for t in range(1, steps + 1):
        optimizer.zero_grad()
        loss(weights).backward()
        optimizer.step()
        grads = torch.autograd.grad(loss([w.requires_grad_() for w in plain]), plain)
        plain = [rule(w.detach(), g, s, t) for w, g, s in zip(plain, grads, states, strict=True)]
        for a, b in zip(weights, plain, strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=tolerance, atol=tolerance)


def test_lamb() -> None:
    def rule(w: Tensor, g: Tensor, s: dict, t: int) -> Tensor:
        s["m"] = 0.9 * s.get("m", 0 * g) + 0.1 * g
        s["v"] = 0.999 * s.get("v", 0 * g) + 0.001 * g * g
        u = s["m"] / (1 - 0.9**t) / ((s["v"] / (1 - 0.999**t)).sqrt() + 1e-6) + WD * w
        return w - LR * min(float(w.norm()), 10.0) / float(u.norm()) * u

    compare(lambda ws: LAMB(ws, lr=LR, weight_decay=WD), rule)


def test_lamb_with_a_zero_norm_has_ratio_one() -> None:
    weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    optimizer = LAMB([weight], lr=0.5, eps=0.0, weight_decay=0.0)
    weight.grad = torch.full_like(weight, 2.0)
    optimizer.step()
    assert torch.allclose(weight, torch.full_like(weight, -0.5))  # Adam's first step is the sign
    assert float(optimizer.state[weight]["trust_ratio"]) == 1.0


def test_lars() -> None:
    def rule(w: Tensor, g: Tensor, s: dict, t: int) -> Tensor:
        ratio = 0.01 * w.norm() / (g.norm() + WD * w.norm())
        s["m"] = 0.9 * s.get("m", 0 * g) + LR * ratio * (g + WD * w)
        return w - s["m"]

    compare(lambda ws: LARS(ws, lr=LR, weight_decay=WD, trust=0.01), rule)


def test_lion() -> None:
    from pytorch_optimizer import Lion

    def rule(w: Tensor, g: Tensor, s: dict, t: int) -> Tensor:
        m = s.get("m", 0 * g)
        s["m"] = 0.99 * m + 0.01 * g
        return w - LR * ((0.9 * m + 0.1 * g).sign() + WD * w)

    compare(lambda ws: Lion(ws, lr=LR, weight_decay=WD), rule)


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
    mine, theirs = (nn.Parameter(torch.randn(8, 12, generator=torch.Generator().manual_seed(0))) for _ in range(2))
    first, second = Muon([mine], lr=0.1, scale="rms"), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
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
        weight.grad = -torch.outer(torch.ones(12), torch.ones(9)).double()  # always pushes the same direction up
        optimizer.step()
        assert float(torch.linalg.matrix_norm(weight.detach(), 2)) <= 2.0 + 1e-9
    assert float(torch.linalg.matrix_norm(weight.detach(), 2)) > 1.5
    matrix, a = torch.randn(5, 7, dtype=torch.float64) / 4, soft_cap_strength(2.0, 0.1)
    left, s, right = torch.linalg.svd(matrix, full_matrices=False)
    y = s - a * s**3
    torch.testing.assert_close(soft_cap(matrix, a), left @ torch.diag(y + a * y**3) @ right, rtol=1e-10, atol=1e-10)
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
    """Vyas et al. 2024, algorithm 3, with the basis refreshed every step; the first call only makes the basis."""
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


def test_mars() -> None:
    """Yuan et al. 2024: Adam on the gradient corrected by its own change, clipped to norm one; plain AdamW for vectors."""

    def rule(w: Tensor, g: Tensor, s: dict, t: int) -> Tensor:
        b1, b2 = (0.95, 0.99) if w.ndim == 2 else (0.9, 0.95)
        c = g + 0.025 * b1 / (1 - b1) * (g - s.get("g", 0 * g)) if w.ndim == 2 else g
        c = c / max(1.0, float(c.norm())) if w.ndim == 2 else c
        s["g"], s["m"], s["v"] = g, b1 * s.get("m", 0 * g) + (1 - b1) * c, b2 * s.get("v", 0 * g) + (1 - b2) * c * c
        step = s["m"] / (1 - b1**t) / ((s["v"].sqrt() + 1e-8) / (1 - b2**t) ** 0.5)
        return w * (1 - LR * (WD if w.ndim == 2 else 0.0)) - LR * step

    def make(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        model = nn.Module()
        for i, weight in enumerate(weights):
            model.register_parameter(f"w{i}", weight)
        return make_optimizer("mars", LR, WD)(model)

    compare(make, rule, tolerance=1e-6)  # where theirs adds eps differs by 1e-8


def test_sophia() -> None:
    """The rule with the diagonal given, and pytorch_optimizer's SophiaH at the same diagonal: m / max(gamma h) clipped at 1 is theirs at p = gamma."""
    from pytorch_optimizer import SophiaH

    weights, loss = problem()
    plain, theirs = [w.detach().clone() for w in weights], [nn.Parameter(w.detach().clone()) for w in weights]
    optimizer, oracle = Sophia(weights, lr=LR, gamma=0.05, weight_decay=WD), SophiaH(theirs, lr=LR / 0.05, p=0.05, weight_decay=WD * 0.05, update_period=10**9)
    first, h = [0 * w for w in plain], [0 * w for w in plain]
    generator = torch.Generator().manual_seed(0)
    for t in range(6):
        diagonals = [torch.randn(w.shape, generator=generator, dtype=torch.float64) * 20 for w in plain]
        if t % 3 == 0:
            optimizer.average(weights, diagonals)
            h = [0.99 * a + 0.01 * d for a, d in zip(h, diagonals, strict=True)]
        for ws in (weights, theirs):
            for w, g in zip(ws, torch.autograd.grad(loss(ws), ws), strict=True):
                w.grad = g
        grads = [w.grad.clone() for w in weights]
        first = [0.96 * m + 0.04 * g for m, g in zip(first, grads, strict=True)]
        clipped = [(m / (0.05 * a).clamp(min=1e-12)).clamp(-1, 1) for m, a in zip(first, h, strict=True)]
        plain = [w * (1 - LR * WD) - LR * c for w, c in zip(plain, clipped, strict=True)]
        optimizer.step()
        oracle.step(hessian=[d.clone() for d in diagonals] if t % 3 == 0 else None) if t % 3 == 0 else oracle.step()
        for a, b, c in zip(weights, plain, theirs, strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(c.detach(), b, rtol=1e-9, atol=1e-9)


def test_sophia_estimates_the_diagonal() -> None:
    """Of a separable loss one probe of signs is exact; of any loss the mean over probes is the diagonal."""
    weight = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
    optimizer = Sophia([weight], betas=(0.9, 0.0))
    optimizer.estimate(lambda: (weight**4).sum() + (weight[0] * 0))
    torch.testing.assert_close(optimizer.state[weight]["hessian"], 12 * weight.detach() ** 2)
    matrix = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, -1.0], [0.0, -1.0, 4.0]], dtype=torch.float64)
    torch.manual_seed(0)
    found = []
    for _ in range(400):
        optimizer.estimate(lambda: 0.5 * weight @ matrix @ weight)
        found.append(optimizer.state[weight]["hessian"].clone())
    assert float((torch.stack(found).mean(0) - matrix.diagonal()).abs().max()) < 4 * (2 / 400) ** 0.5


def test_scion() -> None:
    def rule(w: Tensor, g: Tensor, s: dict, t: int) -> Tensor:
        s["d"] = 0.9 * s.get("d", 0 * g) + 0.1 * g
        left, sigma, right = torch.linalg.svd(s["d"] / s["d"].norm(), full_matrices=False)
        for _ in range(5):
            sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
        return (1 - LR * WD) * w - LR * 2.0 * (w.shape[0] / w.shape[1]) ** 0.5 * left @ torch.diag(sigma) @ right

    compare(lambda ws: Scion(ws, lr=LR, weight_decay=WD, radius=2.0), rule, count=2, tolerance=1e-9)
    direction = torch.tensor([[3.0, -4.0], [0.0, 12.0]], dtype=torch.float64)
    assert torch.equal(steepest(direction, "sign"), torch.tensor([[0.5, -0.5], [0.0, 0.5]], dtype=torch.float64))
    assert float(steepest(direction[:, 1], "rms").square().mean()) == pytest.approx(1.0)
    with pytest.raises(BadInput, match="norm"):
        Scion([nn.Parameter(torch.zeros(2, 2))], norm="nuclear")


def test_scion_agrees_with_pytorch_optimizer_to_bfloat16() -> None:
    from pytorch_optimizer import SCION

    mine, theirs = (nn.Parameter(torch.randn(8, 12, generator=torch.Generator().manual_seed(0))) for _ in range(2))
    first, second = Scion([mine], lr=0.1, radius=3.0), SCION([theirs], lr=0.1, momentum=0.1, scale=3.0, norm_type=2)
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
    theirs = Theirs(twins, lr=LR, weight_decay=WD, max_size_triangular=8, balance_prob=0.0, precondition_dtype=None)
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
    """Li 2018: Q is fitted so that P g is white; for gradients of known Kronecker covariance its spread becomes even."""
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


def test_one_bit_adam_is_adam_until_it_freezes() -> None:
    weights, loss = problem()
    twins = [nn.Parameter(w.detach().clone()) for w in weights]
    mine, adam = OneBitAdam(weights, lr=LR, freeze=5), torch.optim.Adam(twins, lr=LR)
    for _ in range(5):
        for ws, optimizer in ((weights, mine), (twins, adam)):
            optimizer.zero_grad()
            loss(ws).backward()
            optimizer.step()
    for a, b in zip(weights, twins, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-10, atol=1e-10)
    assert mine.bytes_sent == 5 * 8 * (54 + 45 + 7)


def one_bit_reference(gradients: Tensor, freeze: int, steps: int) -> Tensor:
    """Tang et al. 2021, algorithm 1, written out: gradients (steps, workers, d) -> the weights after, from zero."""
    workers, d = gradients.shape[1:]
    m, v, w = (torch.zeros(d, dtype=torch.float64) for _ in range(3))
    errors, server = torch.zeros(workers, d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    sign = lambda x: torch.where(x >= 0, 1.0, -1.0).double() * x.norm() / d**0.5  # noqa: E731
    for t in range(1, steps + 1):
        g = gradients[t - 1]
        if t <= freeze:
            m, v = 0.9 * m + 0.1 * g.mean(0), 0.999 * v + 0.001 * g.mean(0) ** 2
            below = (v / (1 - 0.999**t)).sqrt() + 1e-8
        else:
            whole = 0.9 * m + 0.1 * g + errors
            sent = torch.stack([sign(x) for x in whole])
            errors = whole - sent
            mean = sent.mean(0) + server
            m = sign(mean)
            server = mean - m
            below = (v / (1 - 0.999**freeze)).sqrt() + 1e-8
        w = w - LR * m / (1 - 0.9**t) / below
    return w


def test_one_bit_adam_with_simulated_workers() -> None:
    gradients = torch.randn(9, 4, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(11, dtype=torch.float64))
    optimizer = OneBitAdam([weight], lr=LR, freeze=3, workers=4)
    for step in gradients:
        optimizer.zero_grad()
        for g in step:
            (weight @ g / 4).backward()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), one_bit_reference(gradients, 3, 9), rtol=1e-10, atol=1e-10)
    assert optimizer.bytes_sent == 3 * 8 * 11 + 6 * (2 + 4)
    weight.grad = gradients[0, 0].clone()
    with pytest.raises(BadInput, match="workers: 4 were promised"):
        optimizer.step()
    whole = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(unpacked(*packed(compress(whole)), whole), compress(whole)) or torch.allclose(unpacked(*packed(compress(whole)), whole), compress(whole))


def test_one_bit_adam_does_not_move_what_never_had_a_gradient() -> None:
    weight = nn.Parameter(torch.ones(6))
    optimizer = OneBitAdam([weight], lr=LR, freeze=2)
    for _ in range(6):
        weight.grad = torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0, 3.0])
        optimizer.step()
    assert torch.equal(weight[3:5].detach(), torch.ones(2)) and (weight[:3] != 1).all()


def test_one_bit_adam_over_processes_equals_the_simulation(tmp_path) -> None:
    """Two processes of gloo that exchange packed signs reach the weights of two simulated workers."""
    code = """
import sys, torch, torch.distributed as dist
from torch import nn
from workbench.training.onebit import OneBitAdam
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
gradients = torch.randn(7, 2, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
weight = nn.Parameter(torch.zeros(11, dtype=torch.float64))
optimizer = OneBitAdam([weight], lr=0.05, freeze=3)
for step in gradients:
    weight.grad = step[rank].clone()
    optimizer.step()
torch.save(weight.detach(), sys.argv[3]) if rank == 0 else None
dist.destroy_process_group()
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path / "store"), str(tmp_path / "out")], env={**os.environ, "OMP_NUM_THREADS": "1"})
                 for rank in (0, 1)]  # fmt: skip
    assert [process.wait(120) for process in processes] == [0, 0]
    gradients = torch.randn(7, 2, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(torch.load(tmp_path / "out", weights_only=True), one_bit_reference(gradients, 3, 7), rtol=1e-10, atol=1e-10)


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
    factors = [[torch.eye(n, dtype=torch.float64) for n in layer.weight.shape] for layer in (twin[0], twin[2])]
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
        for layer, pair, g, a in ((twin[0], factors[0], hidden.grad.sum(0), x.mean(0)), (twin[2], factors[1], out.grad.sum(0), hidden.tanh().mean(0).detach())):
            pair[:] = [0.9 * f + 0.1 * torch.outer(v, v) for f, v in zip(pair, (g, a), strict=True)]
            step = torch.linalg.inv(pair[0]) @ layer.weight.grad @ torch.linalg.inv(pair[1])
            layer.weight.data -= LR * step * layer.weight.grad.norm() / step.norm()
            layer.bias.data -= LR * layer.bias.grad
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_mkor_draws_large_inverses_back() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.0), decay=0.1, every=1, stabiliser=0.5, threshold=5.0)
    model(torch.tensor([[1.0, 0.0, 0.0]])).sum().backward()
    optimizer.step()
    # unseen inputs: 1 / 0.1 = 10 passes the threshold, half-way to the identity is 5.5
    torch.testing.assert_close(optimizer.inverses["0"][1].diagonal(), torch.tensor([1.0, 5.5, 5.5]))
    assert state_bytes(optimizer) == 4 * (4 + 9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_trains_and_resumes(name: str, tmp_path) -> None:
    options = {"galore": {"rank": 2, "refresh": 5}, "one-bit-adam": {"freeze": 4}, "sophia": {"every": 4}, "mkor": {"every": 4}}.get(name, {})
    lr = {"sgd": 0.05, "lars": 5.0, "mkor": 0.05}.get(name, 0.01)
    arguments = dict(steps=12, batch_size=25, optimizer=name, lr=lr, optimizer_options=options, checkpoint_every=6)
    whole, broken = small(), small()
    run = fit(whole, checkpoint_folder=tmp_path / "a", **arguments)
    assert run.history.loss.iloc[-1] < run.history.loss.iloc[0]

    def interrupt(run) -> None:
        run.stop = run.step == 6

    fit(broken, checkpoint_folder=tmp_path / "b", callbacks=[interrupt], **arguments)
    resumed = small()
    fit(resumed, checkpoint_folder=tmp_path / "b", **arguments)
    assert same(whole.model, resumed.model)


def test_together_is_one_optimizer() -> None:
    model = net()
    optimizer = make_optimizer("muon", 0.01, 0.1)(model)
    assert isinstance(optimizer, Together)
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(p.numel() for p in model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5)
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.005}
    twin = make_optimizer("muon", 0.01, 0.1)(copy.deepcopy(model))
    twin.load_state_dict(checkpoint.restore(checkpoint.flatten(optimizer.state_dict(), "", kept := {}), kept))
    assert twin.param_groups[0] is twin.parts[0].param_groups[0] and scheduler.last_epoch == 0


def test_unknown_names_and_options() -> None:
    with pytest.raises(BadInput, match="did you mean muon"):
        make_optimizer("mun", 1e-3)
    with pytest.raises(BadInput, match="takes no option rank"):
        make_optimizer("adamw", 1e-3, rank=3)
    with pytest.raises(BadInput, match="matrices"):
        Muon([nn.Parameter(torch.zeros(3))])
