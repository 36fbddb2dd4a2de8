"""Plans against closed forms and published numbers."""

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from workbench.errors import BadInput
from workbench.scaling import planning
from workbench.scaling.doubt.uncertainty import bootstrap
from workbench.scaling.fitting import fit
from workbench.scaling.formulas.lawbook import law
from workbench.scaling.isoflop import budgets_of, envelope, exponent, optima, parabola_bias
from workbench.scaling.planning import Draws

TRUTH = dict(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)


def closed_form(flops, E, A, B, alpha, beta):
    g = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    return g * (flops / 6) ** (beta / (alpha + beta))


@pytest.mark.parametrize("flops", [1e18, 5.76e23, 1e27])
def test_compute_optimum_is_the_closed_form(flops):
    draws = Draws.from_params(law("chinchilla"), TRUTH)
    plan = planning.compute_optimal(draws, flops)
    assert plan["params"] == pytest.approx(closed_form(flops, **TRUTH), rel=1e-5)
    assert plan["params"] * plan["tokens"] * 6 == pytest.approx(flops, rel=1e-12)
    assert plan.inside == 1.0
    a = planning.exponents(draws, flops).estimate
    assert a.to_numpy() == pytest.approx(
        [TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"]), TRUTH["alpha"] / (TRUTH["alpha"] + TRUTH["beta"])],
        abs=1e-5,
    )


def test_published_ratios_at_the_chinchilla_budget():
    ratio = planning.compute_optimal(Draws.from_params(law("chinchilla"), TRUTH), 5.76e23)["tokens_per_param"]
    assert ratio == pytest.approx(18.4, abs=0.1)
    rounded = dict(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
    assert planning.compute_optimal(Draws.from_params(law("chinchilla"), rounded), 5.76e23)[
        "tokens_per_param"
    ] == pytest.approx(92.7, abs=0.5)


def test_refit_plan_with_interval(shared):
    table = pd.read_csv(shared / "data" / "chinchilla_epoch" / "svg_extracted_data.csv").rename(
        columns={"Model Size": "params", "Training FLOP": "flops"}
    )
    table = table.assign(tokens=table.flops / 6 / table.params)
    found = fit(law("chinchilla"), table[table.loss < np.sort(table.loss)[-5]], starts=128)
    plan = planning.compute_optimal(Draws.of(bootstrap(found, 300)), 5.76e23)
    row = plan.table.set_index("quantity").loc["params"]
    assert row.estimate == pytest.approx(7.3e10, rel=0.01) and plan["tokens_per_param"] == pytest.approx(
        17.9, abs=0.1
    )
    assert row.low < row.estimate < row.high and row.high / row.low > 1.3


def test_inference_aware_beats_every_other_size():
    draws = Draws.from_params(law("chinchilla"), TRUTH)
    target, served = 2.1, 2e12
    plan = planning.inference_aware(draws, target, served)

    def cost(log_n):
        n = np.exp(log_n)
        gap = target - TRUTH["E"] - TRUTH["A"] / n ** TRUTH["alpha"]
        return (
            np.inf if gap <= 0 else np.log(6 * n * (TRUTH["B"] / gap) ** (1 / TRUTH["beta"]) + 2 * n * served)
        )

    best = optimize.minimize_scalar(
        cost, bounds=(np.log(1e9), np.log(1e12)), method="bounded", options={"xatol": 1e-9}
    )
    assert plan["params"] == pytest.approx(np.exp(best.x), rel=2e-3)
    assert plan["lifetime_flops"] == pytest.approx(np.exp(best.fun), rel=1e-4)
    smaller = planning.inference_aware(draws, target, 10 * served)
    assert smaller["params"] < plan["params"] and smaller["tokens_per_param"] > plan["tokens_per_param"]
    free = planning.inference_aware(draws, target, 0.0)
    n, d = free["params"], free["tokens"]
    assert planning.compute_optimal(draws, 6 * n * d)["params"] == pytest.approx(n, rel=5e-3)
    with pytest.raises(BadInput, match="target_loss"):
        planning.inference_aware(draws, 1.5, served)


def test_over_training_overhead_is_the_closed_form():
    draws = Draws.from_params(law("chinchilla"), TRUTH)
    table = planning.over_training(draws, 1e22, np.array([1.0, 0.5]))
    best = planning.compute_optimal(draws, 1e22)
    n = 0.5 * best["params"]
    d = (TRUTH["B"] / (best["loss"] - TRUTH["E"] - TRUTH["A"] / n ** TRUTH["alpha"])) ** (1 / TRUTH["beta"])
    assert table.compute_overhead.to_numpy() == pytest.approx([0.0, 6 * n * d / 1e22 - 1], abs=1e-6)


def test_repeating_data_is_planned_with_fewer_parameters_than_fresh_data():
    shape = law("data-constrained")
    params = dict(E=1.87, A=521.0, B=1488.0, alpha=0.353, beta=0.353, RD=15.4, RN=5.3)
    plan = planning.data_constrained(Draws.from_params(shape, params), 9.3e21, 2.5e10)
    assert 5 < plan["epochs"] < 40
    plenty = planning.data_constrained(Draws.from_params(shape, params), 9.3e21, 1e13)
    assert plenty["epochs"] == 1.0
    chinchilla = planning.compute_optimal(
        Draws.from_params(law("chinchilla"), {k: params[k] for k in ("E", "A", "B", "alpha", "beta")}), 9.3e21
    )
    assert plenty["loss"] == pytest.approx(chinchilla["loss"], rel=1e-6)
    assert plan["loss"] > plenty["loss"]
    with pytest.raises(BadInput, match="data-constrained"):
        planning.data_constrained(Draws.from_params(law("chinchilla"), TRUTH), 1e21, 1e10)


def test_best_precision_is_the_brute_force_minimum():
    shape = law("weight-precision")
    params = TRUTH | {"gw": 2.7}
    draws = Draws.from_params(shape, params)
    choices = (2, 3, 4, 6, 8, 16)
    plan = planning.best_precision(draws, choices, memory_bytes=4e9, tokens=1e12)
    losses = {
        b: float(shape.predict(params, {"params": 8 * 4e9 / b, "tokens": 1e12, "bits": b})) for b in choices
    }
    assert plan["bits"] == min(losses, key=losses.__getitem__)
    by_compute = planning.best_precision(draws, choices, flops=1e22)
    totals = {b: planning.compute_optimal(draws, 1e22 * 16 / b, fixed={"bits": b})["loss"] for b in choices}
    assert by_compute["bits"] == min(totals, key=totals.__getitem__)
    with pytest.raises(BadInput, match="exactly one"):
        planning.best_precision(draws)


def test_average_parameters_of_a_cubic_ramp():
    x = np.linspace(0, 1, 400_001)
    ramp = np.clip((x - 0.25) / 0.5, 0, 1)
    numeric = np.trapezoid(1e8 * (1 - 0.8 + 0.8 * (1 - ramp) ** 3), x)
    assert planning.average_parameters(1e8, 0.8, np.array(0.25), np.array(0.75)) == pytest.approx(
        numeric, rel=1e-9
    )
    table = planning.sparsity_schedule(Draws.from_params(law("sparse-average"), TRUTH), 1e8, 0.8, 1e20)
    assert table.loss.is_monotonic_increasing and (table.end <= 0.75 + 1e-9).all()


def test_budgets():
    assert planning.flops_for(gpu_hours=2, peak_flops=1e15, utilisation=0.5) == pytest.approx(3.6e18)
    assert planning.flops_for(
        money=6, price_per_gpu_hour=3, peak_flops=1e15, utilisation=0.5
    ) == pytest.approx(3.6e18)
    for wrong in (
        {},
        {"flops": 1e20, "money": 5},
        {"gpu_hours": 3},
        {"flops": -1},
        {"money": 5, "peak_flops": 1e15},
        {"gpu_hours": 1, "peak_flops": 1e15, "utilisation": 2},
    ):
        with pytest.raises(BadInput):
            planning.flops_for(**wrong)


def test_trajectory_ends_at_the_prediction():
    table = planning.trajectory(Draws.from_params(law("chinchilla"), TRUTH), 1e9, 1e11)
    assert table.loss.iloc[-1] == pytest.approx(
        float(law("chinchilla").predict(TRUTH, {"params": 1e9, "tokens": 1e11}))
    )
    assert table.loss.is_monotonic_decreasing


# published exponents: ordinary least squares, weighted, and the bound on a 7-point parabola from
# the raw points
CONFIGS = {
    "rw|base|long|kaplan|kaplan|train": (0.8338, 0.8353, 0.858),
    "rw|base|long|kaplan|standard|val": (0.7009, 0.7065, 0.693),
    "rw|base|short|kaplan|standard|val": (0.6035, 0.6020, 0.592),
    "rw|base|short|chinchilla|standard|val": (0.5714, 0.5715, 0.547),
    "rw|tuned|short|const|standard|val": (0.4970, 0.4969, 0.497),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_kaplan_to_chinchilla_exponents(shared, config):
    basic, weighted, raw = CONFIGS[config]
    folder = shared / "data" / "porian_isoflop"
    pairs = pd.read_csv(folder / "optimal_pairs.csv").query("config == @config").dropna(subset=["n_opt"])
    assert exponent(pairs)["exponent"] == pytest.approx(basic, abs=5.1e-5)
    assert exponent(pairs, weights=1 / pairs.n_std_log**2)["exponent"] == pytest.approx(weighted, abs=5.1e-5)
    points = pd.read_csv(folder / "isoflop_points.csv").query("config == @config")
    found = optima({"params": points.N, "flops": points.flops, "loss": points.loss})
    assert exponent(found[found.inside])["exponent"] == pytest.approx(raw, abs=0.03)


def test_parabola_finds_the_vertex_and_groups_budgets():
    n = np.tile(np.geomspace(1e7, 1e9, 9), 2)
    c = np.repeat([1e18, 1e19], 9)
    loss = 3 + 0.1 * (np.log(n) - np.log(np.where(c < 5e18, 5e7, 2e8))) ** 2
    found = optima({"params": n, "flops": c * (1 + 0.02 * np.sin(n)), "loss": loss}, window=None)
    assert found.n_opt.to_numpy() == pytest.approx([5e7, 2e8], rel=1e-9)
    assert budgets_of(c).tolist() == [0] * 9 + [1] * 9
    assert exponent(found)["exponent"] == pytest.approx(np.log10(4), rel=0.02)
    with pytest.raises(BadInput, match="IsoFLOP"):
        optima({"params": n, "flops": n * 1e9, "loss": loss})


def test_parabolas_are_biased_without_noise_unless_the_law_is_symmetric():
    sizes, flops = (g.ravel() for g in np.meshgrid(np.geomspace(3e7, 3e10, 11), np.geomspace(1e19, 1e21, 4)))
    lopsided = parabola_bias(
        law("chinchilla"), dict(E=1.7, A=100, B=3000, alpha=0.25, beta=0.45), sizes, flops, 1e24
    )
    assert abs(lopsided.ratio[0] - 1) > 0.2 and lopsided.loss_excess[0] > 0 and lopsided.wasted[0] > 0.02
    symmetric = dict(E=1.7, A=400, B=400, alpha=0.34, beta=0.34)
    flops = np.repeat(np.geomspace(1e19, 1e21, 4), 11)
    centred = np.sqrt(flops / 6) * np.tile(
        np.geomspace(0.1, 10, 11), 4
    )  # evenly around N* = D* = sqrt(C / 6)
    even = parabola_bias(law("chinchilla"), symmetric, centred, flops, 1e24)
    assert even.ratio[0] == pytest.approx(1, abs=1e-6) and even.exponent[0] == pytest.approx(0.5, abs=1e-9)
    shifted = parabola_bias(law("chinchilla"), symmetric, 3 * centred, flops, 1e24)
    assert shifted.ratio[0] > 1.01


def test_envelope_is_the_lowest_loss_per_bin():
    curves = pd.DataFrame({"flops": [1, 1.1, 10, 11, 100], "loss": [5, 4, 3.5, 3, 2.0], "run": list("abcde")})
    assert envelope(curves, bins=3).run.tolist() == ["b", "d", "e"]
