"""Budgets of an allocation: exact on small problems, bytes as they are saved, nothing asked twice."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.measures.test_measures import examples, on
from workbench.cli import main
from workbench.errors import BadInput
from workbench.measures import compare, size_of
from workbench.progress import Progress
from workbench.quantization import Allocate, AllocationScores, Quantize, to_compressed_tensors
from workbench.quantization.allocation.budget import Budget, Problem, budget_of, solved
from workbench.quantization.allocation.solver import WIDTH_SOLVER
from workbench.quantization.number.fake_quant import FakeQuant
from workbench.quantization.number.packing import packed_layer
from workbench.subjects import Subject

SMALL: dict[str, Any] = {
    "widths": [2, 4, 8],
    "group_size": 16,
    "calibration_examples": 4,
    "predict_examples": 2,
    "sensitivity.probes": 2,
    "swap_examples": 4,
}
SOLVERS = tuple(WIDTH_SOLVER)


def subject(architecture: str = "llama", noise: float = 0.2) -> Subject:
    made = on(architecture, examples(architecture), noise)
    made.splits |= {name: made.splits["test"] for name in ("calibration", "train", "validation")}
    return made


@pytest.fixture(scope="module")
def dense() -> Subject:
    return subject()


@pytest.fixture(scope="module")
def scores(dense: Subject) -> Any:
    return AllocationScores(**SMALL, swaps=1).run(dense, Progress(), cache=False)


def problem(seed: int, whole: bool = True) -> Problem:
    """Five layers at three widths; sizes that share a unit, or none."""
    random = np.random.default_rng(seed)
    weights = random.integers(1, 6, 5) * 64.0
    widths = (2, 3, 8)
    cost = np.sort(random.lognormal(0, 1, (5, 3)), 1)[:, ::-1].copy()
    bytes_ = weights[:, None] * (np.array(widths) + 0.25) / 8
    if not whole:
        bytes_ = bytes_ + np.sort(random.random((5, 3)), 1)
    names = tuple(f"layer{i}" for i in range(5))
    return Problem(names, widths, cost, bytes_, weights, weights * random.integers(1, 9, 5), 1000.0, "kl")


def everything(given: Problem) -> list[np.ndarray]:
    return [np.array(c) for c in itertools.product(range(3), repeat=5)]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(4))
def test_every_budget_is_met_at_the_least_cost(solver: str, seed: int, tmp_path: Path) -> None:
    """Against all 243 allocations, for each kind of budget."""
    given, choice = problem(seed), WIDTH_SOLVER.chosen(solver)
    (times := tmp_path / "times.csv").write_text(
        "layer,width,milliseconds\n*,2,1\n*,3,2\n*,8,4\nlayer3,2,3\nlayer3,3,1\n"
    )
    taken = {
        "budget": given.code_bits,
        "bits": given.bits,
        "size": given.total_bytes,
        "milliseconds": lambda c: float(given.times(str(times))[given.rows, c].sum()),
    }
    wanted = {"budget": 4.0, "bits": 4.1, "size": 1600.0, "milliseconds": 9.0}
    for field, value in wanted.items():
        asked = budget_of(**{field: value, "times": str(times)})
        if field == "size":
            low, high = (given.total_bytes(np.full(5, k)) for k in (0, 2))
            asked = Budget(field, value := (low + high) / 2)
        found, _, _ = solved(given, asked, choice)
        assert taken[field](found.choice) <= value * (1 + 1e-9)
        best = min(given.damage(c) for c in everything(given) if taken[field](c) <= value * (1 + 1e-9))
        assert given.damage(found.choice) == pytest.approx(best)
    target = float(np.median([given.damage(c) for c in everything(given)]))
    found, _, limit = solved(given, Budget("target_kl", target), WIDTH_SOLVER.chosen("integer-program"))
    assert given.damage(found.choice) <= target
    least = min(given.total_bytes(c) for c in everything(given) if given.damage(c) <= target)
    assert given.total_bytes(found.choice) == pytest.approx(least)
    assert limit + given.rest == pytest.approx(least)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("whole", [True, False], ids=["one unit", "no unit"])
def test_more_bytes_never_cost_more(solver: str, whole: bool) -> None:
    given = problem(5, whole)
    low, high = given.bytes.min(1).sum(), given.bytes.max(1).sum()
    costs = []
    for limit in np.linspace(low * (1 + 1e-12), high * 1.05, 60):
        found = WIDTH_SOLVER.chosen(solver)(given.cost, given.bytes, limit)
        assert given.bytes[given.rows, found.choice].sum() <= limit
        costs.append(found.cost)
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(costs))
    assert costs[-1] == pytest.approx(given.cost.min(1).sum())


def test_steps_use_a_budget_less_fully_but_keep_to_it() -> None:
    given = problem(2, whole=False)
    limit = float(given.bytes.mean(1).sum())
    exact, coarse = (
        WIDTH_SOLVER.chosen({"name": "dynamic-program", "steps": steps})(given.cost, given.bytes, limit)
        for steps in (1_000_000, 100)
    )
    best = min(given.damage(c) for c in everything(given) if given.bytes[given.rows, c].sum() <= limit)
    assert exact.cost == pytest.approx(best) and coarse.cost >= exact.cost - 1e-12
    assert max(exact.size, coarse.size) <= limit


def test_a_later_budget_asks_nothing_of_the_model(dense: Subject, scores: Any) -> None:
    """Kind: what was computed once is computed again because something that it does not rest on changed."""
    asked = []
    handle = dense.model.register_forward_pre_hook(lambda *_: asked.append(1))
    try:
        small, large = (scores.allocation(size=size) for size in ("40kB", "60kB"))
        by_bits = scores.allocation(bits=large.bits)
        by_kl = scores.allocation(target_kl=small.predicted)
    finally:
        handle.remove()
    assert not asked
    assert small.bytes <= 40_000 and large.bytes <= 60_000 and large.predicted < small.predicted
    assert by_bits.predicted == pytest.approx(large.predicted)
    assert by_kl.bytes <= small.bytes + 1e-6 and by_kl.predicted <= small.predicted * (1 + 1e-9)
    plans = [Allocate(**SMALL, swaps=1, draws=1, **more) for more in ({"bits": 4}, {"size": "50kB"}, {})]
    assert len({plan.scorer().key(dense) for plan in plans}) == 1
    assert len({plan.key(dense) for plan in plans}) == 3


def test_what_is_not_to_be_saved_is_said_before_it_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: a save that is refused after hours."""
    options = ["--subject", "nowhere", "--draws", "0", "--out", str(tmp_path / "out")]
    assert main(["run", "allocate", *options]) == 2
    assert "draws: this allocation was not measured" in capsys.readouterr().err


