"""ScaleBench: pick runs for a tenth of the budget, fit, predict the dear ones; beside the published table.

    python tests/benchmarks/bench_scalebench.py [TABLE ...] [--repeats 10] [--write]

Tables: ../shared/data/scalebench beside the checkout (arXiv 2604.22753; what is kept there has a SOURCE.md).
Budgets, costs and the score (R^2 over all groups and targets, within [-1, 1], the mean over laws and
repeats) are the benchmark's. Runs are picked by `workbench.scaling.proposing.learning`: first by what the
laws' ranges leave open, then twice anew by refits on what was picked. Which cells are to be predicted is
known, their losses are not. With --write the tables' rows on data/benchmarks/scaling.md are replaced.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.errors import BadInput
from workbench.scaling import Objective, bootstrap, fit, law, stack
from workbench.scaling.doubt.prediction import scatter_of
from workbench.scaling.formulas.laws import Law, Parameter
from workbench.scaling.projection import sample_starts
from workbench.scaling.proposing.learning import Beliefs

Array = np.ndarray
ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "scalebench"
PAGE = ROOT / "data" / "benchmarks" / "scaling.md"
HEADING = "# ScaleBench"
#: Shares of the budget at which what was picked is fitted and the rest is weighed anew.
STAGES = (0.3, 0.65, 1.0)
STARTS, DRAWS = 48, 48
#: Scatter of a run before any is known, and the smallest that is believed after.
NOISE, LEAST = 0.01, 1e-3


def size(name: str, low: float, high: float) -> Parameter:
    return Parameter(name, start=(low, high), scale="log")


def power(name: str, low: float = 0.05, high: float = 1.2) -> Parameter:
    return Parameter(name, start=(low, high), low=min(low, 0.0) * 10, high=5.0)


def own(text: str, columns: Sequence[str], *parameters: Parameter, positive: bool = True) -> Law:
    return Law.from_formula(text, text, columns=columns, parameters=parameters, positive=positive)


@dataclass(frozen=True)
class Table:
    """One table of the benchmark: names of its columns here, laws, cost of a run, share of the budget, and
    the published score at it of the best selection, and of all runs.
    """

    names: dict[str, str]
    laws: tuple[Law, ...]
    cost: Callable[[pd.DataFrame], pd.Series]
    share: float
    published: tuple[float, float]
    objective: Objective = field(default_factory=Objective)
    targets: tuple[str, ...] = ("loss",)


def compute(table: pd.DataFrame) -> pd.Series:
    return 6.0 * table.params * table.tokens


FLOOR = size("E", 0.2, 3.0)
CHARACTERS = ("non_vocab_params", "vocabulary", "characters")
OFFSET = Parameter("E", start=(-8.0, 0.0), low=-50.0, high=50.0)
TABLES = {
    "farseer": Table(
        {"N": "params", "D": "tokens"},
        (
            law("farseer"),
            own(
                "E + A/params**a + B/tokens**b + C/params**c/tokens**d",
                ("params", "tokens"),
                FLOOR,
                *(size(n, 1e-2, 1e5) for n in "ABC"),
                *(power(n) for n in "abd"),
                power("c", -0.5, 0.5),
            ),
        ),
        compute,
        0.1,
        (0.93, 0.91),
        Objective("squares"),
    ),
    "data_constrained": Table({}, (law("data-constrained"), law("chinchilla")), compute, 0.1, (0.86, 0.79)),
    "parallel": Table(
        {"num_params": "params", "parallel_size": "streams"},
        (
            law("parallel-streams"),
            own(
                "E + A/params**a + C/streams**c",
                ("params", "streams"),
                FLOOR,
                size("A", 1.0, 1e4),
                size("C", 1e-2, 1.0),
                power("a", 0.05, 0.6),
                power("c", 0.1, 1.0),
            ),
        ),
        lambda table: table.params.astype(float),
        0.1,
        (0.99, 0.99),
    ),
    "vocab": Table(
        {
            "non_vocab_parameters": "non_vocab_params",
            "vocab_size": "vocabulary",
            "num_characters": "characters",
            "unigram_normalized_loss": "loss",
        },
        tuple(
            own(text, CHARACTERS, OFFSET, *parameters, positive=False)
            for text, parameters in (
                (
                    "E + A/non_vocab_params**a + B*vocabulary**c/characters**b",
                    (size("A", 1, 1e5), power("a"), size("B", 1, 1e6), power("c", -0.5, 0.5), power("b")),
                ),
                (
                    "E + A/non_vocab_params**a + C/vocabulary**c + B/characters**b",
                    (
                        size("A", 1, 1e5),
                        power("a"),
                        size("C", 1, 1e5),
                        power("c"),
                        size("B", 1, 1e8),
                        power("b"),
                    ),
                ),
            )
        ),
        lambda table: table.non_vocab_params.astype(float) * table.characters,
        0.1,
        (0.98, 0.93),
        Objective("squares", "linear"),
    ),
    "domain_mixture": Table(
        {f"proportion_domain_{i}": f"proportion_{i}" for i in range(1, 6)},
        (law("data-mixing"),),
        lambda table: pd.Series(np.ones(len(table))),
        0.5,
        (0.95, 0.81),
        Objective("squares"),
        tuple(f"loss_domain_{i}" for i in range(1, 6)),
    ),
}


def groups(name: str, data: Path = DATA) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """(runs to pick from with their cost, runs to predict) of each group."""
    table = TABLES[name]
    parts = [
        pd.read_csv(data / f"{name}_{part}.csv").rename(columns=table.names) for part in ("train", "test")
    ]
    for group in parts[1].group.unique():
        train, test = (part[part.group == group].reset_index(drop=True) for part in parts)
        yield train.assign(cost=table.cost(train)), test


@dataclass(frozen=True)
class Unit:
    """One law of one target: what is fitted, and what a pick may teach about."""

    law: Law
    objective: Objective
    target: str

    def predictions(self, theta: Array, points: pd.DataFrame) -> Array:
        """(draws, points) in the objective's space; draws that are undefined somewhere are left out."""
        bound = self.law.compile(self.objective.space).bind(
            {c: points[c].to_numpy(float) for c in self.law.columns}, 0
        )
        made = np.broadcast_to(bound(theta)[0], (len(theta), len(points)))
        return made[np.isfinite(made).all(1)]

    def fitted(self, picked: pd.DataFrame, seed: int):
        return fit(self.law, picked.assign(loss=picked[self.target]), self.objective, STARTS, seed=seed)

    def beliefs(self, picked: pd.DataFrame, points: pd.DataFrame, seed: int) -> Beliefs:
        """From the law's ranges; from refits once there are runs to spare."""
        noise = NOISE if self.objective.space == "log" else 5 * NOISE
        theta = sample_starts(self.law, 256, seed)
        if len(picked) > len(self.law.free) + 1:
            try:
                found = self.fitted(picked, seed)
                theta = bootstrap(found, DRAWS, seed, patience=0).theta
                noise = max(scatter_of(found, None), LEAST)
            except BadInput:  # undefined on so few runs: what the ranges leave open is all that is known
                pass
        made = self.predictions(theta, points)
        middle = made.mean(0)
        roots = (made - middle) / np.sqrt(len(made))
        return Beliefs.of(roots[None], np.array([noise]), middle[None], np.ones(1))


