"""Bit allocation: published configurations, brute force, and the instruments on small models."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import workbench
from workbench.curvature.estimators.gauss_newton import gauss_newton_scores
from workbench.curvature.estimators.quadratic import measured_change, predicted_change
from workbench.curvature.operators.curvature_operator import curvature_operator
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization import Allocate, LayerSensitivity
from workbench.quantization.allocation.integer_program import (
    allocate,
    front,
    with_interactions,
)
from workbench.quantization.allocation.layer_sensitivity import (
    alone,
    candidates,
    top_eigenvalues,
    traces,
)
from workbench.quantization.allocation.width_cost import WIDTH_COST
from workbench.quantization.quantize import Quantize
from workbench.statistics import second_moments
from workbench.subjects import Subject


@pytest.mark.parametrize("cost", ["modelsize", "bops", "latency"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_published_configurations_of_hawq_v3(shared: Path, cost: str, share: float) -> None:
    folder = shared / "data" / "hawq_ilp"
    table = json.loads((folder / "hawqv3_sensitivity.json").read_text())["resnet18"]
    published = json.loads((folder / "published_bits_per_layer.json").read_text())[
        f"resnet18_{cost}_{share:g}"
    ]
    trace = np.array(table["Hutchinson_trace"])
    sensitivity = np.stack(
        [trace * table["delta_weights_4bit_square"], trace * table["delta_weights_8bit_square"]], 1
    )
    parameters, operations = np.array(table["parameters"]), np.array(table["bops"])
    size = {
        "modelsize": np.stack([parameters / 2, parameters], 1),
        "bops": np.stack([operations / 64, operations / 16], 1),
        "latency": np.stack([table["latency_int4"], table["latency_int8"]], 1),
    }[cost]
    low, high = size.sum(0)
    found = allocate(
        sensitivity, size, low + (high - low) * share, [tuple(pair) for pair in table["tie_equal"]]
    )
    assert [4 if k == 0 else 8 for k in found.choice] == published
    assert found.bound == pytest.approx(found.cost, rel=1e-6)


def test_equals_brute_force() -> None:
    random = np.random.default_rng(0)
    for _ in range(5):
        cost, size = np.sort(random.random((5, 3)), 1)[:, ::-1], np.sort(random.random((5, 3)), 1)
        budget = 0.5 * (size[:, 0].sum() + size[:, -1].sum())
        best = min(
            cost[np.arange(5), c].sum()
            for c in itertools.product(range(3), repeat=5)
            if size[np.arange(5), c].sum() <= budget
        )
        assert allocate(cost, size, budget).cost == pytest.approx(best)


def test_the_optimum_is_certified_for_many_layers() -> None:
    """Costs over six orders of magnitude: what the solver leaves open is nothing beside the optimum."""
    random = np.random.default_rng(0)
    widths, weights = np.array([2, 3, 4, 5, 6, 8.0]), random.integers(1, 9, 400) * 36864.0
    cost = random.lognormal(0, 1.2, 400)[:, None] * weights[:, None] * 4.0**-widths
    for average in (3.0, 6.3):
        found = allocate(cost, weights[:, None] * widths, average * weights.sum())
        assert found.bound == pytest.approx(found.cost, rel=1e-8)


def test_the_front_falls_and_fits() -> None:
    random = np.random.default_rng(1)
    cost, size = np.sort(random.random((8, 4)), 1)[:, ::-1], np.tile([2.0, 3.0, 4.0, 8.0], (8, 1))
    found = front(cost, size, 20)
    assert all(a.cost > b.cost and a.size < b.size for a, b in itertools.pairwise(found))
    assert found[0].size == 16 and found[-1].cost == pytest.approx(cost[:, -1].sum())


def test_interactions_are_found_by_exchanges() -> None:
    """Two layers whose errors cancel: cheap together, dear alone; the separable program cannot know."""
    table = np.zeros((3, 2, 3, 2))
    for i, own in enumerate((1.0, 1.0, 0.8)):
        table[i, 0, i, 0] = own
    table[0, 0, 1, 0] = table[1, 0, 0, 0] = -0.9
    size = np.tile([1.0, 2.0], (3, 1))
    separable = np.stack([table[i, :, i, :].diagonal() for i in range(3)])
    start = allocate(separable, size, 4.0)
    found = with_interactions(table, size, 4.0, list(start.choice))
    assert list(found.choice) == [0, 0, 1] and found.cost == pytest.approx(0.2)


@pytest.mark.parametrize(("budget", "cost"), [(1.0, [[1.0, 0.0]] * 3), (9.0, [[np.nan, 0.0]] * 3)])
def test_impossible_requests_say_why(budget: float, cost: list[list[float]]) -> None:
    with pytest.raises(BadInput, match=r"budget|cost"):
        allocate(cost, [[2.0, 4.0]] * 3, budget)


@pytest.fixture(scope="module")
def bert(checkpoints: dict[str, Path]) -> Subject:
    return workbench.subject(checkpoints["bert"], data="random")


def test_alone_equals_one_prediction_for_each_layer(bert: Subject) -> None:
    layers = bert.layers("*.0.*")
    _, deltas = candidates(
        bert, layers, [Quantize(format=f"int{b}", group_size=16) for b in (2, 4)], 4, Progress()
    )
    found = alone(bert, layers, deltas, examples=4, batch_size=2)
    for layer in layers:
        for row, delta in enumerate(deltas[layer.name]):
            one = predicted_change(bert, {layer.name: delta}, examples=4, batch_size=2)
            assert found[layer.name][row] == pytest.approx((one.first, one.second), rel=1e-3, abs=1e-9)


def test_gauss_newton_scores_are_the_sampled_fisher_of_the_operator(bert: Subject) -> None:
    """With the same draws: squares are each change alone, products are pairs,
    and the pairs of one choice add up to 1/2 D.F D of that choice.
    """
    layers = bert.layers("*.0.*")[:3]
    _, deltas = candidates(
        bert, layers, [Quantize(format=f"int{b}", group_size=16) for b in (2, 4)], 4, Progress()
    )
    scores = gauss_newton_scores(bert, layers, deltas, examples=4, samples=3, seed=5)
    joint = np.einsum("sia,sjb->iajb", scores, scores)
    with curvature_operator(
        bert,
        "mc-fisher",
        layers=",".join(layer.name for layer in layers),
        examples=4,
        batch_size=4,
        samples=3,
        seed=5,
    ) as operator:

        def half_quadratic(chosen: dict[str, int]) -> float:
            vector = torch.cat(
                [
                    (
                        deltas[layer.name][chosen[layer.name]]
                        if layer.name in chosen
                        else torch.zeros(layer.shape)
                    ).reshape(-1)
                    for layer in layers
                ]
            )[None]
            return 0.5 * float((operator.matmat(vector) * vector).sum())

        for i, layer in enumerate(layers):
            for a in range(2):
                assert joint[i, a, i, a] == pytest.approx(half_quadratic({layer.name: a}), rel=1e-3)
        choice = [0, 1, 1]
        whole = half_quadratic({layer.name: a for layer, a in zip(layers, choice, strict=True)})
    assert sum(
        joint[i, a, j, b] for i, a in enumerate(choice) for j, b in enumerate(choice)
    ) == pytest.approx(whole, rel=1e-3)


def test_gauss_newton_scores_are_unbiased(bert: Subject) -> None:
    layers = bert.layers("*.0.*")[:2]
    _, deltas = candidates(bert, layers, [Quantize(format="int2", group_size=16)], 4, Progress())
    squares = np.square(gauss_newton_scores(bert, layers, deltas, examples=4, samples=200)[:, :, 0])
    with curvature_operator(
        bert, "ggn", layers=",".join(layer.name for layer in layers), examples=4, batch_size=4
    ) as operator:
        for row, piece in enumerate(operator.slices):
            vector = torch.zeros(1, operator.size)
            vector[0, piece] = deltas[layers[row].name][0].reshape(-1)
            exact = 0.5 * float((operator.matmat(vector) * vector).sum())
            assert abs(squares[:, row].sum() - exact) < 4 * squares[:, row].std(ddof=1) * len(squares) ** 0.5


def test_allocation_with_interactions_costs_no_more_than_without(bert: Subject) -> None:
    result = Allocate(
        layers="*.layer.0.*",
        budget=3,
        widths=[2, 4],
        group_size=16,
        calibration_examples=4,
        predict_examples=4,
        draws=1,
        test_examples=4,
        **{"sensitivity.interactions": True},
    ).run(bert, Progress(), cache=False)
    table = result.table.set_index("strategy")
    assert result.table["strategy"].iloc[0] == "with interactions" and result.facts[
        "predicted_change"
    ] == pytest.approx(table.loc["with interactions", "joint_cost"])
    assert table.loc["with interactions", "joint_cost"] <= table.loc["integer program", "joint_cost"] + 1e-12
    assert (table["code_bits"] <= 3 + 1e-9).all() and result.facts["additive_loss"] == table.loc[
        "integer program", "loss"
    ]
    with pytest.raises(BadInput, match="interactions"):
        Allocate(**{"sensitivity": "trace", "sensitivity.interactions": True}).run(
            bert, Progress(), cache=False
        )


def test_measured_alone_equals_measured_change(bert: Subject) -> None:
    result = LayerSensitivity(
        layers="*.0.*", widths=[2], group_size=16, calibration_examples=4, predict_examples=4
    ).run(bert, Progress(), cache=False)
    quantizer = Quantize(format="int2", group_size=16)
    layers = bert.layers("*.0.*")
    _, deltas = candidates(bert, layers, [quantizer], 4, Progress())
    for layer, measured in zip(layers, result.table["measured_change"], strict=True):
        assert measured == pytest.approx(
            measured_change(bert, {layer.name: deltas[layer.name][0]}, examples=4), abs=1e-7
        )
    assert result.facts["rank_correlation"] > 0.8


def test_traces_are_unbiased() -> None:
    """Softmax regression at zero weights on the digits: the trace is known exactly."""
    on = workbench.subject("digits-softmax")
    layers = on.layers("*")
    found = traces(on, layers, 60, 256, torch.Generator().manual_seed(0), split="train")
    estimate, error = found[layers[0].name]
    inputs = on.split("train")["inputs"][:256]
    # H = (I - 11'/C)/C kron X'X/n
    assert abs(estimate - 0.9 * float(inputs.square().sum(1).mean())) < 4 * error and error < 1.0


def test_top_eigenvalue_is_the_known_one() -> None:
    """The same Hessian: its top eigenvalue is that of X'X/n over C,
    whatever share of the data is repeated.
    """
    on = workbench.subject("digits-softmax")
    split = {k: v[:200].repeat(2, *[1] * (v.ndim - 1)) for k, v in on.split("train").items()}
    layers = on.layers("*")
    ((mean, deviation),) = top_eigenvalues(
        on.with_split("calibration", split), layers, 2, 400, torch.Generator().manual_seed(0), iterations=30
    ).values()
    inputs = split["inputs"][:200].double()
    assert mean == pytest.approx(float(torch.linalg.eigvalsh(inputs.T @ inputs / 200)[-1]) / 10, rel=1e-4)
    assert deviation < 1e-4 * mean


@pytest.mark.parametrize(
    "sensitivity", ["curvature", "gauss-newton", "trace", "eigenvalue", "variance", "output", "measured"]
)
def test_allocate(bert: Subject, sensitivity: str) -> None:
    settings = {
        "layers": "*.0.*",
        "budget": 3.0,
        "widths": [2, 4],
        "group_size": 16,
        "calibration_examples": 4,
        "predict_examples": 4,
        "draws": 1,
        "test_examples": 8,
        "sensitivity": sensitivity,
    }
    if "probes" in WIDTH_COST[sensitivity].options.model_fields:
        settings["sensitivity.probes"] = 2
    result = Allocate(**settings).run(bert, Progress(), cache=False)
    assert result.table["code_bits"].max() <= 3.0 + 1e-9
    assert result.table.loc[0, "cost"] == pytest.approx(result.table["cost"].min())
    assert result.subject is not None and result.tables is not None
    widths = result.widths_for(3.0)  # type: ignore[attr-defined]
    chosen = result.tables["widths"].query("strategy == 'integer program'").set_index("layer")["width"]
    weights = {layer.name: layer.original.numel() for layer in bert.layers("*.0.*")}
    assert (
        sum(widths[k] * n for k, n in weights.items())
        <= sum(chosen[k] * n for k, n in weights.items()) + 1e-9
    )
    for view in ("front", "widths", "strategies"):
        assert result.figure(view=view).data


def test_multiplications_count_the_tokens_a_layer_sees(checkpoints: dict[str, Path]) -> None:
    """Of a mixture of experts each token is seen by its chosen experts alone,
    of the attention by all of them.
    """
    on = workbench.subject(checkpoints["mixtral"], data="random")
    result = Allocate(
        layers="*.0.*",
        budget=3.0,
        average="multiplications",
        widths=[2, 4],
        group_size=16,
        calibration_examples=4,
        predict_examples=4,
        draws=0,
        test_examples=8,
        sensitivity="output",
    ).run(on, Progress(), cache=False)
    layers = on.layers("*.0.*")
    tokens = {n: float(m.tokens.sum()) for n, m in second_moments(on, layers, "calibration", 4).items()}
    work = {layer.name: math.prod(layer.shape[-2:]) * tokens[layer.name] for layer in layers}
    assert len(set(tokens.values())) > 1
    assert result.tables is not None
    widths = result.tables["widths"].query("strategy == 'integer program'").set_index("layer")["width"]
    assert (
        result.facts["code_bits"]
        == pytest.approx(sum(widths[n] * w for n, w in work.items()) / sum(work.values()))
        and result.facts["code_bits"] <= 3
    )


def test_latency_budget_is_the_time_of_the_uniform_width(bert: Subject, tmp_path: Path) -> None:
    """Times where only the intermediate layer gains from few bits:
    the optimum within the time, found by brute force.
    """
    layers = bert.layers("*.0.*")
    (path := tmp_path / "times.csv").write_text(
        "layer,width,milliseconds\n*,2,1.0\n*,4,1.25\n*intermediate*,2,1\n*intermediate*,4,9\n"
    )
    settings: dict[str, Any] = dict(
        layers="*.0.*",
        budget=3.0,
        widths=[4, 2],
        group_size=16,
        calibration_examples=4,
        predict_examples=4,
        draws=1,
        test_examples=8,
        average="latency",
    )
    result = Allocate(**settings, times=str(path)).run(bert, Progress(), cache=False)
    allowed = (1.0 * len(layers) + 1.25 * (len(layers) - 1) + 9) / 2
    assert (result.table["milliseconds"] <= allowed + 1e-9).all()
    assert result.tables is not None
    cost = (
        result.tables["sensitivity"]
        .pivot(index="layer", columns="width", values="cost")
        .loc[[layer.name for layer in layers]]
        .to_numpy()
    )
    times = np.array([[1.0, 9.0] if "intermediate" in layer.name else [1.0, 1.25] for layer in layers])
    rows = np.arange(len(layers))
    best = min(
        cost[rows, c].sum()
        for c in map(list, itertools.product(range(2), repeat=len(layers)))
        if times[rows, c].sum() <= allowed
    )
    assert result.table["cost"].iloc[0] == pytest.approx(best)
    before = Allocate(**settings, times=str(path)).key(bert)
    for text, message in (
        ("layer,width\n*,2\n", "milliseconds"),
        ("layer,width,milliseconds\n*,2,1\n*,4,-1\n", "line 3"),
        ("layer,width,milliseconds\n*,2,1\n", "width 4"),
    ):
        path.write_text(text)
        with pytest.raises(BadInput, match=message):
            Allocate(**settings, times=str(path)).run(bert, Progress(), cache=False)
    assert (
        Allocate(**settings, times=str(path)).key(bert) != before
    )  # another file under the same name is another run
    for times_of in ("", str(tmp_path / "nowhere.csv")):
        with pytest.raises(BadInput, match="times"):
            Allocate(**settings, times=times_of).run(bert, Progress(), cache=False)


@pytest.mark.parametrize("fields", [{"budget": 1.5}, {"widths": [2, 2, 4]}, {"widths": [2, 12], "budget": 3}])
def test_allocate_refuses(bert: Subject, fields: dict[str, object]) -> None:
    with pytest.raises(BadInput, match=r"budget|widths|bits"):
        Allocate(**fields).run(bert, Progress(), cache=False)