def test_scores_are_kept_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: the same; a second allocation of a subject finds the scores of the first on disk."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    made = subject()
    first = Allocate(**SMALL, layers="*.0.mlp.*", swaps=1, bits=4, draws=1, test_examples=4)
    first.run(made, Progress())
    assert first.scorer().stored(made)
    told = first.with_fields(bits=4.5).foretold_words(made)
    scores: Any = first.scorer().run(made, Progress())
    assert f"gives {scores.allocation(bits=4.5).words()}; " in told
    assert "measuring 4 allocations takes about" in told
    assert "has no scores yet" in first.with_fields(group_size=8).foretold_words(made)
    monkeypatch.setattr(AllocationScores, "_run", None)
    again = first.with_fields(bits=5.0).run(subject(), Progress())
    assert again.facts["average_bits"] <= 5


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
def test_size_is_that_of_the_saved_model(narrow: bool, tmp_path: Path) -> None:
    """Kind: what is promised and what is written are counted by two rules. All that has to be stored, written
    to one file; layers that stay in bfloat16 take two bytes a weight also beside rounded ones that could not.
    """
    made = subject()
    if narrow:
        with torch.no_grad():
            for parameter in made.model.parameters():
                parameter.copy_(parameter.bfloat16().float())
    wanted = 0.7 * size_of(made).bytes
    result = Allocate(**SMALL, layers="*.mlp.*", swaps=0, size=f"{wanted:.0f}", draws=1, test_examples=4).run(
        made, Progress(), cache=False
    )
    changed = result.subject
    bytes_ = size_of(changed).bytes
    assert result.facts["bytes"] == pytest.approx(bytes_) and bytes_ <= wanted
    answer = result.allocation(size=f"{wanted:.0f}")  # type: ignore[attr-defined]
    assert answer.bytes == pytest.approx(bytes_)
    assert 8 * sum(
        layer.changes[0].stored_bytes(layer.shape, None) for layer in changed.layers("*.mlp.*")
    ) / sum(layer.original.numel() for layer in changed.layers("*.mlp.*")) == pytest.approx(answer.bits)
    rounded = {layer.name: layer for layer in changed.layers("*") if layer.changes}
    tensors = {
        name: value.to(torch.bfloat16 if narrow else torch.float32).clone()
        for name, value in changed.model.named_parameters()
        if "parametrizations" not in name
    }
    for name, layer in rounded.items():
        tensors |= {f"{name}.{key}": value for key, value in packed_layer(layer).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") + 8
    real = (tmp_path / "model.safetensors").stat().st_size - header
    assert real == pytest.approx(bytes_, rel=0.01)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"bits": 3, "size": "80MB"}, "size: 80MB is given beside bits 3.0"),
        ({"budget": 3, "target_kl": 0.1}, "target_kl: 0.1 is given beside budget 3.0"),
        ({"budget": 3, "milliseconds": 2.0}, "milliseconds: 2.0 is given beside budget 3.0"),
        ({"budget": 0}, "budget: none is given"),
        ({"size": "many"}, "size: 'many' is no number of bytes"),
        ({"size": "80MB", "average": "multiplications"}, "average: multiplications"),
        ({"bits": 4, "average": "latency", "times": "times.csv"}, "average: latency"),
        ({"milliseconds": 3}, "times: average latency needs a CSV"),
        ({"size": "1kB"}, "size: 1,000 bytes cannot be met: embeddings and layers that stay take"),
        ({"bits": 2.0}, "bits: 2.0000 cannot be met"),
        ({"target_kl": 1e-9}, "target_kl: 1e-09 cannot be met"),
        ({"target_kl": 0.1, "sensitivity": "output", "swaps": 0}, "target_kl: these scores do not predict"),
        ({"bits": 4, "sensitivity.interactions": True, "swaps": 2}, "swaps: costs of pairs"),
    ],
)
def test_what_cannot_be_met_is_one_line(dense: Subject, fields: dict[str, Any], told: str) -> None:
    given = SMALL | {"layers": "*.0.mlp.*"} | fields
    if fields.get("sensitivity"):
        given.pop("sensitivity.probes")
    if "swaps" not in fields:
        given["swaps"] = 0
    with pytest.raises(BadInput) as caught:
        Allocate(**given, draws=1, test_examples=4).run(dense, Progress(), cache=False)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("fields", [{"size": "1kB"}, {"bits": 0.5}])
