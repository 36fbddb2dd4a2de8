"""Expected falls of variance against Bayesian linear regression, brute force and simulated outcomes."""

import numpy as np
import pytest
from scipy import stats

from workbench.scaling.proposing.learning import Beliefs


def linear(seed, points=6, parameters=3, draws=None):
    """Features (points, p), a posterior covariance, and draws whose covariance is exactly that."""
    draw = np.random.default_rng(seed)
    features = draw.normal(size=(points, parameters))
    design = draw.normal(size=(12, parameters))
    noise = 0.3
    covariance = noise**2 * np.linalg.inv(design.T @ design)
    drawn = draw.normal(size=(draws or 40, parameters))
    drawn -= drawn.mean(0)
    drawn = drawn @ np.linalg.inv(np.linalg.cholesky(drawn.T @ drawn / len(drawn))).T
    drawn = drawn @ np.linalg.cholesky(covariance).T  # moments matched
    return features, design, covariance, noise, drawn @ features.T / np.sqrt(len(drawn))


def test_a_linear_law_is_bayesian_linear_regression():
    features, design, covariance, noise, roots = linear(0)
    beliefs = Beliefs.of(roots[None], np.array([noise]), np.zeros((1, 6)), np.ones(1))
    assert beliefs.variance() == pytest.approx(np.einsum("pi,ij,pj->p", features, covariance, features))
    targets, candidates = np.array([0, 1]), np.array([2, 3, 4, 5])
    falls = beliefs.falls(targets, candidates)
    for i, t in enumerate(targets):
        for j, c in enumerate(candidates):
            more = np.vstack([design, features[c]])
            after = noise**2 * np.linalg.inv(more.T @ more)
            fall = features[t] @ (covariance - after) @ features[t]
            assert falls[i, j] == pytest.approx(fall, rel=1e-9)


def test_runs_taken_one_after_the_other_are_one_regression_on_both():
    features, design, _, noise, roots = linear(1)
    beliefs = Beliefs.of(roots[None], np.array([noise]), np.zeros((1, 6)), np.ones(1)).after(3).after(5)
    more = np.vstack([design, features[[3, 5]]])
    after = noise**2 * np.linalg.inv(more.T @ more)
    assert beliefs.variance() == pytest.approx(np.einsum("pi,ij,pj->p", features, after, features), rel=1e-9)


def test_greedy_over_a_small_pool_is_brute_force():
    """The best single run, found by computing every posterior anew."""
    features, design, _, noise, roots = linear(2, points=9)
    beliefs = Beliefs.of(roots[None], np.array([noise]), np.zeros((1, 9)), np.ones(1))
    left = [
        features[0]
        @ np.linalg.inv(np.vstack([design, features[c]]).T @ np.vstack([design, features[c]]))
        @ features[0]
        for c in range(1, 9)
    ]
    falls = beliefs.falls(np.array([0]), np.arange(1, 9))[0]
    assert np.argsort(-falls).tolist() == np.argsort(left).tolist()


def several(seed=3):
    draw = np.random.default_rng(seed)
    roots = 0.4 * draw.normal(size=(3, 5, 4))
    return Beliefs.of(roots, np.array([0.2, 0.3, 0.25]), draw.normal(size=(3, 4)), np.array([0.5, 0.3, 0.2]))


def test_several_laws_fall_as_simulated_outcomes_say():
    """Var_y E[f|y] over a million outcomes, posterior by Bayes' rule."""
    beliefs = several()
    draw = np.random.default_rng(0)
    falls = beliefs.falls(np.array([0, 1]), np.array([2, 3]))
    means, weights = beliefs.means[0], beliefs.weights[0]
    for j, c in enumerate((2, 3)):
        spread = np.square(beliefs.roots[:, :, c]).sum(1) + beliefs.noise**2
        law = draw.choice(3, 400_000, p=weights)
        outcome = means[law, c] + np.sqrt(spread[law]) * draw.normal(size=len(law))
        density = weights * stats.norm.pdf(outcome[:, None], means[:, c], np.sqrt(spread))
        told = density / density.sum(1, keepdims=True)
        for i, t in enumerate((0, 1)):
            cross = np.einsum("kr,kr->k", beliefs.roots[:, :, t], beliefs.roots[:, :, c])
            after = (told * (means[:, t] + cross / spread * (outcome[:, None] - means[:, c]))).sum(1)
            assert falls[i, j] == pytest.approx(after.var(), rel=0.02)


def test_two_laws_that_a_run_tells_apart_lose_all_they_disagree_by():
    """No parameters, hardly any noise, far apart at the candidate: what is left is one law."""
    means = np.array([[1.0, 5.0], [2.0, -5.0]])
    beliefs = Beliefs.of(np.zeros((2, 1, 2)), np.full(2, 1e-3), means, np.array([0.25, 0.75]))
    assert beliefs.variance()[0] == pytest.approx(0.25 * 0.75)
    assert beliefs.falls(np.array([0]), np.array([1]))[0, 0] == pytest.approx(0.25 * 0.75, rel=1e-9)


def test_after_a_run_of_unknown_outcome_variance_is_what_was_foretold_on_the_whole():
    """The mean over many seeds of the worlds' variance: the law of total variance."""
    beliefs = several()
    foretold = beliefs.variance()[0] - beliefs.falls(np.array([0]), np.array([2]))[0, 0]
    seen = [beliefs.after(2, seed).variance()[0] for seed in range(300)]
    assert np.mean(seen) == pytest.approx(foretold, rel=0.02)
    assert beliefs.after(2).weights.sum(1) == pytest.approx(np.ones(8))


def test_no_noise_and_no_spread_teach_nothing():
    beliefs = Beliefs.of(np.zeros((1, 2, 3)), np.zeros(1), np.ones((1, 3)), np.ones(1))
    assert beliefs.falls(np.array([0]), np.array([1, 2])).tolist() == [[0.0, 0.0]]
    assert np.isfinite(beliefs.after(1).means).all() and beliefs.after(1).variance().tolist() == [0, 0, 0]
