"""The `delta` instrument: a fine-tune stored as its base and a compressed difference."""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.arithmetic.conflicts import conflict_table, whole_model
from workbench.arithmetic.delta_result import DeltaResult, kept_as_they_are, stored_as_arrays
from workbench.arithmetic.difference.course import Course
from workbench.arithmetic.difference.difference import (
    DIFFERENCE,
    Matrix,
    Packing,
    Stored,
    bytes_of,
    packing_of,
)
from workbench.arithmetic.fine_tunes import check_trains, fine_tuned, idle_where_named
from workbench.arithmetic.matrices import Place, places_of
from workbench.arithmetic.merging.merging import write
from workbench.arithmetic.models import Models, side_by_side
from workbench.arithmetic.sources import of_subject, plain, source_of, weights_hash
from workbench.axis import Choice, parameter
from workbench.errors import BadInput, Stopped, notice
from workbench.instruments import SubjectInstrument
from workbench.measures.fidelity import stamp
from workbench.measures.reference import distance_facts, reference_of
from workbench.progress import Progress
from workbench.results import Result
from workbench.statistics.inputs import InputMoments, second_moments
from workbench.subjects import Subject


class Delta(SubjectInstrument):
    """Store a fine-tune as its base and a compressed difference: true bytes, the divergence from the
    fine-tune, and the weights that a stored difference gives back, bit for bit.
    """

    summary_line: ClassVar[str] = "a fine-tune as base + compressed difference: bytes, KL, singular values"
    changes_model: ClassVar[bool] = True

    method: Choice = DIFFERENCE.choice("number-format")
    base: str = parameter(
        "",
        "what the subject was trained from: a folder, hub id or built-in; "
        "empty: the subject is the base, and a fine-tune is made here",
    )
    layers: str = parameter("blocks", "matrices to compress, by glob; all else is stored as it is")
    steps: int = parameter(
        100,
        "optimizer steps of the fine-tune made here",
        ge=1,
        le=1_000_000,
        scale="log",
        group="Fine-tune made here",
    )
    learning_rate: float = parameter(
        1e-3, "its peak learning rate", gt=0, le=100, scale="log", group="Fine-tune made here"
    )
    strengths: tuple[float, ...] = parameter((), "multiples to choose from on validation, where there is one")
    densities: tuple[float, ...] = parameter((), "shares to choose from on validation, where there is one")
    calibration_examples: int = parameter(
        128, "examples for inputs and learning", ge=1, unit="examples", group="Data"
    )
    validation_examples: int = parameter(128, "examples to choose on", ge=1, unit="examples", group="Data")
    test_examples: int = parameter(256, "examples to report on", ge=2, unit="examples", group="Data")
    spectrum: bool = parameter(True, "also the singular values of every difference")

    @classmethod
    def result_class(cls) -> type[Result]:
        return DeltaResult

    def key(self, on: Any) -> str:
        return hashlib.sha256(json.dumps([super().key(on), stamp(self.base)]).encode()).hexdigest()[:24]

    def idle(self) -> Iterator[str]:
        yield from super().idle()
        yield from idle_where_named(self, "base")

    def check(self, on: Subject) -> None:
        for split in ("calibration", "validation", "test"):
            on.split(split)
        on.layers(self.layers)
        for field, values in (("strength", self.strengths), ("density", self.densities)):
            if values and not self.method.has(field):
                plural = "strengths" if field == "strength" else "densities"
                raise BadInput(f"{plural}: {self.method.name} has no {field} to choose; leave them out")
            for value in values:
                self.method.with_options(**{field: value})
        packing_of(self.method)
        if self.base:
            side_by_side(source_of(self.base, on, "base"), [of_subject(on)])
        else:
            check_trains(on)

    def models(self, on: Subject, progress: Progress) -> Models:
        if self.base:
            models = side_by_side(source_of(self.base, on, "base"), [of_subject(on)], self.seed)
        else:
            made = fine_tuned(on, 1, self.steps, self.learning_rate, self.seed, progress)
            models = side_by_side(of_subject(on), [of_subject(made[0])], self.seed)
        for name, why in models.left_out.items():
            notice(f"base: {name} is not compressed, it is stored as it is: {why}")
        return models

    def _run(self, on: Subject, progress: Progress) -> Result:
        models = self.models(on, progress)
        conflicts = conflict_table(models, progress)
        bench = Workplace.of(self, on, models)
        reference = bench.reference(self.test_examples, progress)
        chosen, tried = self.chosen(bench, progress)
        packing, stored = packing_of(chosen), bench.packed(chosen, progress)
        if chosen.has("learned"):
            packing.learn(bench.course(packing, stored))  # type: ignore[attr-defined]
        bench.place(packing, stored)
        others = kept_as_they_are(bench.tensors)
        found = None if reference is None else reference.against(bench.host, progress.quiet(), self.seed)
        facts = self.facts(bench, stored, others, chosen)
        facts |= {} if found is None else distance_facts(found.measures())
        near = ("kl", "distance")
        facts |= {f"base_{k}": v for k, v in bench.base_distance.items() if k in near} | whole_model(
            conflicts
        )
        table = pd.DataFrame([row(bench, name, stored[name], packing) for name in stored])
        tables = {"lineage": bench.lineage(), "conflicts": conflicts}
        if tried:
            tables["tried"] = pd.DataFrame(tried)
        if self.spectrum:
            tables["spectrum"] = bench.spectrum(progress)
        arrays = stored_as_arrays(stored, others)
        return self.result(table, facts, tables=tables, arrays=arrays, subject=bench.host)

    def chosen(self, bench: Workplace, progress: Progress) -> tuple[Choice, list[dict[str, float]]]:
        """The method with the strength and density of least validation loss, and all that were tried."""
        options: list[dict[str, float]] = [{}]
        for name, values in (("strength", self.strengths), ("density", self.densities)):
            options = [each | {name: v} for each in options for v in values] if values else options
        if len(options) == 1:
            return self.method.with_options(**options[0]), []
        tried = []
        for each in progress.track(options, "choose on validation"):
            choice = self.method.with_options(**each)
            bench.place(packing_of(choice), bench.packed(choice, progress.quiet()))
            found = bench.host.evaluate(
                "validation", limit=self.validation_examples, progress=progress.quiet()
            )
            tried.append(each | {"loss": found["loss"]})
        if not tried:
            raise Stopped("delta: stopped before anything was tried")
        best = min(range(len(tried)), key=lambda i: tried[i]["loss"])
        return self.method.with_options(**options[best]), tried

    def facts(
        self, bench: Workplace, stored: dict[str, Stored], others: dict[str, Tensor], chosen: Choice
    ) -> dict[str, Any]:
        weights = sum(bench.base(name).numel() for name in stored)
        packed = sum(bytes_of(each) for each in stored.values())
        rest = bytes_of(others)
        dense = 4 * sum(torch.Size(shape).numel() for shape in bench.models.parents[0].shapes.values())
        facts: dict[str, Any] = {"method": chosen.name}
        facts |= {n: getattr(chosen.options, n) for n in ("strength", "density") if chosen.has(n)}
        facts |= {"bytes": packed + rest, "matrix_bytes": packed, "other_bytes": rest}
        facts |= {"bits": 8 * packed / weights, "times_smaller": dense / (packed + rest)}
        after = bench.host.evaluate("test", limit=self.test_examples)
        for name, losses in (("", after), ("fine_tuned_", bench.tuned_test), ("base_", bench.base_test)):
            facts |= {f"{name}{k}": v for k, v in losses.items() if k in ("loss", "accuracy")}
        return facts


