"""The flatness study's parts: a corpus whose hidden states are known, training to a given loss,
and its correlations.
"""

from __future__ import annotations

import itertools
import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from workbench.curvature import Flatness
from workbench.curvature.estimators.flatness import (
    Checkpoint,
    at_one_loss,
    probe_accuracy,
    rank_correlations,
    train,
)
from workbench.errors import BadInput
from workbench.subjects import TASK, Subject, subject
from workbench.subjects.builtin.hidden_markov import (
    Corpus,
    chain_rules,
    exact_loss,
    hidden_markov,
    small_model,
)


def transitions(corpus: Corpus) -> torch.Tensor:
    counts = torch.zeros(6, 6, dtype=torch.float64)
    counts.index_put_(
        (corpus.states[:, :-1].reshape(-1), corpus.states[:, 1:].reshape(-1)),
        torch.ones((), dtype=torch.float64),
        accumulate=True,
    )
    return counts / counts.sum(1, keepdim=True)


def test_the_chain_moves_along_one_permutation_and_is_the_same_for_every_sample() -> None:
    first, second = hidden_markov(600, seed=0), hidden_markov(600, seed=1)
    assert (
        first.tokens.shape == first.states.shape == (600, 24)
        and int(first.tokens.max()) < 24
        and int(first.tokens.min()) >= 0
    )
    assert torch.equal(hidden_markov(600, seed=0).tokens, first.tokens) and not torch.equal(
        first.tokens, second.tokens
    )
    moves, again = transitions(first), transitions(second)
    assert sorted(moves.argmax(1).tolist()) == list(range(6)) and bool((moves.max(1).values > 0.82).all())
    assert torch.allclose(moves, again, atol=0.05)
    assert not torch.allclose(moves, transitions(hidden_markov(600, seed=0, rules=1)), atol=0.05)


def test_checkpoints_fall_and_hold_the_weights_of_their_loss() -> None:
    parts = {
        name: hidden_markov(count, seed=i)
        for i, (name, count) in enumerate((("train", 256), ("validation", 64)))
    }
    splits = {name: {"input_ids": corpus.tokens, "labels": corpus.tokens} for name, corpus in parts.items()}
    subject = Subject("hidden-markov", small_model(0), TASK["causal-lm"].value(), splits)
    before = subject.evaluate("validation")["loss"]
    points = train(subject, ("adam", 3e-3, 32), 0, steps=60, every=10)
    losses = [point.loss for point in points]
    assert points[0].step == 0 and losses[0] == pytest.approx(before, rel=1e-5) and losses[-1] < before - 0.05
    assert losses == sorted(losses, reverse=True) and all(point.step % 10 == 0 for point in points)
    for point in (points[-1], points[0]):
        subject.model.load_state_dict(point.state)
        assert subject.evaluate("validation")["loss"] == pytest.approx(point.loss, rel=1e-5)


def test_the_common_loss_is_the_best_of_the_run_that_got_least_far() -> None:
    runs = [
        [Checkpoint(loss, step, {}) for step, loss in enumerate(losses)]
        for losses in ([3.0, 2.8, 2.5], [3.1, 2.9], [3.2, 2.95, 2.9, 2.85])
    ]
    assert [(point.loss, point.step) for point in at_one_loss(runs)] == [(2.8, 1), (2.9, 1), (2.9, 2)]


def test_the_least_loss_is_that_of_every_path_of_hidden_states() -> None:
    move, emit = chain_rules()
    sequences = hidden_markov(3, length=4, seed=5).tokens.numpy()

    def chance(tokens: np.ndarray) -> float:
        paths = itertools.product(range(6), repeat=len(tokens))
        return sum(
            math.prod([1 / 6, *(move[a, b] for a, b in pairwise(path))])
            * math.prod(emit[state, token] for state, token in zip(path, tokens, strict=True))
            for path in paths
        )

    lost = sum(math.log(chance(row[:1])) - math.log(chance(row)) for row in sequences)
    assert exact_loss(sequences, move, emit) == pytest.approx(lost / 9, rel=1e-9)


def test_models_above_the_least_loss_are_compared_with_nothing() -> None:
    runs = [[Checkpoint(loss, 0, {}) for loss in losses] for losses in ([3.0, 2.8, 2.5], [3.1, 2.9])]
    assert [point.loss for point in at_one_loss(runs, 2.8)] == [2.8, 2.9]
    table = pd.DataFrame(
        {
            "loss": [2.4, 2.4, 2.4, 2.42],
            "minimal": [True, True, True, False],
            "trace": [1.0, 2.0, 3.0, 0.0],
            "top_eigenvalue": [1.0, 2.0, 3.0, 0.0],
            "probe_accuracy": [0.9, 0.8, 0.7, 0.1],
        }
    )
    found = rank_correlations(table)
    assert found["models"] == 3 and found["trace_correlation"] == pytest.approx(-1)
    none = rank_correlations(table[table["minimal"]].head(2))
    assert none["models"] == 2 and math.isnan(none["trace_correlation"])


def test_the_probe_reads_states_better_than_guessing() -> None:
    fit, test = hidden_markov(512, seed=2), hidden_markov(512, seed=3)
    guess = float(torch.bincount(test.states[:, -1]).max()) / 512
    accuracy = probe_accuracy(small_model(0), fit, test)
    assert guess + 0.1 < accuracy < 1


def test_correlations_leave_out_models_of_another_loss() -> None:
    table = pd.DataFrame(
        {
            "loss": [2.40, 2.41, 2.40, 2.39, 2.40, 2.60],
            "trace": [1.0, 2.0, 3.0, 4.0, 5.0, 0.1],
            "top_eigenvalue": [1.0, 3.0, 2.0, 4.0, 5.0, 9.0],
            "probe_accuracy": [0.9, 0.8, 0.7, 0.6, 0.5, 0.1],
        }
    )
    found = rank_correlations(table)
    assert found["models"] == 5 and found["loss"] == pytest.approx(2.40)
    assert found["trace_correlation"] == pytest.approx(-1) and found[
        "top_eigenvalue_correlation"
    ] == pytest.approx(-0.9)
    assert (
        rank_correlations(table, tolerance=0.2)["trace_correlation"] > -0.5
    )  # all six: the odd one out turns the order around


def test_the_instrument_needs_a_text_whose_states_are_known_and_correlates_what_it_trained() -> None:
    on = subject("hidden-markov")
    result = Flatness(seeds=1, steps=20, probes=2, examples=8).run(on, cache=False)
    assert len(result.table) == 4 and {"trace_correlation", "models"} <= set(result.facts)
    assert result.table["probe_accuracy"].between(0, 1).all()
    assert result.table["least_loss"].between(2.7, 2.8).all() and result.facts["models"] == 0
    with pytest.raises(BadInput, match="take hidden-markov"):
        Flatness().check(subject("digits-vit"))
