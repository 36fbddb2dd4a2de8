"""The `attribution` instrument: which part of a changed model made it another one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.measures.attribution_result import AttributionResult, beside_usual, unusual
from workbench.measures.changed_model import BesideChanged, changed_parameter
from workbench.measures.intervals import block_bootstrap
from workbench.measures.parts import (
    OUTSIDE,
    OutputScores,
    Part,
    beside,
    noisy,
    parts_of,
    second_order,
    taken,
    weight_error,
)
from workbench.measures.reference import kind_of, on_its_data
from workbench.measures.suffix import Suffix
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject
from workbench.unfinished.finished_parts import FinishedParts, Record

#: full / sum of the parts within which what the parts do adds up well enough to predict from.
ADDITIVE = (0.8, 1.25)
LEVELS = {
    "blocks": ("block",),
    "worst": ("block", "module"),
    "roles": ("block", "role"),
    "modules": ("block", "role", "module"),
}
PREVIEW_EVERY = 1.0  # seconds
#: Scores that cost no swap, and what is measured with one.
SCORES = ("weight_error", "output_error", "output_turn", "second_order")
DRAWS = 2  # of targets, for each example of the second order


class Attribution(BesideChanged):
    """Which part broke it? Each changed block, kind of module and module alone is put into the dense model,
    and its distance to it measured; what repairing the worst would give is predicted, and measured.
    """

    summary_line: ClassVar[str] = "which changed block or module makes the divergence"

    changed: str = changed_parameter()
    parts: Literal["blocks", "worst", "roles", "modules"] = parameter(
        "modules",
        "how finely: blocks; also each module of the worst block; each kind of module in all blocks; also "
        "each module",
    )
    test_examples: int = parameter(8, "texts", ge=1, unit="examples", group="Data")
    split: str = parameter("test", "split the texts come from", group="Data")
    give_back: int = parameter(3, "worst parts whose repair is predicted and measured", ge=0, le=32)
    noise: bool = parameter(True, "also swap each block with random noise of the norm of its change")
    second_order: bool = parameter(
        True, "also predict each part's divergence from gradients, 1/2 d.G d of its matrices (no swap)"
    )
    disk: float = parameter(
        2048.0,
        "of the dense distributions kept on disk while it runs, to save time",
        ge=0,
        unit="MB",
        group="Machine and seed",
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        return AttributionResult

    def _run(self, on: Subject, progress: Progress) -> Result:
        return self.between(on, self.changed_model(on), progress)

    def between(self, dense: Subject, changed: Subject, progress: Progress | None = None) -> Result:
        """The result for a changed model that is at hand; not cached."""
        changed = on_its_data(dense, changed)
        name = dense.name
        dense, changed = beside(dense, changed)
        parts = parts_of(dense, changed)
        if not parts:
            raise BadInput(
                f"changed: {changed.name!r} is {name!r} itself, weight for weight; nothing differs"
            )
        wanted = [part for part in parts if part.level in LEVELS[self.parts]]
        with closing(FinishedParts("attribution")) as finished:
            run = Run(self, dense, changed, wanted, finished, progress or Progress())
            run.all()
            return run.result()


@dataclass
class Run:
    """One run: what is measured is in `found`, by the part's level and name."""

    asked: Attribution
    dense: Subject
    changed: Subject
    parts: list[Part]
    finished: FinishedParts
    progress: Progress
    found: dict[Part, Record] = field(default_factory=dict)
    facts: Record = field(default_factory=dict)
    given_back: list[Record] = field(default_factory=list)
    previewed: float = 0.0

    def __post_init__(self) -> None:
        asked = self.asked
        self.suffix = Suffix(self.dense, asked.split, asked.test_examples, self.progress, asked.disk)
        self.example = self.suffix.distances.example
        self.found = {part: {} for part in self.parts}

    def all(self) -> None:
        if not self.controls():
            return
        self.predict()
        for level in ("block", "role", "module"):
            parts = [part for part in self.parts if part.level == level]
            label = {"block": "blocks", "role": "kinds of module", "module": "modules"}[level]
            for part in self.progress.track(self.through(parts), f"{label} swapped in", len(parts)):
                record = self.measured(part)
                if record is None:
                    return
                self.found[part] |= record
                self.preview()
            if level == "block" and self.asked.parts == "worst":
                self.only_worst()
        for level in ("block", "module"):
            self.repair(level)

    def only_worst(self) -> None:
        """Of the modules, keep those of the block with the largest distance."""
        worst = max((p for p in self.parts if p.level == "block"), key=lambda p: self.found[p]["kl"])
        inside = [p for p in self.parts if p.level == "module" and p.block == worst.block]
        if worst.block == OUTSIDE:
            inside = [p for p in inside if p.role == worst.role]
        self.parts = [p for p in self.parts if p.level == "block"] + inside

    # ---- one after another ---------------------------------------------------------------------------------
    def through(self, parts: Sequence[Part]) -> Iterator[Part]:
        """Parts in the order of their blocks, the walk moved on to each. Roles come one by one, from the
        beginning.
        """
        self.suffix.begin()
        if parts and parts[0].level == "role":
            yield from parts
            return
        yield from (part for part in parts if part.block == OUTSIDE)
        blocks = self.suffix.order or list(dict.fromkeys(p.block for p in parts if p.block != OUTSIDE))
        for place, block in enumerate(blocks):
            here = [part for part in parts if part.block == block]
            if place == len(blocks) - 1:  # behind every output that was passed on
                self.unswapped(f"nothing, from {block} on", lambda: self.suffix.ask({}))
            yield from here
            self.move_on(block, here)

    def move_on(self, block: str, here: Sequence[Part]) -> None:
        """Past a block, the answers of its parts compared on the way."""
        pairs = {
            name: (self.dense.model.get_submodule(name), self.changed.model.get_submodule(name))
            for part in here
            for name in part.modules
        }
        names = [f"output:{part.level}:{part.name}" for part in here]
        known = all(name in self.finished.known for name in names)
        with OutputScores({} if known else pairs) as scores:
            self.suffix.advance(block)
        if self.progress.stopped:
            return
        for part, name in zip(here, names, strict=True):
            measured = dict(zip(("output_error", "output_turn"), scores.of(part.modules), strict=True))
            self.found[part] |= self.finished.get(name, measured.copy) or {}

    def measured(self, part: Part) -> Record | None:
        """The distance of the dense model with one part of the changed one."""

        def measure() -> Record | None:
            found = self.suffix.ask(taken(self.changed.model, part))
            if found is None:
                return None
            return self.numbers(found) | {
                "weight_error": weight_error(self.dense.model, self.changed.model, part)
            }

        record = self.finished.get(f"{part.level}:{part.name}", measure)
        if record is None or not self.asked.noise or part.level != "block":
            return record
        noise = self.finished.get(f"noise:{part.name}", lambda: self.noise(part))
        return None if noise is None else record | noise

    def noise(self, part: Part) -> Record | None:
        modules = noisy(self.dense.model, self.changed.model, part, self.asked.seed)
        if not modules:
            return {"noise": float("nan")}
        found = self.suffix.ask(modules)
        return None if found is None else {"noise": float(found.mean())}

    def numbers(self, values: NDArray[np.float64]) -> Record:
        low, high = block_bootstrap(values, self.example, self.asked.seed)
        return {"kl": float(values.mean()), "kl_low": low, "kl_high": high}

    # ---- controls and repairs ------------------------------------------------------------------------------
    def controls(self) -> bool:
        """Nothing swapped in, which is exactly 0, and everything; False when stopped."""

        def everything() -> Record | None:
            found = self.suffix.ask_other(self.changed.model, {})
            return None if found is None else self.numbers(found)

        self.unswapped("nothing", lambda: self.suffix.ask_other(self.dense.model, {}))
        full = self.finished.get("everything", everything)
        if full is None or self.progress.stopped:
            return False
        self.facts |= {"full": full["kl"], "full_low": full["kl_low"], "full_high": full["kl_high"]}
        return True

    def unswapped(self, name: str, ask: Callable[[], NDArray[np.float64] | None]) -> None:
        """The largest distance of an item when nothing is swapped in."""

        def measure() -> Record | None:
            found = ask()
            return None if found is None else {"most": float(np.abs(found).max())}

        record = self.finished.get(name, measure)
        if record is not None:
            self.facts["no_swap"] = max(record["most"], self.facts.get("no_swap", 0.0))

    def predict(self) -> None:
        """The divergence that each part's change of its matrices makes, to second order."""
        if not self.asked.second_order or kind_of(self.dense.task) not in ("language", "classification"):
            return

        def measure() -> Record | None:
            found = second_order(
                self.dense,
                self.changed,
                self.parts,
                self.asked.split,
                self.asked.test_examples,
                DRAWS,
                self.asked.seed,
                self.progress,
            )
            return None if self.progress.stopped else {"values": found}

        record = self.finished.get("second order", measure)
        if record is not None:
            for part, value in zip(self.parts, record["values"], strict=True):
                self.found[part]["second_order"] = value

    def repair(self, level: str) -> None:
        """Give the worst parts of the changed model back to the dense one: predicted and measured."""
        parts = [part for part in self.parts if part.level == level]
        some = level == "module" and self.asked.parts == "worst"
        if self.progress.stopped or not self.asked.give_back or not parts or some:
            return
        worst = sorted(parts, key=lambda part: -self.found[part]["kl"])[: self.asked.give_back]
        total = sum(self.found[part]["kl"] for part in parts)
        removed = sum(self.found[part]["kl"] for part in worst)
        back: dict[str, Any] = {}
        for part in worst:
            back |= taken(self.dense.model, part)

        def measure() -> Record | None:
            found = self.suffix.ask_other(self.changed.model, back)
            return None if found is None else self.numbers(found)

        record = self.finished.get(f"back:{level}:{len(worst)}", measure)
        if record is None:
            return
        predicted = self.facts["full"] * (1 - removed / total) if total else 0.0
        self.given_back.append(
            {
                "level": level,
                "parts": ", ".join(part.name for part in worst),
                "predicted": predicted,
                "measured": record["kl"],
                "measured_low": record["kl_low"],
                "measured_high": record["kl_high"],
                "error": abs(predicted / record["kl"] - 1) if record["kl"] else 0.0,
            }
        )

    def preview(self) -> None:
        if self.progress.watched and time.monotonic() - self.previewed > PREVIEW_EVERY:
            self.previewed = time.monotonic()
            self.progress.preview(self.result())

    # ---- the result ----------------------------------------------------------------------------------------
    def result(self) -> Result:
        rows = [
            {"level": part.level, "part": part.name, "block": part.block, "role": part.role} | record
            for part in self.parts
            if "kl" in (record := self.found[part])
        ]
        table = pd.DataFrame(rows, columns=["level", "part", "block", "role", *COLUMNS])
        sums = table.groupby("level")["kl"].transform("sum")
        table.insert(4, "share", (table["kl"] / sums.where(sums > 0)).fillna(0.0))
        modules = sum(part.level == "module" for part in self.parts)
        every = self.asked.parts == "modules" and modules == (table["level"] == "module").sum()
        table = beside_usual(table, every)
        tables = {"scores": correlations(table)}
        if self.given_back:
            tables["given_back"] = pd.DataFrame(self.given_back)
        return self.asked.result(table, self.summed_up(table), tables=tables)

    def summed_up(self, table: pd.DataFrame) -> Record:
        facts: Record = {
            "reference": self.dense.name,
            "changed": self.changed.name,
            "unit": unit_of(self.dense),
        }
        facts |= self.facts
        for level, name in (("block", "blocks"), ("module", "modules")):
            mine = table[table["level"] == level]
            if not len(mine) or len(mine) < sum(part.level == level for part in self.parts):
                continue
            total = float(mine["kl"].sum())
            if level == "module" and self.asked.parts == "worst":
                facts["worst_block_modules_sum"] = total
            else:
                facts[f"{name}_sum"] = total
                facts[f"{name}_additivity"] = facts["full"] / total if total else 1.0
            worst = mine.iloc[int(mine["kl"].argmax())]
            facts[f"worst_{level}"] = f"{worst['part']} ({100 * worst['share']:.1f} %)"
        facts |= {
            f"repaired_{row['level']}s_{name}": row[name]
            for row in self.given_back
            for name in ("predicted", "measured")
        }
        blocks = table[(table["level"] == "block") & (table["noise"] > 0)]
        if len(blocks):
            facts["against_noise"] = float((blocks["kl"] / blocks["noise"]).median())
        ratios = {n: facts[f"{n}_additivity"] for n in ("blocks", "modules") if f"{n}_additivity" in facts}
        if ratios:
            facts["prediction"] = said(ratios)
        if above := unusual(table):
            facts["above_usual"] = above
        return facts


COLUMNS = ("kl", "kl_low", "kl_high", "noise", *SCORES)


def said(ratios: dict[str, float]) -> str:
    """Whether predictions from the parts can be relied on."""
    low, high = ADDITIVE
    outside = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if not low <= ratio <= high]
    if not outside:
        return "reliable: the parts add up"
    return f"unreliable: full / sum of the {', of the '.join(outside)}, outside {low} to {high}"


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of what is cheap to know with the measured distance, by level."""
    rows = []
    for level, mine in table.groupby("level"):
        for score in SCORES:
            known = mine[mine[score].notna()]
            ranked = len(known) > 2 and known[score].nunique() > 1 and known["kl"].nunique() > 1
            value = float(stats.spearmanr(known[score], known["kl"])[0]) if ranked else float("nan")
            rows.append({"level": level, "score": score, "rank_correlation": value, "parts": len(known)})
    return pd.DataFrame(rows, columns=["level", "score", "rank_correlation", "parts"])


def unit_of(on: Subject) -> str:
    units = {"language": "nats a token", "classification": "nats an example"}
    return units.get(kind_of(on.task), "distance")