def picked_runs(
    units: Sequence[Unit], train: pd.DataFrame, test: pd.DataFrame, share: float, seed: int
) -> Array:
    """Rows of `train` that a share of its cost buys, by the fall of the targets' variance per cost."""
    points = pd.concat([test, train], ignore_index=True)
    cells, candidates = np.arange(len(test)), np.arange(len(test), len(points))
    cost = train.cost.to_numpy(float)
    rows: list[int] = []
    for stage in STAGES:
        beliefs = [unit.beliefs(train.iloc[rows], points, seed) for unit in units]
        while True:
            left = share * stage * cost.sum() * (1 + 1e-12) - cost[rows].sum()
            free = (cost <= left) & ~np.isin(np.arange(len(train)), rows)
            if not free.any():
                break
            worth = sum(
                b.falls(cells, candidates).mean(0) / max(b.variance()[cells].mean() + b.scatter(), 1e-300)
                for b in beliefs
            )
            chosen = int(np.argmax(np.where(free, worth / cost, -1.0)))
            rows.append(chosen)
            beliefs = [b.after(int(candidates[chosen])) for b in beliefs]
    return np.array(rows)


def r_squared(observed: Array, predicted: Array) -> float:
    ours = 1 - np.sum((observed - predicted) ** 2) / np.sum((observed - observed.mean()) ** 2)
    return float(np.clip(ours, -1, 1)) if np.isfinite(ours) else -1.0


