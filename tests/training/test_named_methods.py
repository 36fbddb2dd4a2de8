"""What cards name and `train` now runs: module-wise rates, adversarial losses, changed models, AdaGrad;
each against the code it calls, or what it must be equal to.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.test_studies import with_test_split
from workbench.errors import BadInput
from workbench.subjects import Subject, subject
from workbench.training import OptimizerComparison, SelfTuning, Train
from workbench.training.batch.normalisation import GhostBatchNorm, OverTokens, WeightStandardization
from workbench.training.models.lipschitz import LipschitzTransformer
from workbench.training.models.self_tuning import Hyperparameter, Setting, self_tuning, settled
from workbench.training.optimizer.agvm import AGVM
from workbench.training.optimizer.optimizers import make_optimizer

FEW = {"steps": 3, "batch_size": 16}


def weights(on: Subject | None) -> torch.Tensor:
    assert on is not None
    return nn.utils.parameters_to_vector(on.model.parameters()).detach()


def test_agvm_splits_an_optimizer_by_module_and_at_factors_of_one_is_the_inner_one(cache: Path) -> None:
    on = subject("digits-vit")
    made = make_optimizer("agvm", 0.1, 0.01)(on.model)
    assert isinstance(made.prepare, AGVM)  # type: ignore[attr-defined]
    modules = [group["module"] for group in made.param_groups]
    blocks = [name for name, _ in on.blocks()]
    assert set(blocks) < set(modules) and modules[0] == "vit.embeddings"
    assert sum(len(group["params"]) for group in made.param_groups) == len(list(on.model.parameters()))
    still = {"name": "agvm", "average": 1.0}  # an average that never moves leaves every factor at one
    runs = [Train(**FEW, optimizer=name, learning_rate=0.1) for name in (still, "sgd")]  # type: ignore[arg-type]
    first, second = (run.run(on, cache=False) for run in runs)
    assert torch.equal(weights(first.subject), weights(second.subject))
    moved = Train(**FEW, optimizer="agvm", learning_rate=0.1, **{"optimizer.every": 1}).run(on, cache=False)  # type: ignore[arg-type]
    assert not torch.equal(weights(moved.subject), weights(second.subject))


def test_what_agvm_cannot_scale_is_refused_before_the_run() -> None:
    on = subject("digits-vit")
    for fields, says in (
        ({"optimizer": {"name": "agvm", "inner": "muon"}}, "take sgd, adamw"),
        ({"optimizer": "agvm", "schedule": "plateau"}, "scales it in every step"),
    ):
        with pytest.raises(BadInput, match=says):
            Train(**fields).check(on)  # type: ignore[arg-type]


def test_adagrad_is_torchs_own() -> None:
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3)
    for model, optimizer in (
        (ours, make_optimizer("adagrad", 0.1)(ours)),
        (theirs, torch.optim.Adagrad(theirs.parameters(), lr=0.1)),
    ):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert torch.allclose(ours.weight, theirs.weight) and torch.allclose(ours.bias, theirs.bias)


def test_an_adversarial_loss_trains_another_model_and_needs_continuous_inputs(cache: Path) -> None:
    on = subject("digits-vit")
    plain, hard = (Train(**FEW, loss=name).run(on, cache=False) for name in ("task", "concurrent-adversary"))  # type: ignore[arg-type]
    assert hard.table["loss"][0] > plain.table["loss"][0]
    assert not torch.equal(weights(hard.subject), weights(plain.subject))
    with pytest.raises(BadInput, match="continuous"):
        Train(loss="concurrent-adversary").check(subject("hidden-markov"))


def test_ghost_batch_norm_takes_the_place_of_every_norm_and_is_not_saved(tmp_path: Path, cache: Path) -> None:
    on = subject("digits-vit")
    layer_norms = sum(isinstance(m, nn.LayerNorm) for m in on.model.modules())
    made = Train(**FEW, model_change={"name": "ghost-batch-norm", "ghost": 8}).run(on, cache=False)  # type: ignore[arg-type]
    assert made.subject is not None
    norms = [m for m in made.subject.model.modules() if isinstance(m, GhostBatchNorm)]
    assert len(norms) == layer_norms and {norm.ghost for norm in norms} == {8}
    assert not any(isinstance(m, nn.LayerNorm) for m in made.subject.model.modules())
    assert sum(isinstance(m, nn.LayerNorm) for m in on.model.modules()) == layer_norms, "the given one stays"
    with pytest.raises(BadInput, match="ghost-batch-norm has no file format"):
        made.subject.save(tmp_path / "ghosts")


def test_a_norm_over_tokens_normalises_every_feature_over_examples_and_tokens() -> None:
    x = torch.randn(6, 5, 4) * 3 + 1
    y = OverTokens(GhostBatchNorm(4, 6)).train()(x)
    assert torch.allclose(y.flatten(0, 1).mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(y.flatten(0, 1).var(0, unbiased=False), torch.ones(4), atol=1e-3)
    flat = OverTokens(GhostBatchNorm(4, 6)).train()(x[:, 0])
    assert torch.allclose(flat.mean(0), torch.zeros(4), atol=1e-5)


def test_weight_standardisation_is_a_change_of_the_blocks_and_is_saved(tmp_path: Path, cache: Path) -> None:
    made = Train(**FEW, model_change="weight-standardization").run(subject("digits-vit"), cache=False)  # type: ignore[arg-type]
    assert made.subject is not None
    for layer in made.subject.layers("blocks"):
        assert [type(change) for change in layer.changes] == [WeightStandardization]
        assert torch.allclose(layer.weight.mean(-1), torch.zeros(layer.shape[0]), atol=1e-5)
    again = subject(str(made.subject.save(tmp_path / "standardised")))
    assert again.evaluate("test", limit=32)["loss"] == pytest.approx(
        made.subject.evaluate("test", limit=32)["loss"], rel=1e-5
    )


def test_a_lipschitz_transformer_is_trained_in_a_language_models_place(cache: Path) -> None:
    change = {"name": "lipschitz-transformer", "width": 8}
    made = Train(**FEW, model_change=change).run(subject("hidden-markov"), cache=False)  # type: ignore[arg-type]
    assert made.subject is not None and isinstance(made.subject.model, LipschitzTransformer)
    assert made.facts["lipschitz_certificate"] == pytest.approx(made.subject.model.certificate())
    assert "test_loss" in made.facts
    with pytest.raises(BadInput, match="next token"):
        Train(model_change=change).check(subject("digits-vit"))  # type: ignore[arg-type]


def test_settled_layers_compute_what_the_responding_ones_do_at_the_centre() -> None:
    torch.manual_seed(0)
    setting = Setting([Hyperparameter("l2", 0.3)])
    model = self_tuning(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False)), setting)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(5, 4)
    expected = model(x).detach()
    assert torch.allclose(settled(model)(x), expected, atol=1e-6)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear] and model[2].bias is None


def test_self_tuning_returns_a_plain_model_and_what_it_learned(tmp_path: Path, cache: Path) -> None:
    on = subject("digits-vit")
    made = SelfTuning(rounds=12, warmup_rounds=4, batch_size=16).run(on, cache=False)
    assert made.subject is not None and len(made.table) == 12
    assert made.facts["l2"] != pytest.approx(1e-4) and 0 < made.facts["dropout"] < 1
    assert set(map(type, made.subject.model.modules())) == set(map(type, on.model.modules()))
    again = subject(str(made.subject.save(tmp_path / "tuned")))
    assert again.evaluate("validation")["loss"] == pytest.approx(made.facts["validation_loss"], rel=1e-4)


def test_budgets_of_time_give_a_slower_optimizer_fewer_steps(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OptimizerComparison, "seconds_per_step", lambda self, on, optimizers: [1.0, 4.0])
    study = OptimizerComparison(
        optimizers=["adamw", "sophia"],
        equal="time",
        examples=160,
        batch_size=20,
        learning_rate_points=1,
        seeds=1,
        evaluate_limit=20,
        workers=1,
    )
    on = with_test_split()
    result = study.run(on, cache=False)
    monkeypatch.setattr(OptimizerComparison, "seconds_per_step", lambda self, on, optimizers: [4.0, 1.0])
    assert study.run(on, cache=False).facts["seconds_per_step_sophia"] == 4.0, "timed once"
    steps = (result.tables or {})["curves"].groupby("name")["step"].max()
    assert steps["adamw"] == 8 and steps["sophia"] == 2
    assert result.facts["seconds_per_step_sophia"] == 4.0
    with pytest.raises(BadInput, match="budgets of examples"):
        study.with_fields(baseline_budgets=(0.5, 2.0, 4.0)).check(on)
