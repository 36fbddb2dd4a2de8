"""Every optimizer against its equations, written out plainly, in double precision, over several steps."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.training.test_loop import net, same, small
from workbench.instruments import BadInput
from workbench.training import checkpoint, fit
from workbench.training.galore import GaLore, projection
from workbench.training.lamb import LAMB, LARS
from workbench.training.muon import Muon, orthogonalise, soft_cap, soft_cap_strength
from workbench.training.optimizers import OPTIMIZERS, Together, make_optimizer, state_bytes

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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_trains_and_resumes(name: str, tmp_path) -> None:
    options = {"rank": 2, "refresh": 5} if name == "galore" else {}
    lr = {"sgd": 0.05, "lars": 5.0}.get(name, 0.01)
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
