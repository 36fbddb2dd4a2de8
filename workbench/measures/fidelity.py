"""The `fidelity` instrument: any number of models against one reference on the same texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field

from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.instruments import SubjectInstrument
from workbench.latency import Latency
from workbench.measures.floor import Floor
from workbench.measures.language import TokenPairs, confidence_table
from workbench.measures.made_by import looked_into, made_by
from workbench.measures.reference import (
    Comparison,
    Reference,
    batch_of,
    check_kind,
    other_model,
    reference_of,
)
from workbench.measures.size import Size, gguf_size, size_of
from workbench.measures.words import LEGEND, verdict, word
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject
from workbench.subjects.gguf_files import is_gguf
from workbench.subjects.loaders import builtin_names, subject

if TYPE_CHECKING:
    import plotly.graph_objects as go


class FidelityView(BaseModel):
    """What the viewer may choose without measuring again."""

    x: Literal["bits", "megabytes"] = Field("megabytes", description="what the models are placed by")


class FidelityResult(Result):
    """The front: size against divergence, with quartiles over the items, the floor and the tolerance."""

    def view_model(self) -> type[BaseModel]:
        return FidelityView

    def figure(self, **view: Any) -> go.Figure:
        from workbench.figures import color, figure

        x = FidelityView(**view).x
        name = "kl" if "kl" in self.table else "distance"
        shown = self.table[self.table[name] > 0]
        words = {"kl": "KL to the reference (nats an item)", "distance": "distance to the reference"}
        unit = {"bits": "bits a weight", "megabytes": "size (MB)"}
        fig = figure(self.title(name), unit[x], words[name], yaxis_type="log")
        least = shown[name].min() / 100 if len(shown) else 0.0
        low, median, high = (
            shown[f"{name}_{part}"].clip(lower=least) for part in ("quarter", "median", "three_quarters")
        )
        fig.add_scatter(
            x=shown[x],
            y=median,
            error_y=dict(type="data", symmetric=False, array=high - median, arrayminus=median - low),
            mode="markers",
            marker=dict(symbol="line-ew-open", size=12, color=color(6)),
            name="median and quartiles",
            hoverinfo="skip",
        )
        best = front(shown[x].to_numpy(), shown[name].to_numpy())
        fig.add_scatter(
            x=shown[x].iloc[best],
            y=shown[name].iloc[best],
            mode="lines",
            line=dict(color=color(0, 0.5)),
            name="front",
            hoverinfo="skip",
        )
        fig.add_scatter(
            x=shown[x],
            y=shown[name],
            error_y=dict(
                type="data",
                symmetric=False,
                array=shown[f"{name}_high"] - shown[name],
                arrayminus=shown[name] - shown[f"{name}_low"],
            ),
            mode="markers+text",
            text=shown["subject"],
            textposition="top center",
            marker=dict(size=9, color=color(0)),
            name="mean, 95 % interval",
            customdata=shown[["verdict"]],
            hovertemplate="%{text}: %{y:.4g} (%{customdata[0]})<extra></extra>",
            meta={"clicked": [self.commands(int(row)) for row in shown.index]},
        )
        for label, value, index in (
            ("tolerance", self.facts["tolerance"], 1),
            ("floor", self.facts.get("floor", 0.0), 2),
        ):
            if value and value > 0 and len(shown):
                ends = [shown[x].min(), shown[x].max()]
                line = dict(color=color(index), dash="dash" if label == "tolerance" else "dot")
                fig.add_scatter(x=ends, y=[value, value], mode="lines", line=line, name=label)
        return fig

    def title(self, name: str) -> str:
        """Names the models that a log axis has no place for."""
        text = f"Same model? Against {self.facts['reference']}"
        itself = self.table[(self.table[name] <= 0) & (self.table["verdict"] != "reference")]["subject"]
        if len(itself):
            text += f"<br><sup>not drawn, 0 to rounding: {', '.join(itself)}</sup>"
        return text

    def commands(self, row: int) -> str:
        """What made the model in a row of the table, where that is known, and what looks into it."""
        known = self.tables.get("commands")
        return "" if known is None else "\n".join(known[known["row"] == row]["command"])


def front(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> list[int]:
    """Places of the points that no other one is below and left of, in the order of x."""
    best: list[int] = []
    for place in np.lexsort((y, x)):
        if not best or y[place] < y[best[-1]]:
            best.append(int(place))
    return best


def sources_in(candidates: str) -> list[str]:
    """What a line names, separated by commas."""
    return [part.strip() for part in candidates.split(",") if part.strip()]


def check_comparable(on: Subject, field: str, sources: Iterable[str]) -> None:
    """`BadInput` for a reference whose outputs do not compare, and for GGUF files that are not there."""
    check_kind(on)
    for source in sources:
        if is_gguf(source) and not Path(source).is_file():
            raise BadInput(f"{field}: {source!r} is not a file; give the path of a GGUF file")


class Fidelity(SubjectInstrument):
    """Is a smaller model still the same model? Kullback-Leibler divergence to the reference on the same
    texts, beside size, flips and acceptance, with a verdict against your own tolerance.
    """

    summary_line: ClassVar[str] = "models against one reference: divergence, size, verdict"

    candidates: str = parameter(
        "", "models to compare, separated by commas: folders, saved results, GGUF files, hub ids, built-ins"
    )
    tolerance: float = parameter(
        0.03, "divergence that is still accepted", gt=0, le=100, unit="nats an item", scale="log"
    )
    budget: float = parameter(0.0, "size that a model may have; 0: any", ge=0, unit="MB")
    test_examples: int = parameter(64, "texts", ge=2, unit="examples", group="Data")
    split: str = parameter("test", "split the texts come from", group="Data")
    other_split: str = parameter(
        "other-domain", "texts of another kind; left out where there are none", group="Data"
    )
    floor: bool = parameter(True, "also measure the reference against itself within its storage's rounding")
    speed: bool = parameter(
        True,
        "also time every model on one text: tokens read and written a second, or milliseconds; its memory",
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        return FidelityResult

    @property
    def sources(self) -> list[str]:
        return sources_in(self.candidates)

    def check(self, on: Subject) -> None:
        on.split(self.split)
        check_comparable(on, "candidates", self.sources)
        if not self.sources:
            raise BadInput(
                "candidates: is empty; give folders, saved results, GGUF files, hub ids or built-in names, "
                "separated by commas"
            )

    def key(self, on: Any) -> str:
        stamps = [stamp(source) for source in self.sources]
        return hashlib.sha256(json.dumps([super().key(on), stamps]).encode()).hexdigest()[:24]

    def _run(self, on: Subject, progress: Progress) -> Result:
        references = {
            split: found
            for split in self.splits(on)
            if (found := self.reference(on, split, progress)) is not None
        }
        row = {"subject": on.name, **sized(size_of(on)), "verdict": "reference", "word": "same"}
        rows = [row | self.costs(on, progress)]
        buckets, domains = list[pd.DataFrame](), list[dict[str, Any]]()
        commands: list[dict[str, Any]] = []
        for source in progress.track(self.sources, "compare"):
            if self.split not in references:
                break
            opened = candidate(source, on)
            compared = {
                split: r.against(opened.model, progress, self.seed) for split, r in references.items()
            }
            main = compared[self.split]
            if main is None or progress.stopped:
                break
            commands += [
                {"row": len(rows), "subject": opened.name, "command": command}
                for command in (*opened.made_by, looked_into(on.name, source))
            ]
            rows.append(self.row(opened, main, on) | self.costs(opened.model, progress))
            domains += [
                {"subject": opened.name, "domain": split} | domain_numbers(comparison)
                for split, comparison in compared.items()
                if comparison is not None
            ]
            if isinstance(main.pairs, TokenPairs):
                buckets.append(confidence_table(main.pairs).assign(subject=opened.name))
            del opened, compared, main
        table = complete(pd.DataFrame(rows))
        facts = self.facts(on, table, references.get(self.split), progress)
        tables = {"domains": pd.DataFrame(domains), "commands": pd.DataFrame(commands)} if domains else {}
        if buckets:
            tables["buckets"] = pd.concat(buckets, ignore_index=True)
        return self.result(table, facts, tables=tables)

    def splits(self, on: Subject) -> list[str]:
        return [self.split, *([self.other_split] if self.other_split in on.splits else [])]

    def reference(self, on: Subject, split: str, progress: Progress) -> Reference | None:
        return reference_of(on, split, self.test_examples, progress, batch_size=batch_of(on, split))

    def row(self, opened: Candidate, found: Comparison, on: Subject) -> dict[str, Any]:
        texts = min(on.size(self.split), self.test_examples)
        size, budget = opened.size.bytes, self.budget * 1e6 or None
        said = verdict(*found.distance(), self.tolerance, texts, size, budget)
        numbers = found.measures()
        row = {"subject": opened.name, **sized(opened.size), "verdict": str(said)}
        return row | ({"word": word(numbers["kl"])} if "kl" in numbers else {}) | numbers

    def costs(self, model: Subject, progress: Progress) -> dict[str, float]:
        """What the model takes to run; kept in the cache under its fingerprint, so measured once a model."""
        written = model.task.name == "causal-lm"
        found: dict[str, float] = {}
        for count in (1,) if written else (1, 32):
            if not self.speed or progress.stopped:
                break
            facts = timing(model, self.split, count, progress)
            if facts and not written:
                found[f"latency_{count}_ms"] = facts["median_ms"]
            wanted = ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes")
            found |= {name: facts[name] for name in wanted if name in facts}
        return found

    def facts(
        self, on: Subject, table: pd.DataFrame, reference: Reference | None, progress: Progress
    ) -> dict[str, Any]:
        facts: dict[str, Any] = {"reference": on.name, "tolerance": self.tolerance}
        accepted = table[table["verdict"] == "accept"].sort_values("megabytes")
        if len(accepted):
            facts["smallest_accepted"] = str(accepted["subject"].iloc[0])
        facts |= {"accepted": len(accepted), "compared": len(table) - 1}
        if self.floor and reference is not None and not progress.stopped:
            lowest = Floor(test_examples=self.test_examples, split=self.split, seed=self.seed)
            found = lowest.run(on, progress.quiet()).facts  # measured once a subject
            facts |= {"floor": found["floor"]} if "floor" in found else {}
        return facts | {"words": LEGEND}


def timing(model: Subject, split: str, batch_size: int, progress: Progress) -> dict[str, float]:
    """The facts of `Latency` on one batch; none when somebody stopped it."""
    settings = Latency(batch_size=batch_size, repeats=3, formats=False, decode_tokens=8, split=split)
    try:
        return settings.run(model, progress.quiet()).facts
    except BadInput:
        if progress.stopped:
            return {}
        raise


@dataclass(frozen=True)
class Candidate:
    """A model to compare, on the reference's data, what it takes to store, its own tokenizer if it has one,
    and the commands that gave it, as far as they are known.
    """

    name: str
    model: Subject
    size: Size
    tokenizer: Any = None
    made_by: Sequence[str] = ()


def candidate(source: str, on: Subject) -> Candidate:
    """Open what somebody named, as a model of the reference's task."""
    folder = Path(source)
    if source in builtin_names() or (folder / "workbench.json").is_file():
        found = subject(source)
    else:
        found = subject(source, data="random", task=on.task.name, max_length=16)
    found.model.to(on.device)
    name = (folder.stem if is_gguf(source) else folder.name) if folder.exists() else source
    size = gguf_size(folder) if is_gguf(source) else size_of(found)
    begun_from = found.origin.get("builtin") or found.origin.get("source") or on.name
    made = made_by(found.history, on.name if begun_from == "folder" else begun_from)
    return Candidate(name, other_model(on, found), size, found.tokenizer, made)


def stamp(source: str) -> list[Any]:
    """What tells that a file or folder is another one now: names, sizes and times of its files."""
    path = Path(source)
    if not source.strip():
        return [source]  # not the folder one is in
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [
        source,
        *([str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()),
    ]


def sized(size: Size) -> dict[str, float]:
    return {
        "bits": size.bits,
        "megabytes": size.bytes / 1e6,
        "embedding_megabytes": size.embedding_bytes / 1e6,
    }


def domain_numbers(found: Comparison) -> dict[str, float]:
    """What a table of domains holds of a comparison."""
    numbers = found.measures()
    wanted = ("kl", "distance", "ln_perplexity_ratio", "same_top", "acceptance", "agreement", "tokens")
    return {
        name: value
        for name, value in numbers.items()
        if name in wanted or name.removesuffix("_low").removesuffix("_high") in wanted
    }


def complete(table: pd.DataFrame) -> pd.DataFrame:
    """The reference is itself: no divergence. Other numbers of its row are left open."""
    for name in ("kl", "distance"):
        for column in [str(c) for c in table if str(c) == name or str(c).startswith(f"{name}_")]:
            table[column] = table[column].where(table["verdict"] != "reference", 0.0)
    return table
