"""Self-tuning networks: the best response and the hypergradient of ridge regression, which are known,
and the optimum they lead to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import workbench
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.training.models.self_tuning import (
    Hyperparameter,
    SelfTuningLinear,
    Setting,
    TunedDropout,
    self_tuning,
    squared_weights,
    tune,
)


def ridge() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 6, generator=generator)
    y = x @ torch.tensor([1.0, -1.0, 0.5, 0.0, 0.0, 0.0]) + 1.5 * torch.randn(70, generator=generator)
    return {"x": x[:20], "y": y[:20]}, {"x": x[20:], "y": y[20:]}


def solution(train: dict[str, Tensor], penalty: float) -> np.ndarray:
    x, y = train["x"].double().numpy(), train["y"].double().numpy()
    return np.linalg.solve(x.T @ x / len(x) + penalty * np.eye(6), x.T @ y / len(x))


def validation(data: dict[str, Tensor], w: np.ndarray) -> float:
    return float(((data["x"].double().numpy() @ w - data["y"].double().numpy()) ** 2).mean() / 2)


def squares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return 0.5 * (model(batch["x"])[:, 0] - batch["y"]).square().mean()


def penalised(model: nn.Module, batch: dict[str, Tensor], values: dict[str, Tensor]) -> Tensor:
    return squares(model, batch) + 0.5 * values["l2"] * squared_weights(model)


def test_best_response_and_hypergradient_of_ridge_regression() -> None:
    """At a fixed penalty and a small spread the layer learns w*(l) and its derivative:
    both within a few per cent of the closed form.
    """
    train, held_out = ridge()
    torch.manual_seed(0)
    setting = Setting([Hyperparameter("l2", 0.2)], spread=0.3)
    model = self_tuning(nn.Sequential(nn.Linear(6, 1, bias=False)), setting)
    tune(
        model,
        setting,
        train,
        held_out,
        penalised,
        lambda m, b, v: squares(m, b),
        steps=500,
        warmup=10**9,
        batch_size=100,
        lr=0.02,
    )
    tune(
        model,
        setting,
        train,
        held_out,
        penalised,
        lambda m, b, v: squares(m, b),
        steps=500,
        warmup=10**9,
        batch_size=100,
        lr=0.002,
    )
    at = lambda free: solution(train, float(np.exp(free)))  # noqa: E731
    centre = np.log(0.2)
    found = model[0].responding().detach().numpy()[0]
    assert np.abs(found - at(centre)).max() < 0.03 * np.abs(at(centre)).max()
    derivative = (at(centre + 1e-4) - at(centre - 1e-4)) / 2e-4
    learned = model[0].gate[0, 0].item() * model[0].response.detach().numpy()[0]
    assert np.linalg.norm(learned - derivative) < 0.1 * np.linalg.norm(derivative)
    gradient = torch.autograd.grad(squares(model, held_out), setting.centre)[0]
    exact = (validation(held_out, at(centre + 1e-4)) - validation(held_out, at(centre - 1e-4))) / 2e-4
    assert float(gradient) == pytest.approx(exact, rel=0.1)


def test_the_penalty_found_is_the_best_one() -> None:
    train, held_out = ridge()
    torch.manual_seed(0)
    setting = Setting([Hyperparameter("l2", 0.01)], spread=0.3)
    model = self_tuning(nn.Sequential(nn.Linear(6, 1, bias=False)), setting)
    table = tune(
        model,
        setting,
        train,
        held_out,
        penalised,
        lambda m, b, v: squares(m, b),
        steps=1500,
        batch_size=100,
        lr=0.01,
        setting_lr=0.02,
        warmup=100,
        tune_spread=False,
    )
    losses = {p: validation(held_out, solution(train, p)) for p in np.geomspace(1e-3, 10, 200)}
    best = min(losses, key=lambda p: losses[p])
    found = validation(held_out, solution(train, float(table.l2.iloc[-1])))
    worst = losses[min(losses)]
    assert found - losses[best] < 0.1 * (worst - losses[best])
    assert (
        table.l2.iloc[0] == pytest.approx(0.01)
        and len(table) == 1500
        and table.validation_loss.isna().sum() == 100
    )


def test_layers_respond() -> None:
    setting = Setting([Hyperparameter("l2", 1e-3), Hyperparameter("rate", 0.2, "fraction")])
    plain = nn.Linear(3, 2)
    layer = SelfTuningLinear(plain, setting)
    x = torch.randn(5, 3)
    torch.testing.assert_close(layer(x), plain(x))  # no response at the start
    assert {n for n, _ in layer.named_parameters()} == {
        "weight",
        "response",
        "gate",
        "bias",
        "bias_response",
        "bias_gate",
    }
    with torch.no_grad():
        layer.response.copy_(torch.ones(2, 3))
    setting.draw()
    expected = plain.weight + (layer.gate @ setting.drawn)[:, None] * torch.ones(2, 3)
    torch.testing.assert_close(layer.responding(), expected)
    setting.settle()
    values = setting.values()
    assert float(values["l2"]) == pytest.approx(1e-3) and float(values["rate"]) == pytest.approx(0.2)
    dropout = TunedDropout(setting, "rate").train()
    assert float((dropout(torch.ones(20000)) == 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    with pytest.raises(BadInput, match="start"):
        Hyperparameter("rate", 1.2, "fraction").free()


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "vit", "t5", "mixtral"])
def test_every_architecture_tunes_its_dropout(architecture: str, checkpoints: Any, cache: Path) -> None:
    """Kind: a layer put in another's place lacks what the model asks of it (attention its dropout's `p`)."""
    on = workbench.subject(checkpoints[architecture], data="random", max_length=8)
    run = workbench.catalog()["self-tuning"](rounds=2, warmup_rounds=1, batch_size=4)
    result = run.run(on, Progress(), cache=False)
    assert result.subject is not None and np.isfinite(result.subject.evaluate()["loss"])
    assert not any(isinstance(m, (TunedDropout, SelfTuningLinear)) for m in result.subject.model.modules())
