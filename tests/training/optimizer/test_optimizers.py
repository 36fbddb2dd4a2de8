"""Element-wise optimizers against their equations, written out plainly, in double precision,
over several steps; and the catalogue of all.
"""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.training.test_loop import net, same, small
from workbench.errors import BadInput
from workbench.training import checkpoint, fit
from workbench.training.optimizer.combined import Together
from workbench.training.optimizer.lamb import LAMB
from workbench.training.optimizer.lars import LARS
from workbench.training.optimizer.lion import Lion
from workbench.training.optimizer.muon import Muon
from workbench.training.optimizer.one_bit_adam import OneBitAdam, compress, packed, unpacked
from workbench.training.optimizer.optimizers import OPTIMIZER, make_optimizer
from workbench.training.optimizer.sophia import Sophia

LR, WD = 0.05, 0.1


def problem() -> tuple[list[nn.Parameter], Callable[[list[Tensor]], Tensor]]:
    generator = torch.Generator().manual_seed(4)
    weights = [
        nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))
        for shape in ((6, 9), (9, 5), (7,))
    ]
    targets = [torch.randn(*w.shape, generator=generator, dtype=torch.float64) for w in weights]
    return weights, lambda ws: sum(
        ((w - t) ** 2 * (1 + i)).sum() + (w**4).sum() / 10
        for i, (w, t) in enumerate(zip(ws, targets, strict=False))
    )


def compare(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    rule: Callable[[Tensor, Tensor, dict, int], Tensor],
    count: int | None = None,
    steps: int = 6,
    tolerance: float = 1e-11,
) -> None:
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
    def rule(w: Tensor, g: Tensor, s: dict, t: int) -> Tensor:
        m = s.get("m", 0 * g)
        s["m"] = 0.99 * m + 0.01 * g
        return w - LR * ((0.9 * m + 0.1 * g).sign() + WD * w)

    compare(lambda ws: Lion(ws, lr=LR, weight_decay=WD), rule)


def test_mars() -> None:
    """Yuan et al. 2024: Adam on the gradient corrected by its own change, clipped to norm one;
    plain AdamW for vectors.
    """

    def rule(w: Tensor, g: Tensor, s: dict, t: int) -> Tensor:
        b1, b2 = (0.95, 0.99) if w.ndim == 2 else (0.9, 0.95)
        c = g + 0.025 * b1 / (1 - b1) * (g - s.get("g", 0 * g)) if w.ndim == 2 else g
        c = c / max(1.0, float(c.norm())) if w.ndim == 2 else c
        s["g"], s["m"], s["v"] = (
            g,
            b1 * s.get("m", 0 * g) + (1 - b1) * c,
            b2 * s.get("v", 0 * g) + (1 - b2) * c * c,
        )
        step = s["m"] / (1 - b1**t) / ((s["v"].sqrt() + 1e-8) / (1 - b2**t) ** 0.5)
        return w * (1 - LR * (WD if w.ndim == 2 else 0.0)) - LR * step

    def make(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        model = nn.Module()
        for i, weight in enumerate(weights):
            model.register_parameter(f"w{i}", weight)
        return make_optimizer("mars", LR, WD)(model)

    compare(make, rule, tolerance=1e-6)  # where theirs adds eps differs by 1e-8


def test_sophia() -> None:
    """The rule with the diagonal given, and pytorch_optimizer's SophiaH at the same diagonal:
    m / max(gamma h) clipped at 1 is theirs at p = gamma.
    """
    from pytorch_optimizer import SophiaH

    weights, loss = problem()
    plain, theirs = [w.detach().clone() for w in weights], [nn.Parameter(w.detach().clone()) for w in weights]
    optimizer, oracle = (
        Sophia(weights, lr=LR, gamma=0.05, weight_decay=WD),
        SophiaH(theirs, lr=LR / 0.05, p=0.05, weight_decay=WD * 0.05, update_period=10**9),
    )
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
        oracle.step(
            hessian=[d.clone() for d in diagonals] if t % 3 == 0 else None
        ) if t % 3 == 0 else oracle.step()
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
    """Tang et al. 2021, algorithm 1, written out: gradients (steps, workers, d) -> the weights after,
    from zero.
    """
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
    assert torch.equal(unpacked(*packed(compress(whole)), whole), compress(whole)) or torch.allclose(
        unpacked(*packed(compress(whole)), whole), compress(whole)
    )


def test_one_bit_adam_does_not_move_what_never_had_a_gradient() -> None:
    weight = nn.Parameter(torch.ones(6))
    optimizer = OneBitAdam([weight], lr=LR, freeze=2)
    for _ in range(6):
        weight.grad = torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0, 3.0])
        optimizer.step()
    assert torch.equal(weight[3:5].detach(), torch.ones(2)) and (weight[:3] != 1).all()


def one_of_two(rank: int, store: str, out: str) -> None:
    """What each process of the next test does: its own gradients, signs exchanged by gloo;
    the first one leaves its weight.
    """
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    gradients = torch.randn(7, 2, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(11, dtype=torch.float64))
    optimizer = OneBitAdam([weight], lr=0.05, freeze=3)
    for step in gradients:
        weight.grad = step[rank].clone()
        optimizer.step()
    if rank == 0:
        torch.save(weight.detach(), out)
    dist.destroy_process_group()


def test_one_bit_adam_over_processes_equals_the_simulation(tmp_path) -> None:
    """Two processes of gloo that exchange packed signs reach the weights of two simulated workers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.optimizer.test_optimizers"])
    processes = [
        context.Process(target=one_of_two, args=(rank, str(tmp_path / "store"), str(tmp_path / "out")))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    gradients = torch.randn(7, 2, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(
        torch.load(tmp_path / "out", weights_only=True),
        one_bit_reference(gradients, 3, 7),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("name", OPTIMIZER)
def test_each_trains_and_resumes(name: str, tmp_path) -> None:
    options = {
        "galore": {"rank": 2, "refresh": 5},
        "one-bit-adam": {"freeze": 4},
        "sophia": {"every": 4},
        "mkor": {"every": 4},
    }.get(name, {})
    lr = {"sgd": 0.05, "lars": 5.0, "mkor": 0.05}.get(name, 0.01)
    arguments = dict(
        steps=12,
        batch_size=25,
        optimizer={"name": name, **options},
        learning_rate=lr,
        checkpoint_every=6,
    )
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
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters()
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5)
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.005}
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    late.grad = torch.ones(3)
    optimizer.step()
    assert float(late.detach()[0]) < 0.6 and "exp_avg" in optimizer.state[late]
    twin = make_optimizer("muon", 0.01, 0.1)(copy.deepcopy(model))
    optimizer = make_optimizer("muon", 0.01, 0.1)(copy.deepcopy(model))
    twin.load_state_dict(checkpoint.restore(checkpoint.flatten(optimizer.state_dict(), "", kept := {}), kept))
    assert twin.param_groups[0] is twin.parts[0].param_groups[0] and scheduler.last_epoch == 0


def test_unknown_names_and_options() -> None:
    with pytest.raises(BadInput, match="did you mean muon"):
        make_optimizer("mun", 1e-3)
    with pytest.raises(BadInput, match=r"optimizer\.rank: adamw has no such option .* of galore"):
        make_optimizer("adamw", 1e-3, rank=3)
    with pytest.raises(BadInput, match="matrices"):
        Muon([nn.Parameter(torch.zeros(3))])
