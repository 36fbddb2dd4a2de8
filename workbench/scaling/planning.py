"""From a fitted law to a plan: model size, tokens, repeats, precision, sparsity,
with the fit's doubt carried along.

Everything here takes parameter *draws* (one row per bootstrap resample, the first row being the estimate)
and returns an answer per draw, so every planned number has an interval.
Compute is training FLOPs = 6 N D unless said otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import BadInput
from workbench.scaling.doubt.uncertainty import Bootstrap
from workbench.scaling.formulas.laws import Law
from workbench.scaling.formulas.program import Program

Array = np.ndarray
FLOPS_PER_PARAM_TOKEN = 6.0


@dataclass(frozen=True)
class Draws:
    """A law with many parameter vectors: theta (draws, p) in working coordinates; row 0 is the estimate."""

    law: Law
    theta: Array

    @classmethod
    def of(cls, source: Bootstrap | Any) -> Draws:
        """From a Bootstrap (estimate first, then resamples) or a Fit (estimate alone)."""
        if isinstance(source, Bootstrap):
            return cls(source.fit.law, np.vstack([source.fit.theta[None], source.theta]))
        return cls(source.law, source.theta[None])

    @classmethod
    def from_params(cls, law: Law, params: Mapping[str, float]) -> Draws:
        return cls(law, np.array([[p.to_working(params[p.name]) for p in law.free]]))

    @functools.cached_property
    def _program(self) -> Program:
        compiled = self.law.compile("linear")
        return Program(compiled.graph, [compiled.output], compiled.names)

    def loss(self, columns: Mapping[str, Any]) -> Array:
        """(draws, points): predicted target. A column is a number, (points,), or (draws, points)
        when every draw has its own.
        """
        missing = [c for c in self.law.columns if c not in columns]
        if missing:
            raise BadInput(f"law {self.law.name}: planning needs {', '.join(missing)}; give a value for it")
        arrays = {c: np.atleast_2d(np.asarray(columns[c], dtype=np.float64)) for c in self.law.columns}
        points = max(a.shape[1] for a in arrays.values())
        return np.broadcast_to(self._program.bind(arrays)(self.theta)[0], (len(self.theta), points))


def flops_for(
    flops: float | None = None,
    gpu_hours: float | None = None,
    money: float | None = None,
    peak_flops: float | None = None,
    utilisation: float = 0.4,
    price_per_gpu_hour: float | None = None,
) -> float:
    """Training FLOPs that a budget buys: given as FLOPs, GPU-hours, or money.

    peak_flops: FLOP/s of one device; utilisation: share of it reached (model FLOPs utilisation). BadInput
    unless exactly one budget is given with what its conversion needs.
    """
    given = [n for n, v in (("flops", flops), ("gpu_hours", gpu_hours), ("money", money)) if v is not None]
    if len(given) != 1:
        raise BadInput(
            f"budget: give exactly one of flops, gpu_hours, money; got {', '.join(given) or 'none'}"
        )
    value = next(v for v in (flops, gpu_hours, money) if v is not None)
    if not value > 0 or not np.isfinite(value):
        raise BadInput(f"budget: {given[0]}={value} is not accepted, it must be positive")
    if flops is not None:
        return float(flops)
    if peak_flops is None or not peak_flops > 0:
        raise BadInput("peak_flops: needed to turn hours into FLOPs (e.g. 9.9e14 for one H100 in bf16)")
    if not 0 < utilisation <= 1:
        raise BadInput(
            f"utilisation: {utilisation} is not accepted, it is a share of the peak between 0 and 1"
        )
    if money is not None:
        if price_per_gpu_hour is None or not price_per_gpu_hour > 0:
            raise BadInput("price_per_gpu_hour: needed to turn money into hours")
        gpu_hours = money / price_per_gpu_hour
    assert gpu_hours is not None
    return gpu_hours * 3600.0 * peak_flops * utilisation


def _minimise(values: Array, log_x: Array) -> tuple[Array, Array, Array]:
    """Per row of values (draws, points): minimiser and minimum of the parabola through the lowest point
    and its neighbours, and whether the minimum lies inside the grid. log_x:
    (points,) or (draws, points), evenly spaced.
    """
    log_x = np.broadcast_to(log_x, values.shape)
    index = np.nanargmin(values, axis=1)
    inside = (index > 0) & (index < values.shape[1] - 1)
    i = np.clip(index, 1, values.shape[1] - 2)
    rows = np.arange(len(values))
    left, mid, right = values[rows, i - 1], values[rows, i], values[rows, i + 1]
    curvature = left - 2 * mid + right
    with np.errstate(all="ignore"):
        offset = np.clip(np.where(curvature > 0, 0.5 * (left - right) / curvature, 0.0), -1, 1)
    best = np.where(inside, log_x[rows, i] + offset * (log_x[:, 1] - log_x[:, 0]), log_x[rows, index])
    lowest = np.where(inside, mid - 0.25 * (left - right) * offset, values[rows, index])
    return best, lowest, inside


def _summary(draws: dict[str, Array], level: float) -> pd.DataFrame:
    tail = (1 - level) / 2
    rows = []
    for name, values in draws.items():
        rest = values[1:] if len(values) > 1 else values
        rest = rest[np.isfinite(rest)]
        low, high = np.quantile(rest, [tail, 1 - tail]) if len(rest) > 1 else (np.nan, np.nan)
        rows.append((name, float(values[0]), float(low), float(high)))
    return pd.DataFrame(rows, columns=["quantity", "estimate", "low", "high"])


@dataclass(frozen=True)
class Plan:
    """A planned run. `table`: quantity, estimate, low, high; `draws`: the same per parameter draw; `inside`:
    share of draws whose optimum lies inside the searched sizes
    (less than all means that the law runs to a limit).
    """

    table: pd.DataFrame
    draws: dict[str, Array]
    inside: float
    note: str = ""

    def __getitem__(self, quantity: str) -> float:
        return float(self.draws[quantity][0])


def compute_optimal(
    draws: Draws,
    flops: float,
    level: float = 0.9,
    fixed: Mapping[str, float] | None = None,
    size_range: tuple[float, float] = (1e3, 1e15),
    points: int = 121,
) -> Plan:
    """Loss-minimising parameters and tokens on 6 N D = flops.
    `fixed`: values of the law's other columns (bits, unique_tokens...).

    For the Chinchilla form this agrees with the closed form N = G (C/6)^(b/(a+b)), G = (aA/(bB))^(1/(a+b)).
    """
    if not flops > 0:
        raise BadInput(f"flops: {flops} is not accepted, the budget must be positive")

    def losses(log_n: Array) -> Array:
        n = np.exp(log_n)
        return draws.loss({**(fixed or {}), **model_columns(n, flops / (FLOPS_PER_PARAM_TOKEN * n))})

    log_n = np.linspace(np.log(size_range[0]), np.log(size_range[1]), points)
    coarse, _, inside = _minimise(losses(log_n), log_n)
    step = log_n[1] - log_n[0]
    fine = coarse[:, None] + np.linspace(-step, step, 41)  # each draw looks again around its own minimum
    best, lowest, _ = _minimise(losses(fine), fine)
    n = np.exp(best)
    d = flops / (FLOPS_PER_PARAM_TOKEN * n)
    quantities = {"params": n, "tokens": d, "tokens_per_param": d / n, "loss": lowest}
    note = (
        ""
        if inside.all()
        else "the optimum runs to the end of the searched sizes for some draws: the law sets no limit there"
    )
    return Plan(_summary(quantities, level), quantities, float(inside.mean()), note)


def model_columns(n: Array, d: Array) -> dict[str, Array]:
    return {
        "params": n,
        "tokens": d,
        "non_embedding_params": n,
        "active_params": n,
        "average_params": n,
        "flops": FLOPS_PER_PARAM_TOKEN * n * d,
    }


def exponents(draws: Draws, flops: float, level: float = 0.9, **more: Any) -> pd.DataFrame:
    """Local exponents of N* and D* in compute (d ln N* / d ln C) at a budget, with intervals."""
    low, high = (
        compute_optimal(draws, flops / 2, level, **more),
        compute_optimal(draws, flops * 2, level, **more),
    )
    a = np.log(high.draws["params"] / low.draws["params"]) / np.log(4.0)
    return _summary({"params_exponent": a, "tokens_exponent": 1 - a}, level)


def tokens_for_loss(
    draws: Draws,
    params: Array,
    target: Array,
    fixed: Mapping[str, float] | None = None,
    token_range: tuple[float, float] = (1e3, 1e20),
) -> Array:
    """(draws, sizes): tokens at which a model of each size reaches the target loss (draws,);
    inf where it never does.

    params: (sizes,) or (draws, sizes). Bisection on ln D; the law must fall with tokens.
    """
    n = np.broadcast_to(
        np.atleast_2d(np.asarray(params, dtype=np.float64)),
        (len(draws.theta), np.atleast_2d(params).shape[1]),
    )
    low, high = np.full(n.shape, np.log(token_range[0])), np.full(n.shape, np.log(token_range[1]))

    def loss(log_d: Array) -> Array:
        return draws.loss({**(fixed or {}), **model_columns(n, np.exp(log_d))})

    wanted = np.asarray(target, dtype=np.float64)[:, None]
    never, at_once = loss(high) > wanted, loss(low) <= wanted
    for _ in range(60):
        middle = 0.5 * (low + high)
        enough = loss(middle) <= wanted
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(never, np.inf, np.where(at_once, token_range[0], np.exp(high)))


def inference_aware(
    draws: Draws,
    target_loss: float,
    inference_tokens: float,
    level: float = 0.9,
    points: int = 81,
    size_range: tuple[float, float] = (1e5, 1e14),
    fixed: Mapping[str, float] | None = None,
) -> Plan:
    """Smallest lifetime compute 6 N D + 2 N T for a wanted loss and T tokens served
    (Sardana et al., 2023, eq. 2).
    """
    if inference_tokens < 0:
        raise BadInput(f"inference_tokens: {inference_tokens} is not accepted, it must not be negative")
    wanted = np.full(len(draws.theta), float(target_loss))

    def log_cost(log_n: Array) -> Array:
        n = np.exp(log_n)
        total = 6.0 * n * tokens_for_loss(draws, n, wanted, fixed) + 2.0 * n * inference_tokens
        return np.where(np.isfinite(total), np.log(np.where(np.isfinite(total), total, 1.0)), 1e3)

    log_n = np.linspace(np.log(size_range[0]), np.log(size_range[1]), points)
    coarse = log_cost(log_n)
    reachable = coarse.min(axis=1) < 1e3
    if not reachable[0]:
        raise BadInput(
            f"target_loss: {target_loss} lies below what the fitted law reaches at any size; "
            "choose a higher loss"
        )
    around, _, inside = _minimise(coarse, log_n)
    step = log_n[1] - log_n[0]
    fine = around[:, None] + np.linspace(-step, step, 21)
    best, lowest, _ = _minimise(log_cost(fine), fine)
    size = np.exp(best)
    tokens = (np.exp(lowest) - 2.0 * size * inference_tokens) / (6.0 * size)
    parts = {
        "params": size,
        "tokens": tokens,
        "tokens_per_param": tokens / size,
        "lifetime_flops": np.exp(lowest),
        "training_flops": 6.0 * size * tokens,
    }
    parts = {k: np.where(reachable, v, np.nan) for k, v in parts.items()}
    return Plan(_summary(parts, level), parts, float(np.mean(inside & reachable)))


def over_training(
    draws: Draws,
    flops: float,
    shrink: Array | None = None,
    level: float = 0.9,
    fixed: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """What a smaller model costs: at the compute-optimal loss for `flops`, models `shrink` times the optimal
    size need more tokens and more compute. Columns: shrink, params, tokens, tokens_per_param,
    compute_overhead (+ low, high).
    """
    shrink = (
        np.array([1.0, 0.75, 0.5, 0.35, 0.25]) if shrink is None else np.asarray(shrink, dtype=np.float64)
    )
    best = compute_optimal(draws, flops, level, fixed)
    rows = []
    tail = (1 - level) / 2
    sizes = best.draws["params"][:, None] * shrink
    tokens = tokens_for_loss(draws, sizes, best.draws["loss"] * (1 + 1e-12), fixed)
    overhead = 6.0 * sizes * tokens / flops - 1.0
    for j, s in enumerate(shrink):
        extra = overhead[1:, j]
        low, high = np.quantile(extra, [tail, 1 - tail]) if len(extra) > 1 else (np.nan, np.nan)
        rows.append((s, sizes[0, j], tokens[0, j], tokens[0, j] / sizes[0, j], overhead[0, j], low, high))
    return pd.DataFrame(
        rows,
        columns=[
            "shrink",
            "params",
            "tokens",
            "tokens_per_param",
            "compute_overhead",
            "overhead_low",
            "overhead_high",
        ],
    )


def data_constrained(
    draws: Draws,
    flops: float,
    unique_tokens: float,
    level: float = 0.9,
    fixed: Mapping[str, float] | None = None,
) -> Plan:
    """Best size and number of epochs when only `unique_tokens` exist (Muennighoff et al., 2023).
    Adds `epochs`.
    """
    if "unique_tokens" not in draws.law.columns:
        raise BadInput(f"law {draws.law.name}: does not know repeated tokens; fit the data-constrained law")
    if not unique_tokens > 0:
        raise BadInput(f"unique_tokens: {unique_tokens} is not accepted, it must be positive")
    plan = compute_optimal(draws, flops, level, {**(fixed or {}), "unique_tokens": unique_tokens})
    quantities = plan.draws | {"epochs": np.maximum(plan.draws["tokens"] / unique_tokens, 1.0)}
    return Plan(_summary(quantities, level), quantities, plan.inside, plan.note)


def best_precision(
    draws: Draws,
    choices: tuple[float, ...] = (2, 3, 4, 5, 6, 8, 12, 16),
    memory_bytes: float | None = None,
    tokens: float | None = None,
    flops: float | None = None,
    level: float = 0.9,
    fixed: Mapping[str, float] | None = None,
) -> Plan:
    """Weight bits that minimise loss under a memory budget (N = 8 bytes / bits, with `tokens` seen)
    or a compute budget in which a FLOP costs bits / 16 of a 16-bit one (Kumar et al., 2024, sec. 5)."""
    if (memory_bytes is None) == (flops is None):
        raise BadInput("budget: give exactly one of memory_bytes (with tokens) and flops")
    if "bits" not in draws.law.columns:
        raise BadInput(f"law {draws.law.name}: has no bits column; fit a precision law")
    losses, sizes = [], []
    for bits in choices:
        point = {**(fixed or {}), "bits": float(bits)}
        if memory_bytes is not None:
            if tokens is None:
                raise BadInput("tokens: needed with memory_bytes (how long the model will be trained)")
            n = np.full(1, 8.0 * memory_bytes / bits)
            losses.append(draws.loss({**point, **model_columns(n, np.full(1, tokens))})[:, 0])
            sizes.append(np.full(len(draws.theta), n[0]))
        else:
            assert flops is not None
            plan = compute_optimal(draws, flops * 16.0 / bits, level, point)
            losses.append(plan.draws["loss"])
            sizes.append(plan.draws["params"])
    table, size = np.stack(losses, axis=1), np.stack(sizes, axis=1)
    pick = np.argmin(table, axis=1)
    rows = np.arange(len(table))
    quantities = {
        "bits": np.asarray(choices, dtype=np.float64)[pick],
        "params": size[rows, pick],
        "loss": table[rows, pick],
    }
    inside = float(np.mean((pick > 0) & (pick < len(choices) - 1)))
    return Plan(_summary(quantities, level), quantities, inside)


def average_parameters(params: float, final_sparsity: float, start: Array, end: Array) -> Array:
    """Mean active parameters of a cubic pruning schedule between shares `start` and `end` of training.

    N(t) = N (1 - s_f + s_f (1 - x)^3) with x from 0 to 1 between start and end (Zhu and Gupta, 2017), so
    the ramp averages N (1 - 3/4 s_f). Jin et al. (2025): loss follows this average.
    """
    start, end = np.asarray(start, dtype=np.float64), np.asarray(end, dtype=np.float64)
    return params * (start + (end - start) * (1 - 0.75 * final_sparsity) + (1 - end) * (1 - final_sparsity))


def sparsity_schedule(
    draws: Draws, params: float, final_sparsity: float, flops: float, steps: int = 16, recovery: float = 0.25
) -> pd.DataFrame:
    """Predicted loss of every cubic schedule (start, end) on a compute budget: earlier pruning buys tokens,
    later pruning keeps parameters. At least `recovery` of training follows the last pruning step, below which
    the law was not measured. Columns start, end, average_params, tokens, loss; best first."""
    if not 0 < final_sparsity < 1:
        raise BadInput(f"final_sparsity: {final_sparsity} is not accepted, give a share between 0 and 1")
    grid = np.linspace(0, 1, steps + 1)
    start, end = (g.ravel() for g in np.meshgrid(grid, grid, indexing="ij"))
    keep = (end > start) & (end <= 1 - recovery + 1e-12)
    start, end = start[keep], end[keep]
    average = average_parameters(params, final_sparsity, start, end)
    tokens = flops / (FLOPS_PER_PARAM_TOKEN * average)
    loss = draws.loss({"average_params": average, "params": average, "tokens": tokens})[0]
    table = pd.DataFrame(
        {"start": start, "end": end, "average_params": average, "tokens": tokens, "loss": loss}
    )
    return table.sort_values("loss", ignore_index=True)


def trajectory(
    draws: Draws,
    params: float,
    tokens: float,
    points: int = 60,
    level: float = 0.9,
    fixed: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Loss against tokens for one model size before it is trained: the loss of a *finished* run of each
    length (its learning rate decayed to the end), which a run still at high learning rate lies above.
    Columns tokens, loss, low, high.
    """
    d = np.geomspace(tokens / 100.0, tokens, points)
    loss = draws.loss({**(fixed or {}), **model_columns(np.full(points, params), d)})
    rest = loss[1:] if len(loss) > 1 else loss
    tail = (1 - level) / 2
    return pd.DataFrame(
        {
            "tokens": d,
            "loss": loss[0],
            "low": np.quantile(rest, tail, axis=0),
            "high": np.quantile(rest, 1 - tail, axis=0),
        }
    )
