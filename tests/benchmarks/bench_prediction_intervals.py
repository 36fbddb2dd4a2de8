"""Do 90 % prediction intervals hold? Published run tables, fitted below a cut-off, counted beyond.

    python tests/benchmarks/bench_prediction_intervals.py [--write]

Tables: ../shared/data beside the checkout. Two cut-offs for every table, by rule: the tenth, and the
quarter, of the runs with most compute (at least five, whole budgets at a time) lie beyond; for the Chinchilla
table the first is the customary 1e21 FLOPs. Beside it: a band of constant relative width (the 90 % quantile
of the same held-out errors, at least that of the scatter), and that of the parameters' bootstrap alone.
Writes data/benchmarks/scaling.md.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from workbench.scaling.doubt.prediction import (
    PredictionIntervals,
    cut_off,
    prediction_intervals,
    scatter_of,
    weighted_quantile,
)
from workbench.scaling.doubt.uncertainty import bootstrap
from workbench.scaling.fitting import fit
from workbench.scaling.formulas.lawbook import law

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
OUT = ROOT / "data" / "benchmarks" / "scaling.md"
LEVEL = 0.9
SHARES = (0.1, 0.25)
DRIFTS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)


def _published(data: Path) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(name, law, table) with the law's columns, loss, and flops unless they are 6 N D."""
    table = pd.read_csv(data / "chinchilla_epoch" / "svg_extracted_data.csv")
    table = table.rename(columns={"Model Size": "params", "Training FLOP": "flops"})
    table["tokens"] = table.flops / 6 / table.params
    yield "chinchilla", "chinchilla", table[table.loss < np.sort(table.loss)[-5]]
    table = pd.read_csv(data / "isoflops_openathena" / "isoflops.csv")
    for name, part in table.groupby("experiment"):
        yield f"isoflops {name}", "chinchilla", part
    table = pd.read_csv(data / "porian_isoflop" / "isoflop_points.csv")
    for name, part in table.rename(columns={"N": "params", "D": "tokens"}).groupby("config"):
        yield f"porian {name}", "chinchilla", part
    table = pd.read_csv(data / "overtraining_gadre" / "runs.csv")
    for name, part in table.groupby("dataset"):
        yield f"gadre {name}", "over-training", part.assign(loss=part.loss_c4_val)
    yield "data-constrained", "data-constrained", pd.read_csv(data / "data_constrained" / "runs.csv")
    table = pd.read_csv(data / "marin_speedrun" / "runs.csv")
    yield (
        "marin speedrun",
        "power-compute",
        table.assign(flops=table.model_flops, loss=table.eval_paloma_c4_en_bpb),
    )
    yield "routed S-Base", "routed", _routed(data)
    table = pd.read_csv(data / "steplaw" / "dense_lr_bs_loss.csv").rename(
        columns={"N": "params", "D": "tokens"}
    )
    lowest = table.assign(loss=table["smooth loss"]).groupby(["params", "tokens"], as_index=False).loss.min()
    yield "step law, best per cell", "chinchilla", lowest
    parts = [pd.read_csv(data / "scalebench" / f"farseer_{part}.csv") for part in ("train", "test")]
    yield "farseer", "chinchilla", pd.concat(parts).rename(columns={"N": "params", "D": "tokens"})
    yield "olmo ladder", "chinchilla", _ladder(data)
    yield "xlstm paper, llama", "chinchilla", _curves(data)


def _routed(data: Path) -> pd.DataFrame:
    table = pd.read_csv(data / "routed_lm" / "curves.csv.gz").groupby("hyper_id").last()
    base = (table.router_type == "S-Base") & (table.routing_frequency == 0.5) & (table.flop_increase == 1)
    table = table[(table.k == 1) & (base | (table.router_type == "Dense"))]
    return table.assign(
        params=table.dense_parameter_count,
        experts=table.num_experts,
        flops=table.flops_per_step * table.step,
        loss=table.loss_validation,
    )


def _ladder(data: Path) -> pd.DataFrame:
    """Size from the run of 20 tokens a parameter; loss is the mean of the last five logged."""
    table = pd.read_csv(data / "olmo_ladder" / "ladder_curves.csv.gz").sort_values(["run", "_step"])
    rows = [
        (run, part["throughput/total_tokens"].max(), part["c4_en-validation"].dropna().tail(5).mean())
        for run, part in table.groupby("run")
    ]
    made = pd.DataFrame(rows, columns=["run", "tokens", "loss"])
    size = made.run.str.split("-").str[0]
    single = made.run.str.endswith("-1xC")
    return made.assign(params=size.map(dict(zip(size[single], made.tokens[single] / 20, strict=True))))


