"""The `calibration-study` instrument: how many examples a method needs, and how closely it fits their
domain.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from workbench.axis import entries_in, parameter
from workbench.code_version import code_version
from workbench.errors import BadInput, Stopped
from workbench.instruments import SubjectInstrument
from workbench.measures.attribution import unit_of
from workbench.measures.calibration.calibration_study_result import CalibrationStudyResult
from workbench.measures.calibration.chains import Chain, Study, beside, chain
from workbench.measures.calibration.domains import (
    AUTO,
    OTHER,
    SAME,
    SecondDomain,
    drawn,
    pool,
    rows_of,
    second_domain,
)
from workbench.measures.calibration.domains import size_of as count_of
from workbench.measures.calibration.resampled import Resampled, Values, by_text, interval
from workbench.measures.fidelity import check_comparable, stamp
from workbench.measures.reference import Reference, batch_of, reference_of
from workbench.names import run_in_turn
from workbench.progress import Progress
from workbench.results import Result
from workbench.storage.forecast import Forecast, weight_bytes
from workbench.subjects import Split, Subject
from workbench.unfinished.finished_parts import FinishedParts, Record

PREVIEW_EVERY = 1.0  # seconds
PROBED = 2  # examples of the test split that methods which always measure on it are given
TRIED = 4  # examples of a trial
NONE = "none"  # the data of a method that reads none


@dataclass(frozen=True)
class Cell:
    """One method on one draw of so many examples from one source."""

    method: str
    data: str
    amount: int
    draw: int

    @property
    def name(self) -> str:
        return json.dumps([self.method, self.data, self.amount, self.draw])


class CalibrationStudy(SubjectInstrument):
    """How many calibration examples are enough, and does the method fit their domain more than others? Each
    method on several draws of each amount, measured by the divergence to the dense model on the domain of the
    examples and on a second one, beside the same method without calibration data.
    """

    summary_line: ClassVar[str] = "data x amount x method on two domains: how many examples are enough"

    methods: str = parameter(
        "gptq,wanda",
        "methods, separated by commas: gptq, awq, sparsegpt, wanda or anything else that `workbench run` "
        "takes and that changes a model",
    )
    amounts: list[int] = parameter([8, 32, 128], "numbers of calibration examples", unit="examples")
    draws: int = parameter(3, "draws of each number of examples", ge=1, le=100)
    sources: str = parameter(
        "train",
        "where the examples are drawn from, separated by commas: splits, 'second' (of the second domain what "
        "is not measured on), 'random' (tokens)",
    )
    second: str = parameter(
        AUTO,
        "the second domain: a split, a file with a column text, 'random' tokens; auto: the split "
        "other-domain, or random tokens where there is none",
    )
    bits: int = parameter(3, "width of integer formats", ge=1, le=8, unit="bits", group="What is compressed")
    sparsity: float = parameter(
        0.5, "share of the weights that pruning removes", gt=0, lt=1, step=0.01, group="What is compressed"
    )
    layers: str = parameter(
        "blocks",
        "layers to change, comma-separated globs; 'blocks': all in the blocks",
        group="What is compressed",
    )
    test_examples: int = parameter(
        64, "texts of each domain that are measured on", ge=2, unit="examples", group="Data"
    )
    test_split: str = parameter("test", "split the texts of the first domain come from", group="Data")

    @classmethod
    def result_class(cls) -> type[Result]:
        return CalibrationStudyResult

    # ---- what is asked -------------------------------------------------------------------------------------
    @property
    def study(self) -> Study:
        return Study(self.bits, self.sparsity, self.layers, self.seed, self.device)

    @property
    def named(self) -> list[str]:
        return listed(self.methods)

    @property
    def places(self) -> list[str]:
        return listed(self.sources)

    def chains(self) -> tuple[list[Chain], dict[str, str]]:
        """One chain a method, for the largest amount, and those without data that they are beside."""
        self.lists()
        return beside([chain(name, self.study, max(self.amounts)) for name in self.named])

    def lists(self) -> dict[str, list[Any]]:
        """What every combination of is run; `BadInput` for one without any, or with one twice."""
        found: dict[str, list[Any]] = {
            "methods": self.named,
            "sources": self.places,
            "amounts": self.amounts,
        }
        for name, values in found.items():
            if not values:
                raise BadInput(f"{name}: is empty; give at least one")
            if len(set(values)) < len(values):
                raise BadInput(f"{name}: {', '.join(map(str, values))} holds one twice; give each once")
        if bad := [amount for amount in self.amounts if amount < 1]:
            raise BadInput(f"amounts: {bad[0]} is no number of examples; give whole numbers from 1")
        return found

    def code(self) -> str:
        """Version of the code that the methods reach."""
        steps = [step for made in self.chains()[0] for step in made.steps]
        reached = [entry.value for step in steps for entry in entries_in(step)]
        return code_version(type(self), [*(type(step) for step in steps), *reached])

    def key(self, on: Any) -> str:
        """As for every instrument, with what the second domain's file is now."""
        if not Path(self.second).is_file():
            return super().key(on)
        parts = [super().key(on), stamp(self.second)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def check(self, on: Subject) -> None:
        check_comparable(on, "methods", ())
        self.lists()
        on.split(self.test_split)
        texts = Texts.of(self, on)
        for made in self.chains()[0]:
            rows = drawn(texts.pools[self.places[0]], max(self.amounts), self.seed)
            made.steps[0].check(texts.given(rows))

    def asks_beyond(self, on: Any) -> Iterator[str]:
        yield from super().asks_beyond(on)
        if "amounts" in self.model_fields_set:
            for source in self.places:
                if source in on.splits and on.size(source) < max(self.amounts):
                    yield (
                        f"amounts: {max(self.amounts)} are asked for, and the split {source} has "
                        f"{on.size(source)}; these are taken"
                    )

    # ---- what it will cost ---------------------------------------------------------------------------------
    def cells(self, texts: Texts) -> list[Cell]:
        """Methods without data first, then the smallest amounts of all methods, so that a Stop leaves whole
        curves; no more than there are examples.
        """
        chains = self.chains()[0]
        found = [Cell(made.method, NONE, 0, 0) for made in chains if made.free]
        for source in self.places:
            there = count_of(texts.pools[source])
            for amount in sorted({min(amount, there) for amount in self.amounts}):
                draws = 1 if amount == there else self.draws
                found += [
                    Cell(made.method, source, amount, draw)
                    for draw in range(draws)
                    for made in chains
                    if not made.free
                ]
        return found

    def foretold_memory(self, on: Any) -> Forecast | None:
        """The dense model, the changed one, and what the method itself says that it will hold."""
        least = {"weights": 2 * weight_bytes(on.model)}
        seen = Texts.of(self, on).on
        own = [made.steps[0].foretold_memory(seen) for made in self.chains()[0]]
        totals = [found.total for found in own if found is not None]
        held = max([0, *totals]) - least["weights"]
        return Forecast(least | {"work of the methods": max(held, 0)}, exact=False)

    def foretold_seconds(self, on: Any) -> float | None:
        """From a trial of a few texts, and of a block where a method walks over blocks: an estimate."""
        texts = Texts.of(self, on)
        seen = texts.on
        seen.evaluate(SAME, limit=1)
        began = time.perf_counter()
        seen.evaluate(SAME, limit=TRIED)
        text = (time.perf_counter() - began) / min(TRIED, seen.size(SAME))
        own: dict[tuple[str, int], float] = {}
        total = 0.0
        for cell in self.cells(texts):
            place = cell.method, cell.amount
            if place not in own:
                own[place] = self.seconds_of(cell, texts, text)
            total += own[place] + text * (seen.size(SAME) + seen.size(OTHER))
        return total

    def seconds_of(self, cell: Cell, texts: Texts, text: float) -> float:
        """Of the method alone. text : seconds of a pass over a text"""
        made, on = self.made(cell), texts.on
        if cell.data != NONE:
            on = texts.given(drawn(texts.pools[cell.data], cell.amount, self.seed))
        told = [step.foretold_seconds(on) for step in made.steps[:1]]
        known = [seconds for seconds in told if seconds is not None]
        passes = 2 * text * max(cell.amount, 1) * (len(made.steps) - len(known))
        return sum(known) + passes

    def made(self, cell: Cell) -> Chain:
        """What a cell runs."""
        known = {found.method: found for found in self.chains()[0]}
        if known[cell.method].free:
            return known[cell.method]
        return chain(cell.method, self.study, cell.amount)

    # ---- the run -------------------------------------------------------------------------------------------
    def _run(self, on: Subject, progress: Progress) -> Result:
        texts = Texts.of(self, on)
        with closing(FinishedParts("calibration-study")) as finished:
            run = Run(self, texts, finished, progress)
            run.all()
            return run.result()


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@dataclass(frozen=True)
class Texts:
    """on : the subject with the texts of both domains as its splits `same` and `other`
    pools : source -> examples to draw from
    """

    on: Subject
    second: SecondDomain
    pools: dict[str, Split]

    @classmethod
    def of(cls, asked: CalibrationStudy, on: Subject) -> Texts:
        count, split, seed = asked.test_examples, asked.test_split, asked.seed
        second = second_domain(on, asked.second, split, count, seed)
        found = {source: pool(on, source, split, second, seed) for source in asked.places}
        first = rows_of(on.split(split), torch.arange(min(count, on.size(split))))
        seen = on
        for name, rows in (
            (SAME, first),
            (OTHER, second.tested),
            ("test", rows_of(first, torch.arange(PROBED))),
        ):
            seen = with_split(seen, name, rows)
        return cls(seen, second, found)

    def given(self, rows: Split) -> Subject:
        """The dense subject with these examples to calibrate on."""
        return with_split(self.on, "calibration", rows)


def with_split(on: Subject, name: str, rows: Split) -> Subject:
    """`Subject.with_split`, its fingerprint from the subject's and the examples': no weight is read again."""
    made = on.with_split(name, rows)
    state = hashlib.sha256(f"{on.fingerprint}\0{name}\0".encode())
    for column, values in sorted(rows.items()):
        state.update(f"{column}\0{values.dtype}\0{tuple(values.shape)}\0".encode())
        state.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    made.adopt_fingerprint(state.hexdigest()[:24])
    return made


@dataclass
class Run:
    """One run: `found` holds what was measured, by cell."""

    asked: CalibrationStudy
    texts: Texts
    finished: FinishedParts
    progress: Progress
    found: dict[Cell, Record] = field(default_factory=dict)
    previewed: float = 0.0

    def all(self) -> None:
        cells = self.asked.cells(self.texts)
        for cell in self.progress.track(cells, "calibrate and measure", len(cells)):
            record = self.finished.get(cell.name, lambda cell=cell: self.measured(cell))  # type: ignore[misc]
            if record is None:
                self.progress.partial = True
                return
            self.found[cell] = record
            self.preview()

    def reference(self, domain: str) -> Reference | None:
        """The dense model's answers, asked for when first needed, and kept with the subject."""
        on = self.texts.on
        return reference_of(on, domain, None, self.progress.quiet(), batch_size=batch_of(on, domain))

    def measured(self, cell: Cell) -> Record | None:
        """What a cell gives; None when it was stopped."""
        try:
            return self.calibrated(cell)
        except Stopped:
            return None

    def calibrated(self, cell: Cell) -> Record | None:
        asked, texts = self.asked, self.texts
        record: Record = {"examples": 0, "tokens": 0, "sha256": ""}
        on = texts.on
        if cell.data != NONE:
            on = texts.given(drawn(texts.pools[cell.data], cell.amount, asked.seed + cell.draw))
            card = on.examples_card("calibration", cell.amount)
            record = {name: card[name] for name in ("examples", "tokens", "sha256") if name in card}
        began = time.perf_counter()
        inner = self.progress.quiet()
        steps = run_in_turn(asked.made(cell).steps, on, inner, cache=False)
        *_, last = steps
        if inner.stopped:
            return None
        record["seconds"] = time.perf_counter() - began
        for domain in (SAME, OTHER):
            reference = self.reference(domain)
            compared = None if reference is None else reference.against(last.subject, inner, asked.seed)
            if compared is None or inner.stopped:
                return None
            sums, items = by_text(compared)
            low, high = compared.distance()[1:]
            record[domain] = {"sums": sums.tolist(), "items": items.tolist(), "low": low, "high": high}
        return record

    def preview(self) -> None:
        if self.progress.watched and time.monotonic() - self.previewed > PREVIEW_EVERY:
            self.previewed = time.monotonic()
            self.progress.preview(self.result())

    # ---- the result ----------------------------------------------------------------------------------------
    def result(self) -> Result:
        draws = pd.DataFrame(
            [row for cell, record in self.found.items() for row in draw_rows(cell, record)], columns=DRAWS
        )
        table = self.summed()
        return self.asked.result(table, self.facts(table), tables={"draws": draws})

    def summed(self) -> pd.DataFrame:
        """One row a method, source and amount, over its draws."""
        groups: dict[tuple[str, str, int], list[Record]] = {}
        for cell, record in self.found.items():
            groups.setdefault((cell.method, cell.data, cell.amount), []).append(record)
        most = {
            (method, data): max(a for m, d, a in groups if (m, d) == (method, data))
            for method, data, _ in groups
        }
        twins = self.asked.chains()[1]
        rows = []
        for (method, data, amount), records in groups.items():
            free = groups.get((twins.get(method, ""), NONE, 0))
            largest = groups[method, data, most[method, data]]
            rows.append(
                {"method": method, "data": data, "examples": amount, "draws": len(records)}
                | self.numbers(records, largest, free)
                | {"beside": twins.get(method, "") if free else ""}
            )
        return pd.DataFrame(rows, columns=COLUMNS)

    def numbers(
        self, records: Sequence[Record], largest: Sequence[Record], free: Sequence[Record] | None
    ) -> Record:
        """Means with 95 % intervals, over the same texts and draws for all."""
        found: Record = {}
        drawn_means: dict[str, Values] = {}
        for domain, prefix in ((SAME, ""), (OTHER, "second_")):
            over = Resampled(np.array(records[0][domain]["items"]), self.asked.seed)
            sums = sums_of(records, domain)
            means = drawn_means[domain] = over.means(sums)
            low, high = interval(means)
            each = sums.sum(1) / over.items.sum()
            found |= {f"{prefix}kl": over.mean(sums), f"{prefix}kl_low": low, f"{prefix}kl_high": high}
            found |= {f"{prefix}kl_least": float(each.min()), f"{prefix}kl_most": float(each.max())}
            if domain == SAME:
                excess = means - over.means(sums_of(largest, domain))
                found["above_largest_low"], found["above_largest_high"] = interval(excess)
        with np.errstate(all="ignore"):
            ratio = drawn_means[OTHER] / drawn_means[SAME]
        found["ratio"] = found["second_kl"] / found["kl"] if found["kl"] else float("nan")
        found["ratio_low"], found["ratio_high"] = interval(ratio)
        if free:
            base = {d: Resampled(np.array(free[0][d]["items"]), self.asked.seed) for d in (SAME, OTHER)}
            usual = {d: over.means(sums_of(free, d)) for d, over in base.items()}
            plain = {d: over.mean(sums_of(free, d)) for d, over in base.items()}
            found["overfit"] = found["ratio"] / (plain[OTHER] / plain[SAME])
            found["overfit_low"], found["overfit_high"] = interval(ratio / (usual[OTHER] / usual[SAME]))
        return found

    def facts(self, table: pd.DataFrame) -> Record:
        asked, on = self.asked, self.texts.on
        facts: Record = {
            "first_domain": asked.test_split,
            "second_domain": self.texts.second.name,
            "unit": unit_of(on),
            "texts": f"{on.size(SAME)} and {on.size(OTHER)}",
        }
        first = table[table["data"] == asked.places[0]]
        for method in dict.fromkeys(first["method"]):
            mine = first[first["method"] == method].sort_values("examples")
            facts[f"enough_{method}"] = enough(mine)
            last = mine.iloc[-1]
            if last["beside"]:
                facts[f"overfit_{method}"] = overfit_in_words(last)
        return facts


def enough(mine: pd.DataFrame) -> str:
    """The fewest examples from which on the divergence is not above that of most examples, as far as the
    interval of their difference can tell, and how far above that the interval goes.
    """
    if len(mine) < 2:
        return "not known: one amount"
    above = (mine["above_largest_low"] > 0).to_numpy()
    first = int(np.nonzero(above)[0][-1]) + 1 if above.any() else 0
    amounts = mine["examples"].tolist()
    if first == len(mine) - 1:
        return f"{amounts[first]} or more"
    last = mine.iloc[-1]
    most = max(100 * mine["above_largest_high"].iloc[first] / last["kl"], 0.0) if last["kl"] else 0.0
    return f"{amounts[first]} (at most {most:.2g} % above {amounts[-1]})"


def overfit_in_words(row: pd.Series[Any]) -> str:
    """`1.32 (1.2 to 1.5) times nearest`: how much more the second domain suffers than it does without."""
    low, high = row["overfit_low"], row["overfit_high"]
    told = "no sign of it" if low <= 1 else "fits the calibration domain"
    return f"{row['overfit']:.3g} ({low:.3g} to {high:.3g}) beside {row['beside']}: {told}"


DRAWS = [
    "method",
    "data",
    "examples",
    "draw",
    "domain",
    "kl",
    "kl_low",
    "kl_high",
    "tokens",
    "seconds",
    "sha256",
]
COLUMNS = [
    *("method", "data", "examples", "draws", "kl", "kl_low", "kl_high", "kl_least", "kl_most"),
    *("second_kl", "second_kl_low", "second_kl_high", "second_kl_least", "second_kl_most"),
    *("above_largest_low", "above_largest_high", "ratio", "ratio_low", "ratio_high"),
    *("beside", "overfit", "overfit_low", "overfit_high"),
]


def draw_rows(cell: Cell, record: Record) -> Iterator[Record]:
    for domain in (SAME, OTHER):
        mine = record[domain]
        yield {
            "method": cell.method,
            "data": cell.data,
            "examples": cell.amount,
            "draw": cell.draw,
            "domain": domain,
            "kl": float(np.sum(mine["sums"]) / np.sum(mine["items"])),
            "kl_low": mine["low"],
            "kl_high": mine["high"],
            "tokens": record.get("tokens", 0),
            "seconds": record["seconds"],
            "sha256": record["sha256"],
        }


def sums_of(records: Sequence[Record], domain: str) -> Values:
    """(draws, texts)"""
    return np.array([record[domain]["sums"] for record in records])
