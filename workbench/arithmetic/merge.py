"""The `merge` instrument: several models of one architecture become one."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import pandas as pd

from workbench.arithmetic.conflicts import DARE_LIMIT, conflict_table, whole_model
from workbench.arithmetic.fine_tunes import check_trains, fine_tuned, idle_where_named
from workbench.arithmetic.lineage import lineage, zeros_lost
from workbench.arithmetic.merge_result import MergeResult
from workbench.arithmetic.merging.merging import MERGE, Setting, place
from workbench.arithmetic.models import Models, Rule, side_by_side
from workbench.arithmetic.sources import Source, of_subject, opened, plain, source_of
from workbench.axis import Choice, parameter
from workbench.errors import BadInput, Stopped, notice
from workbench.instruments import SubjectInstrument
from workbench.measures.fidelity import sources_in, stamp
from workbench.measures.reference import distance_facts, reference_of
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject

#: Strengths that are tried where none is given: of a share, and of a multiple of the differences.
SHARES = tuple(round(0.1 * i, 1) for i in range(11))
SCALES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)


class Merge(SubjectInstrument):
    """Merge models that were trained from one base: the whole path is measured on validation, the best point
    is taken, and reported on test with its divergence to each parent.
    """

    summary_line: ClassVar[str] = "several models become one: the path on validation, the best point on test"
    changes_model: ClassVar[bool] = True

    method: Choice = MERGE.choice("uniform")
    parents: str = parameter(
        "",
        "models to merge, separated by commas: folders, saved results, hub ids, built-ins; "
        "empty: fine-tunes of the subject are made here",
    )
    base: str = parameter(
        "", "what all were trained from, where it is not the subject, which is then the first parent"
    )
    fine_tunes: int = parameter(
        3, "fine-tunes to make where no parents are named", ge=1, le=32, group="Fine-tunes made here"
    )
    steps: int = parameter(
        100, "optimizer steps of each of them", ge=1, le=1_000_000, scale="log", group="Fine-tunes made here"
    )
    learning_rate: float = parameter(
        1e-3, "peak learning rate of each of them", gt=0, le=100, scale="log", group="Fine-tunes made here"
    )
    strengths: tuple[float, ...] = parameter(
        (), "points of the path: shares from 0 to 1, or multiples of the differences; empty: the usual ones"
    )
    densities: tuple[float, ...] = parameter(
        (), "shares of the differences to keep, a path for each; empty: the method's own"
    )
    measured_on: Literal["subject", "parents"] = parameter(
        "subject",
        "data to measure on: the subject's, or each parent's own with the parent's own head",
        group="Choice",
    )
    choose_by: Literal["loss", "accuracy"] = parameter(
        "loss", "what the best point has the best of", group="Choice"
    )
    keep_zeros: bool = parameter(True, "what is zero in every parent stays zero")
    validation_examples: int = parameter(
        256, "examples that points are chosen on", ge=2, unit="examples", group="Data"
    )
    test_examples: int = parameter(
        256, "examples that the chosen one is reported on", ge=2, unit="examples", group="Data"
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        return MergeResult

    @property
    def sources(self) -> list[str]:
        return sources_in(self.parents)

    def key(self, on: Any) -> str:
        stamps = [stamp(source) for source in (*self.sources, self.base)]
        return hashlib.sha256(json.dumps([super().key(on), stamps]).encode()).hexdigest()[:24]

    # ---- what can be seen to fail --------------------------------------------------------------------------
    def idle(self) -> Iterator[str]:
        yield from super().idle()
        yield from idle_where_named(self, "parents")

    def check(self, on: Subject) -> None:
        for split in ("validation", "test"):
            on.split(split)
        self.check_grid()
        count = len(self.sources) + bool(self.base)
        if not self.sources:
            if self.base or self.measured_on == "parents":
                field = "base" if self.base else "measured_on"
                raise BadInput(f"{field}: needs parents that are named; name them with --parents")
            check_trains(on)
            count = self.fine_tunes
        if count == 1 and not self.method.has("one"):
            raise BadInput(
                f"parents: {self.method.name} merges two models or more, and there is one; name another"
            )
        if count > 2 and self.method.has("pair"):
            raise BadInput(
                f"parents: {self.method.name} goes from one model to another, and there are {count}"
            )
        if self.sources:
            base, parents = self.named(on)
            side_by_side(base, parents)

    def check_grid(self) -> None:
        if self.strengths and not self.method.has("strength"):
            raise BadInput(f"strengths: {self.method.name} has no strength; leave them out")
        if self.method.has("share") and not all(0 <= each <= 1 for each in self.strengths):
            raise BadInput(f"strengths: {self.strengths} is not accepted, shares lie between 0 and 1")
        if self.densities and not self.method.has("density"):
            raise BadInput(f"densities: {self.method.name} keeps all of a difference; leave them out")
        if not all(0 < each <= 1 for each in self.densities):
            raise BadInput(f"densities: {self.densities} is not accepted, shares lie above 0 and up to 1")

    # ---- the models ----------------------------------------------------------------------------------------
    def named(self, on: Subject) -> tuple[Source, list[Source]]:
        """The base and the parents that somebody has named."""
        parents = [source_of(source, on, "parents") for source in self.sources]
        if not self.base:
            return of_subject(on), parents
        return source_of(self.base, on, "base"), [of_subject(on), *parents]

    def models(self, on: Subject, progress: Progress) -> Models:
        if self.sources:
            base, parents = self.named(on)
        else:
            made = fine_tuned(on, self.fine_tunes, self.steps, self.learning_rate, self.seed, progress)
            base, parents = of_subject(on), [of_subject(each) for each in made]
        models = side_by_side(base, parents, self.seed)
        for name, why in models.left_out.items():
            notice(f"parents: {name} is left out and stays the subject's: {why}")
        if grids := sum(parent.grids for parent in parents):
            notice(
                f"parents: {grids} layers lie on grids of number formats, a merge on none; quantize it again"
            )
        return models

    def hosts(self, on: Subject) -> list[Subject]:
        """Models that merges are written to, with the data that they are measured on."""
        if self.measured_on == "subject":
            return [plain(on)]
        names = ([] if not self.base else [None]) + self.sources
        return [plain(on if each is None else opened(each, on, "parents")) for each in names]

    def judged(self, found: Sequence[Mapping[str, float]]) -> float:
        """What the best point has the least of: the mean over the data of the loss, or of the errors."""
        if self.choose_by == "accuracy" and any("accuracy" not in each for each in found):
            raise BadInput("choose_by: the task has no accuracy; choose by loss")
        sign = -1 if self.choose_by == "accuracy" else 1
        return sign * sum(each[self.choose_by] for each in found) / len(found)

    # ---- the run -------------------------------------------------------------------------------------------
    def _run(self, on: Subject, progress: Progress) -> Result:
        models = self.models(on, progress)
        conflicts = conflict_table(models, progress)
        hosts = self.hosts(on)
        setting = Setting(models, hosts, "validation", self.validation_examples, self.judged, progress)
        rows = self.ends(setting, progress)
        points = self.path(setting, progress)
        if not points:
            raise Stopped("merge: stopped before a merge was measured")
        best = min(points, key=lambda point: point["score"])
        rule = self.rule(setting, best["density"])
        table = pd.DataFrame([{k: v for k, v in row.items() if k != "score"} for row in (*rows, *points)])
        table["chosen"] = [False] * len(rows) + [point is best for point in points]
        tests, facts = self.tested(setting, rule, best, progress)
        mine = plain(on)
        place([mine], models, rule, best["strength"], self.keep_zeros)
        facts |= whole_model(conflicts) | zeros_lost(models, rule, best["strength"], self.keep_zeros)
        facts |= {
            "within_dare_limit": facts["mean_difference"] < DARE_LIMIT,
            "left_out": len(models.left_out),
        }
        tables = {"conflicts": conflicts, "tests": tests, "lineage": lineage(models, rule)}
        return self.result(table, facts, tables=tables, subject=mine)

    def rule(self, setting: Setting, density: float) -> Rule:
        """The method's rule, with a share of its differences where it has one."""
        chosen = self.method if density != density else self.method.with_options(density=density)
        found: Rule = chosen.value(setting, chosen.options)
        return found

    def grid(self) -> list[tuple[float, tuple[float, ...]]]:
        """(density, strengths) of each path; NaN and 1 where the method has none."""
        none = float("nan")
        densities = self.densities or (
            (self.method.options.density,) if self.method.has("density") else (none,)
        )
        usual = SHARES if self.method.has("share") else SCALES
        strengths = (self.strengths or usual) if self.method.has("strength") else (1.0,)
        return [(density, strengths) for density in densities]

    def ends(self, setting: Setting, progress: Progress) -> list[dict[str, Any]]:
        """The base and each parent, measured as merges are."""
        models, rows = setting.models, list[dict[str, Any]]()
        for source in progress.track((models.base, *models.parents), "measure the parents"):
            setting.hold(source)
            kind = "base" if source is models.base else "parent"
            rows.append({"kind": kind, "model": source.name} | averaged(setting.measured()))
        return rows

    def path(self, setting: Setting, progress: Progress) -> list[dict[str, Any]]:
        """Every point of the grid, measured on validation."""
        grid = self.grid()
        total = sum(len(strengths) for _, strengths in grid)
        every = itertools.chain.from_iterable(self.along(setting, *each) for each in grid)
        return list(progress.track(every, "measure the path", total))

    def along(self, setting: Setting, density: float, strengths: Sequence[float]) -> Any:
        rule = self.rule(setting, density)
        for strength in strengths:
            setting.place(rule, strength, self.keep_zeros)
            found = setting.measured()
            yield {
                "kind": "merge",
                "model": self.method.name,
                "strength": strength,
                "density": density,
                "score": self.judged(found),
            } | averaged(found)

    def tested(
        self, setting: Setting, rule: Rule, best: Mapping[str, Any], progress: Progress
    ) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Test loss of base, parents and merge, and the merge's divergence to each parent, on its data."""
        models, limit, quiet = setting.models, self.test_examples, progress.quiet()
        rows: list[dict[str, Any]] = []
        setting.hold(models.base)
        rows.append({"kind": "base", "model": models.base.name} | self.on_test(setting, quiet))
        for which in progress.track(range(len(models.parents)), "report on test"):
            setting.hold(models.parents[which])
            row = {"kind": "parent", "model": models.parents[which].name} | self.on_test(setting, quiet)
            host = setting.holding(which)
            reference = reference_of(host, "test", limit, quiet, changing=True)
            setting.place(rule, best["strength"], self.keep_zeros)
            found = None if reference is None else reference.against(host, quiet, self.seed)
            rows.append(row | ({} if found is None else distance_facts(found.measures())))
        setting.place(rule, best["strength"], self.keep_zeros)
        merge = self.on_test(setting, quiet)
        rows.append({"kind": "merge", "model": self.method.name} | merge)
        table = pd.DataFrame(rows)
        facts: dict[str, Any] = {"method": self.method.name, "models": len(models.parents)}
        if self.method.has("strength"):
            facts["strength"] = best["strength"]
        if self.method.has("density"):
            facts["density"] = best["density"]
        facts |= {f"validation_{name}": best[name] for name in ("loss", "accuracy") if name in best}
        facts |= {name: value for name, value in merge.items() if name in ("loss", "accuracy")}
        parents = table[table["kind"] == "parent"]
        facts |= {"best_parent_loss": float(parents["loss"].min()), "base_loss": float(table["loss"][0])}
        for name in ("kl", "distance"):
            if name in parents:
                facts[f"{name}_to_parents"] = float(parents[name].mean())
        return table, facts

    def on_test(self, setting: Setting, progress: Progress) -> dict[str, float]:
        found = [host.evaluate("test", limit=self.test_examples, progress=progress) for host in setting.hosts]
        return averaged(found)


def averaged(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of evaluations on several data, of the numbers that all of them have."""
    return {
        name: sum(each[name] for each in found) / len(found)
        for name in found[0]
        if all(name in e for e in found)
    }