def _curves(data: Path) -> pd.DataFrame:
    """Finished runs; the loss is the mean of the last five logged training losses."""
    table = pd.read_csv(data / "xlstm_isoflop" / "llama_ctx8192_curves.csv.gz").sort_values(["name", "_step"])
    rows = []
    for name, part in table.groupby("name"):
        found = re.search(r"steps(\d+)_nb(\d+)_ed(\d+)", str(name))
        assert found is not None
        steps, blocks, width = map(float, found.groups())
        if part._step.max() >= 0.95 * steps:
            params = 12 * blocks * width**2 + 50304 * width
            rows.append((params, steps * 128 * 8192, part.train_loss.dropna().tail(5).mean()))
    return pd.DataFrame(rows, columns=["params", "tokens", "loss"])


def published(data: Path = DATA) -> dict[str, tuple[str, pd.DataFrame]]:
    found = {}
    for name, called, table in _published(data):
        numbers = table.assign(
            **{c: table[c].astype(float) for c in ("params", "tokens", "flops") if c in table}
        )
        if "flops" not in numbers:
            numbers = numbers.assign(flops=6 * numbers.params * numbers.tokens)
        found[name] = (called, numbers[np.isfinite(numbers.loss)].reset_index(drop=True))
    return found


@dataclass(frozen=True)
class Held:
    """One table, fitted below a cut-off: the intervals, the runs beyond, what was seen there."""

    name: str
    law: str
    coming: PredictionIntervals
    beyond: pd.DataFrame
    share: float

    def covered(self, drift: float | None = None) -> np.ndarray:
        coming = self.coming if drift is None else replace(self.coming, drift=drift)
        band = coming.band(self.beyond, LEVEL)
        return ((band.low <= self.beyond.loss) & (self.beyond.loss <= band.high)).to_numpy()

    @property
    def accepted(self) -> tuple[int, int]:
        """99 % binomial range of how many of the runs lie inside."""
        low, high = stats.binom.ppf([0.005, 0.995], len(self.beyond), LEVEL)
        return int(low), int(high)

    def bands(self) -> dict[str, tuple[float, float, float]]:
        """Of our band, one of constant width, and the bootstrap's: coverage, median half-width, mean interval
        score (Gneiting and Raftery 2007, sec. 6.2), all of log losses.
        """
        coming = self.coming
        error = np.abs(np.log(coming.fit.predict(self.beyond)) - np.log(self.beyond.loss.to_numpy()))
        least = stats.norm.ppf(0.5 + LEVEL / 2)
        constant = least * scatter_of(coming.fit, None)
        if len(coming.backtests):
            past = coming.backtests
            constant = max(
                constant, weighted_quantile(past.error.abs().to_numpy(), past.cutoff.to_numpy(), LEVEL)
            )
        halves = {
            "ours": coming.factor(LEVEL) * coming.spread(self.beyond),
            "constant": np.full(len(error), constant),
            "bootstrap": least * coming.refits(self.beyond),
        }
        return {
            name: (
                float(np.mean(error <= half)),
                float(np.median(half)),
                float(np.mean(2 * half + 2 / (1 - LEVEL) * np.maximum(error - half, 0))),
            )
            for name, half in halves.items()
        }


