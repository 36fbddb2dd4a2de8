"""Rules for large batches: module-wise rates (AGVM) and concurrent adversaries (ConAdv),
against their equations in double precision.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.training.test_loop import small
from workbench.errors import BadInput
from workbench.subjects import Subject
from workbench.training import fit
from workbench.training.batch.adversary import ConcurrentAdversary
from workbench.training.data_order import take
from workbench.training.optimizer.agvm import AGVM, gradient_disagreement, module_groups

LR = 0.1
PLAIN = dict(schedule="constant", warmup=0.0, clip=None)


def double(on: Subject) -> Subject:
    on.model.double()
    for columns in on.splits.values():
        columns["inputs"] = columns["inputs"].double()
    return on


def test_module_groups() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = module_groups(model, ["1", ""], 0.1)
    assert [(g["module"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("1", 0.1, 1),
        ("1", 0.0, 1),
        ("", 0.1, 1),
        ("", 0.0, 1),
    ]
    assert groups[0]["params"][0] is model[1].weight
    with pytest.raises(BadInput, match="belong to none"):
        module_groups(model, ["1"])
    with pytest.raises(BadInput, match="'2' holds no"):
        module_groups(model, ["2", ""])


def test_disagreement_of_two_gradients() -> None:
    a = torch.tensor([3.0, 4.0])
    assert float(gradient_disagreement(a, 2 * a)) == pytest.approx(0.0) and float(
        gradient_disagreement(a, torch.tensor([-4.0, 3.0]))
    ) == pytest.approx(1.0)


def test_agvm() -> None:
    """Five steps of SGD written out: Phi of the halves of the batch,
    the average of clamped ratios every second step, scaled rates.
    """
    on = double(small())
    twin, columns = copy.deepcopy(on.model).train(), on.splits["train"]
    rule = AGVM(every=2, start=1, momentum=0.9)
    fit(
        on,
        steps=5,
        batch_size=10,
        optimizer=lambda model: torch.optim.SGD(module_groups(model, ["0", "3"]), lr=LR),
        before_step=[rule],
        **PLAIN,
    )
    scale, seen = 1.0, []
    for t in range(5):
        chosen = take(50, 0, 10 * t, 10)

        def gradient(part: torch.Tensor) -> list[torch.Tensor]:
            loss = F.cross_entropy(twin(columns["inputs"][part]), columns["labels"][part])
            return list(torch.autograd.grad(loss, list(twin.parameters())))

        if t in (1, 3):
            first, second = gradient(chosen[:5]), gradient(chosen[5:])
            flat = lambda gs: torch.cat([g.flatten() for g in gs])  # noqa: E731
            phi = [
                1 - float(F.cosine_similarity(flat(first[i : i + 2]), flat(second[i : i + 2]), dim=0))
                for i in (0, 2)
            ]
            scale = 0.9 * scale + 0.1 * min(max((phi[0] + 1e-6) / (phi[1] + 1e-6), 0.5), 10.0) ** 0.5
            seen.append(scale)
        whole = gradient(chosen)
        with torch.no_grad():
            for index, (p, g) in enumerate(zip(twin.parameters(), whole, strict=True)):
                p -= LR * (1.0 if index < 2 else scale) * g
    assert [found["3"] for _, _, found in rule.history] == pytest.approx(seen) and [
        found["0"] for _, _, found in rule.history
    ] == pytest.approx([1.0, 1.0])
    for a, b in zip(on.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_agvm_measures_adams_own_direction() -> None:
    rule = AGVM(every=1)
    run = fit(
        small(),
        steps=4,
        batch_size=10,
        optimizer=lambda model: torch.optim.AdamW(module_groups(model, ["0", ""]), lr=0.01),
        before_step=[rule],
        **PLAIN,
    )
    assert len(rule.history) == 4 and all(
        0 <= phi <= 2 for _, noise, _ in rule.history for phi in noise.values()
    )
    assert run.lr == pytest.approx(0.01)  # the schedule set it anew


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("norm", ["sign", "l2"])
def test_concurrent_adversary(delay: int, norm: str) -> None:
    """Four steps of SGD written out, the disturbance from the weights of `delay` steps ago."""
    on = double(small())
    twin, columns = copy.deepcopy(on.model).train(), on.splits["train"]
    adversary = ConcurrentAdversary(0.3, delay, norm)
    fit(
        on,
        steps=4,
        batch_size=10,
        loss=adversary,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=LR),
        **PLAIN,
    )
    past = []
    for t in range(4):
        past.append(copy.deepcopy(twin))
        chosen = take(50, 0, 10 * t, 10)
        x, y = columns["inputs"][chosen].clone().requires_grad_(), columns["labels"][chosen]
        gradient = torch.autograd.grad(F.cross_entropy(past[max(0, t - delay)](x), y), x)[0]
        step = gradient.sign() if norm == "sign" else gradient / gradient.norm(dim=1, keepdim=True)
        x = x.detach()
        loss = (F.cross_entropy(twin(x), y) + F.cross_entropy(twin(x + 0.3 * step), y)) / 2
        grads = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for p, g in zip(twin.parameters(), grads, strict=True):
                p -= LR * g
    for a, b in zip(on.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_running_statistics_follow_clean_examples_only() -> None:
    columns = small().splits["train"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    on = Subject("normed", model, small().task, {"train": columns})
    twin = copy.deepcopy(model).train()
    fit(
        on,
        steps=1,
        batch_size=10,
        loss=ConcurrentAdversary(5.0),
        optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=LR),
        **PLAIN,
    )
    twin(columns["inputs"][take(50, 0, 0, 10)])
    torch.testing.assert_close(on.model[1].running_mean, twin[1].running_mean)
    assert int(on.model[1].num_batches_tracked) == 1
    with pytest.raises(BadInput, match="no continuous input"):
        ConcurrentAdversary(column="labels")(on, columns)
    with pytest.raises(BadInput, match="epsilon"):
        ConcurrentAdversary(0.0)
