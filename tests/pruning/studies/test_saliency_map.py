from __future__ import annotations

import numpy as np
import pytest
import torch

import workbench
from workbench import BadInput
from workbench.evidence.pruning.leaderboard import curves, leaderboard, summary
from workbench.progress import Progress
from workbench.pruning import Prune, SaliencyMap
from workbench.pruning.studies.saliency_map import LEVELS, order_statistics
from workbench.subjects.structure.units import discover


@pytest.fixture(scope="module")
def found():
    vit = workbench.subject("digits-vit")
    return vit, SaliencyMap(gradients=16, calibration_examples=16).run(vit, Progress())


def test_a_threshold_on_the_ranks_is_the_methods_own_mask(found):
    vit, result = found
    for method in result.methods:
        pruned = Prune(
            method=method,
            sparsity=0.5,
            compensation="none",
            calibration_examples=16,
            predict_examples=0,
            sequential=False,
        )
        pruned = pruned.with_gradients(16).run(vit, Progress(), cache=False)
        same = [
            np.mean(result.mask(method, layer.name, 0.5) == (layer.weight != 0).numpy())
            for layer in pruned.subject.layers()
        ]
        assert min(same) > 0.97 and np.mean(same) > 0.99


def test_ranks_are_sparsities():
    ranks = order_statistics(torch.tensor([[3.0, 1.0, 2.0, 1.0]]))
    assert ranks.tolist() == [[LEVELS, 0, LEVELS * 2 // 3, LEVELS // 3]]


def test_overlap_and_predictions_are_what_counting_gives(found):
    vit, result = found
    row = result.tables["overlap"].query("sparsity == 0.5").iloc[0]
    both = either = 0
    for layer in vit.layers():
        a, b = result.mask(row.a, layer.name, 0.5), result.mask(row.b, layer.name, 0.5)
        both, either = both + (a & b).sum(), either + (a | b).sum()
    assert row.jaccard == pytest.approx(both / either, abs=1e-3)
    losses = [result.predicted("obd", s) for s in (0.2, 0.5, 0.8)]
    assert losses == sorted(losses) and losses[-1] < result.predicted("magnitude", 0.8)
    for show in ("density", "heads", "predicted", "overlap"):
        assert len(result.figure(show=show, sparsity=0.5).data)
    measured = result.measure(vit, "obd", 0.3, limit=100)
    assert measured["loss"] == pytest.approx(vit.evaluate("validation", limit=100)["loss"], abs=0.05)


def test_a_heads_density_is_that_of_its_rows_and_columns(found):
    vit, result = found
    (group, *_), heads = discover(vit.model, ("heads",)), result.tables["heads"]
    assert list(heads.label[: group.units]) == [f"0.{h}" for h in range(group.units)] and set(
        heads["attention"]
    ) == {g.name for g in discover(vit.model, ("heads",))}
    shares = result.head_densities("obd", 0.75)  # a threshold on the border of a bin is exact
    for head in range(group.units):
        kept = total = 0
        for member in group.members:
            mask = result.mask("obd", member.layer.name, 0.75)
            part = (mask if member.axis == -2 else mask.T)[member.index[head].numpy()]
            kept, total = kept + part.sum(), total + part.size
        assert shares[head] == pytest.approx(kept / total) and total == heads.weights[head]


def test_only_methods_with_scores_of_single_weights(found):
    with pytest.raises(BadInput, match="methods"):
        SaliencyMap(methods="magnitude,ziplm").run(found[0], Progress())


def test_leaderboard_has_every_run_and_exact_intervals():
    board = leaderboard("digits-vit", ["magnitude", "random"], [0.5], seeds=(0, 1), progress=Progress())
    assert len(board) == 4
    table = summary(board).set_index("method")
    values = board[board.method == "magnitude"].loss.to_numpy()
    assert table.loc["magnitude", "mean"] == pytest.approx(values.mean())
    assert table.loc["magnitude", "half_width"] == pytest.approx(
        12.706205 * abs(values[0] - values[1]) / 2, rel=1e-5
    )  # t quantile, one degree of freedom
    assert list(table.index) == ["magnitude", "random"]
    assert len(curves(board, "accuracy").data) >= 2