def held(share: float, data: Path = DATA, names: tuple[str, ...] = ("",)) -> list[Held]:
    """The tables whose names begin so, fitted below the cut-off that leaves `share` of their runs beyond."""
    found = []
    for name, (called, table) in published(data).items():
        if not name.startswith(names):
            continue
        compute = table.flops.to_numpy()
        limit = cut_off(compute, share, 5)
        if name == "chinchilla" and share == SHARES[0]:
            limit = 1e21
        assert limit is not None
        below = table[compute <= limit].reset_index(drop=True)
        above = table[compute > limit].reset_index(drop=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = fit(law(called), below, starts=128)
            coming = prediction_intervals(made, below, bootstrap(made, 200))
        found.append(Held(name, called, coming, above, share))
    return found


def pooled(runs: list[Held], drift: float | None = None) -> float:
    return float(np.mean(np.concatenate([one.covered(drift) for one in runs])))


def outside(runs: list[Held], drift: float | None = None) -> list[str]:
    """Tables whose count lies outside its 99 % range."""
    return [one.name for one in runs if not one.accepted[0] <= one.covered(drift).sum() <= one.accepted[1]]


def page(groups: dict[float, list[Held]]) -> str:
    lines = [
        "# Prediction intervals of scaling fits, on published run tables",
        "",
        "`python tests/benchmarks/bench_prediction_intervals.py --write` makes this page. Laws are fitted",
        "below a cut-off in compute; counted is how many of the runs beyond it lie in their 90 % band.",
        "`inside`: runs, and in brackets the 99 % binomial range of 0.9. Half-widths (median, % of loss)",
        "and interval scores (mean, x 100, of log losses; lower is better) of our band, of one of constant",
        "relative width calibrated on the same held-out errors, and of the parameters' bootstrap alone.",
    ]
    for share, runs in groups.items():
        lines += [
            "",
            f"## The {'tenth' if share == 0.1 else 'quarter'} of the runs with most compute held out",
            "",
            "| table | law | fitted | beyond | compute | inside | half-width ours / constant / bootstrap "
            "| score ours / constant / bootstrap | covered constant / bootstrap |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for one in runs:
            bands = one.bands()
            inside, (low, high) = int(one.covered().sum()), one.accepted
            beyond = one.beyond.flops.max() / one.coming.largest
            lines.append(
                f"| {one.name.replace('|', ' / ')} | {one.law} | {one.coming.fit.problem.rows} "
                f"| {len(one.beyond)} | {beyond:.3g} x | {inside} ({low} to {high})"
                f"{'' if low <= inside <= high else ' **outside**'} | "
                + " / ".join(f"{100 * b[1]:.2g}" for b in bands.values())
                + " | "
                + " / ".join(f"{100 * b[2]:.3g}" for b in bands.values())
                + " | "
                + " / ".join(f"{b[0]:.2f}" for n, b in bands.items() if n != "ours")
                + " |"
            )
        shown = [one.bands() for one in runs]
        sizes = [len(one.beyond) for one in runs]
        lines += [
            "",
            f"Pooled over {sum(sizes)} runs: **{100 * pooled(runs):.1f} %** inside; "
            f"{len(outside(runs))} of {len(runs)} tables outside their 99 % range. "
            + "; ".join(
                f"{n}: pooled {100 * np.average([b[n][0] for b in shown], weights=sizes):.0f} %, "
                f"median half-width {100 * np.median([b[n][1] for b in shown]):.2g} %, "
                f"median score {100 * np.median([b[n][2] for b in shown]):.3g}"
                for n in ("ours", "constant", "bootstrap")
            )
            + ".",
        ]
    lines += [
        "",
        "## What was chosen on these tables",
        "",
        "The form of the band was chosen on these same held-out runs too: about 80 variants were compared "
        "(how the scatter is estimated, the weight of the refits, how the law's own error grows, its least "
        "size, what is pooled), and the one without a table outside at the tenth was taken. So the coverage "
        "above is not a test on data that the band has not seen; leaving one table out below chooses "
        "`DRIFT` alone anew.",
        "",
        "`DRIFT`, the growth of a law's own error with compute, is the one constant. What others give:",
        "",
        "| drift | " + " | ".join(f"pooled, {s:g} held out | tables outside" for s in groups) + " |",
        "|---|" + "---|---|" * len(groups),
    ]
    for drift in DRIFTS:
        lines.append(
            f"| {drift:g} | "
            + " | ".join(
                f"{100 * pooled(runs, drift):.1f} % | {len(outside(runs, drift))}" for runs in groups.values()
            )
            + " |"
        )
    for share, runs in groups.items():
        left = []
        for one in runs:
            others = [o for o in runs if o is not one]
            chosen = min(DRIFTS, key=lambda d: (len(outside(others, d)), abs(pooled(others, d) - LEVEL)))
            left.append(one.covered(chosen))
        lines += [
            "",
            f"Chosen on all tables but one (fewest outside, then nearest to 90 %), applied to that one, "
            f"with {share:g} held out: {100 * np.mean(np.concatenate(left)):.1f} % of the runs inside.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help=f"write {OUT.relative_to(ROOT)}")
    arguments = parser.parse_args()
    text = page({share: held(share) for share in SHARES})
    print(text)
    if arguments.write:
        _, found, rest = OUT.read_text().partition("\n# ScaleBench")  # bench_scalebench.py's own
        OUT.write_text(text + found + rest)


if __name__ == "__main__":
    main()