def selected(name: str, repeats: int) -> tuple[float, float, float]:
    """Score of the laws one by one (mean over laws and repeats), of their mean; how many runs were picked."""
    table, scores, together, counts = TABLES[name], [], [], []
    for seed in range(repeats):
        predicted: dict[int, list[Array]] = {k: [] for k in range(len(table.laws))}
        observed: list[Array] = []
        count = 0
        for train, test in groups(name):
            units = [Unit(one, table.objective, t) for one in table.laws for t in table.targets]
            rows = picked_runs(units, train, test, table.share, seed)
            count += len(rows)
            observed += [test[t].to_numpy(float) for t in table.targets]
            for k, one in enumerate(table.laws):
                for target in table.targets:
                    found = Unit(one, table.objective, target).fitted(train.iloc[rows], seed)
                    predicted[k].append(found.predict(test))
        truth = np.concatenate(observed)
        each = [np.concatenate(p) for p in predicted.values()]
        scores.append(np.mean([r_squared(truth, p) for p in each]))
        together.append(r_squared(truth, np.mean(each, axis=0)))
        counts.append(count)
    return float(np.mean(scores)), float(np.mean(together)), float(np.mean(counts))


def whole(name: str) -> tuple[float, float, str]:
    """With all runs: score of the laws one by one, of their stack, and the stack's weights."""
    table, observed, stacked, said = TABLES[name], [], [], ""
    each: list[list[Array]] = [[] for _ in table.laws]
    for train, test in groups(name):
        for target in table.targets:
            runs = train.assign(loss=train[target], flops=train.cost)
            observed.append(test[target].to_numpy(float))
            for k, one in enumerate(table.laws):
                each[k].append(fit(one, runs, table.objective, 128).predict(test))
            made = stack(table.laws, runs, table.objective, 64, 40)
            said = made.said
            stacked.append(made.band(test.assign(flops=table.cost(test))).predicted.to_numpy())
    truth = np.concatenate(observed)
    alone = float(np.mean([r_squared(truth, np.concatenate(p)) for p in each]))
    return alone, r_squared(truth, np.concatenate(stacked)), said


HEAD = """
# ScaleBench

`python tests/benchmarks/bench_scalebench.py --write` makes this table (public tables beside the checkout;
arXiv 2604.22753). R2 of the dear runs, within [-1, 1], the mean over laws and repeats. Picked: runs that
the share of the budget buys, chosen by what they are expected to teach about the dear ones, whose cells are
known and whose losses are not. Together: the laws' mean (picked), their stack (all runs) with its weights in
the last group. Published: the best of the benchmark's selections, and all runs; it has up to ten forms of
law a table, here there are one or two, so that the means are not over the same laws.

| table | share | repeats | runs | picked | published | together | all | published | together | weights |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def row(name: str, repeats: int) -> str:
    table = TABLES[name]
    score, mean, count = selected(name, repeats)
    alone, stacked, said = whole(name)
    numbers = (score, table.published[0], mean, alone, table.published[1], stacked)
    shown = " | ".join(f"{n:.3f}" if k not in (1, 4) else f"{n:.2f}" for k, n in enumerate(numbers))
    return f"| {name} | {table.share:.0%} | {repeats} | {count:.0f} | {shown} | {said} |"


def written(page: str, lines: Sequence[str]) -> str:
    """The page with these rows in place of those of the same tables."""
    before, _, after = page.partition("\n" + HEADING)
    old = [line for line in after.splitlines() if line.startswith("| ") and not line.startswith("| table")]
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in [*old, *lines]}
    return before.rstrip("\n") + "\n" + HEAD + "\n".join(rows[n] for n in TABLES if n in rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in arguments.tables or TABLES:
        line = row(name, arguments.repeats)
        print(line, flush=True)
        if arguments.write:
            PAGE.write_text(written(PAGE.read_text(), [line]))


if __name__ == "__main__":
    main()