@dataclass
class Workplace:
    """A model that is written to, beside base and fine-tune.

    host : holds what is stored;  places : the matrices to compress
    tensors : all tensors of the fine-tune that have no other place to come from
    """

    settings: Delta
    models: Models
    host: Subject
    teacher: Subject
    places: dict[str, Place]
    tensors: dict[str, Tensor]
    base_test: dict[str, float]
    tuned_test: dict[str, float]
    base_distance: dict[str, float]

    @classmethod
    def of(cls, settings: Delta, on: Subject, models: Models) -> Workplace:
        """The fine-tune's weights in a copy of the subject, and a second copy to answer like."""
        host = plain(on)
        tuned = models.parents[0]
        write(host, models.names, tuned.tensor)
        places = {n: p for n, p in places_of(host, settings.layers).items() if p.tensor in models.names}
        inside = {place.tensor for place in places.values()}
        tensors = {n: tuned.tensor(n) for n in tuned.shapes if n not in inside}
        return cls(settings, models, host, plain(host), places, tensors, {}, {}, {})

    def reference(self, limit: int, progress: Progress) -> Any:
        """The fine-tune's answers on test; its loss, the base's, and how far the base is from it."""
        quiet = progress.quiet()
        self.tuned_test = self.host.evaluate("test", limit=limit, progress=progress)
        found = reference_of(self.teacher, "test", limit, quiet)
        base = plain(self.host)
        write(base, self.models.names, self.models.base.tensor)
        compared = None if found is None else found.against(base, quiet, self.settings.seed)
        self.base_test = base.evaluate("test", limit=limit, progress=quiet)
        self.base_distance = {} if compared is None else distance_facts(compared.measures())
        return found

    def base(self, name: str) -> Tensor:
        return self.places[name].part(self.models.base.tensor(self.places[name].tensor))

    def tuned(self, name: str) -> Tensor:
        return self.places[name].part(self.models.parents[0].tensor(self.places[name].tensor))

    @functools.cached_property
    def moments(self) -> dict[str, InputMoments]:
        """Second moments of what the fine-tune's layers read on calibration examples."""
        layers = {place.layer for place in self.places.values()}
        chosen = [layer for layer in self.teacher.layers("*") if layer.name in layers]
        return second_moments(self.teacher, chosen, examples=self.settings.calibration_examples)

    def gram(self, place: Place) -> Tensor:
        found = self.moments[place.layer].gram
        assert found is not None
        return found[place.expert or 0].float().cpu()

    def packed(self, chosen: Choice, progress: Progress) -> dict[str, Stored]:
        """What is stored of every matrix, one after another."""
        packing, found = packing_of(chosen), dict[str, Stored]()
        if chosen.has("surveyed"):
            packing.survey(self.differences)  # type: ignore[attr-defined]
        for name, place in progress.track(self.places.items(), "compress", len(self.places)):
            found[name] = packing.pack(self.matrix(name, place, chosen.entry.needs == "inputs"))
        if len(found) < len(self.places):
            raise Stopped("delta: stopped before every matrix was compressed")
        return found

    def differences(self) -> Iterator[Tensor]:
        return (self.tuned(name) - self.base(name) for name in self.places)

    def matrix(self, name: str, place: Place, reads: bool = False) -> Matrix:
        gram: Callable[[], Tensor] | None = functools.partial(self.gram, place) if reads else None
        seed = zlib.crc32(f"{self.settings.seed} {name}".encode())
        return Matrix(name, self.base(name), self.tuned(name), seed, gram)

    def place(self, packing: Packing, stored: dict[str, Stored]) -> None:
        for name, value in stored.items():
            self.places[name].write(packing.unpack(value, self.base(name)))

    def course(self, packing: Packing, stored: dict[str, Stored]) -> Course:
        self.place(packing, stored)
        return Course(
            self.host,
            self.teacher,
            self.places,
            self.base,
            self.tuned,
            packing,
            stored,
            self.settings.calibration_examples,
            self.settings.validation_examples,
            Progress(),
        )

    def lineage(self) -> pd.DataFrame:
        """Base and fine-tune; `weights` is a hash of the matrices that the difference is of."""
        names = list(dict.fromkeys(place.tensor for place in self.places.values()))
        rows = [("base", self.models.base), ("fine-tune", self.models.parents[0])]
        known = [(kind, each.name, each.fingerprint, weights_hash(each, names)) for kind, each in rows]
        return pd.DataFrame(known, columns=["kind", "model", "fingerprint", "weights"])

    def spectrum(self, progress: Progress) -> pd.DataFrame:
        """Singular values of every difference, from the largest, and the share of its energy up to each."""
        parts = []
        for name in progress.track(tuple(self.places), "singular values"):
            values = torch.linalg.svdvals((self.tuned(name) - self.base(name)).double()).numpy()
            energy = np.cumsum(values**2) / max(float((values**2).sum()), 1e-300)
            parts.append(
                pd.DataFrame({"matrix": name, "index": range(len(values)), "value": values, "energy": energy})
            )
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def row(bench: Workplace, name: str, stored: Stored, packing: Packing) -> dict[str, Any]:
    """One matrix: how much it takes, and how much of its difference is lost."""
    matrix = bench.matrix(name, bench.places[name])
    kept = packing.unpack(stored, matrix.base)
    size = float(matrix.difference.double().square().sum())
    lost = float((kept - matrix.tuned).double().square().sum())
    return {
        "matrix": name,
        "weights": matrix.base.numel(),
        "bytes": bytes_of(stored),
        "bits": 8 * bytes_of(stored) / matrix.base.numel(),
        "norm": size**0.5,
        "lost": lost / size if size else 0.0,
        "mean_size": float(matrix.difference.abs().mean()),
    }