def test_what_no_codes_can_meet_is_refused_before_anything_is_scored(dense: Subject, fields: Any) -> None:
    """Scoring went over the whole model first."""
    asked = Allocate(**(SMALL | {"swaps": 0} | fields), draws=1, test_examples=4)
    with pytest.raises(BadInput, match="cannot be met"):
        asked.check(dense)


def test_swapped_blocks_cost_what_they_do_alone(dense: Subject, scores: Any) -> None:
    """Kind: a prediction that was never beside a measurement. The corrected costs of a block add up to the
    divergence of the dense model with that block rounded, built by hand.
    """
    table = scores.table
    (block,) = set(scores.tables["blocks"]["block"])
    for width in SMALL["widths"]:
        rounded = Quantize(
            layers=f"{block}.*",
            format={"name": "int", "bits": width, "symmetric": False},
            group_size=16,
            range="mse",
            rounding="gptq",
            sequential=False,
            calibration_examples=4,
            predict_examples=0,
            test_examples=0,
        ).run(dense, Progress(), cache=False)
        want = compare(dense, rounded.subject, "calibration", 4).measures()["kl"]
        mine = table[(table["block"] == block) & (table["width"] == width)]
        assert mine["cost"].sum() == pytest.approx(want, rel=1e-3, abs=1e-7)
        # within the block as the sensitivity has it
        shares = mine["uncorrected"] / mine["uncorrected"].sum()
        assert (mine["cost"] / mine["cost"].sum()).to_numpy() == pytest.approx(shares.to_numpy(), rel=1e-6)
    others = table[table["block"] != block]
    factor = scores.tables["blocks"]["measured"] / scores.tables["blocks"]["predicted"]
    assert (others["cost"] / others["uncorrected"]).to_numpy().reshape(-1, 3) == pytest.approx(
        np.tile(factor.to_numpy(), (len(others) // 3, 1))
    )


def test_an_allocation_is_measured_before_it_is_saved(dense: Subject, tmp_path: Path) -> None:
    """Kind: what nobody has compared with anything is handed on as a result."""
    plan = Allocate(**SMALL, swaps=0, bits=4.5, draws=0, test_examples=4)
    alone = plan.run(dense, Progress(), cache=False)
    for save in (
        lambda: alone.save(tmp_path / "result"),
        lambda: alone.subject.save(tmp_path / "subject"),
        lambda: to_compressed_tensors(alone.subject, tmp_path / "export"),
    ):
        with pytest.raises(BadInput, match="draws: this allocation was not measured"):
            save()
    assert not list(tmp_path.iterdir())
    beside = plan.with_fields(draws=2).run(dense, Progress(), cache=False)
    table = beside.table
    assert list(table["strategy"]) == ["integer program", "uniform", "reversed", "random 0", "random 1"]
    assert {"kl", "kl_low", "kl_high", "bytes"} <= set(table.columns)
    assert (table["average_bits"] <= 4.5 + 1e-9).all()
    assert beside.facts["predicted_kl"] == pytest.approx(table["cost"].iloc[0])
    for name in ("uniform", "random", "reversed"):
        assert beside.facts[f"{name}_kl"] > 0 and beside.facts[f"{name}_bytes"] > 0
    assert beside.figure(view="distances").data
    beside.save(tmp_path / "result")
    assert any(isinstance(c, FakeQuant) for c in beside.subject.layers()[0].changes)
