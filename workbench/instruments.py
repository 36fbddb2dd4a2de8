"""The contract every study implements: an `Instrument` is a frozen set of parameters,
`run` turns it into a `Result`.

    spectrum = curvature.Spectrum(probes=4)          # parameters, validated on construction
    result = spectrum.run(subject)
        # cached under (fields, subject fingerprint, code version)
    result.table, result.summary(), result.figure(), result.save("folder")

Fields are the only place where a parameter is declared: controls, command-line options, papermill parameters,
validation messages and documentation are derived from them (see `Instrument.parameters`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd

from workbench.axis import Fields, entries_in, parameter
from workbench.code_version import code_version
from workbench.errors import BadInput, NotFinite, Stopped, notice
from workbench.keys.live_code import owner
from workbench.progress import Progress, TextProgress, interrupt_stops
from workbench.results import Result
from workbench.storage import CannotWrite, cache_folder
from workbench.storage.forecast import SHARE, Forecast, Plan, bytes_of, free_bytes, in_words, weight_bytes
from workbench.storage.resident import on_disk, reclaim
from workbench.unfinished import journal
from workbench.version import __version__, surroundings, threads, versions

#: Bytes of weights from which it is worth a third of a second to look for models that nobody reaches.
LARGE = 100_000_000

#: What numpy and torch say of an allocation that no machine can serve.
TOO_LARGE = (
    "allocate memory",
    "out of memory",
    "Unable to allocate",
    "array is too big",
    "Maximum allowed dimension",
    "Maximum allowed size",
    "size calculation overflowed",
    "numel: integer multiplication overflow",
)


@contextlib.contextmanager
def within_memory(name: str) -> Iterator[None]:
    """One line for a request that does not fit in memory, whichever option asked for it."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError, OverflowError) as error:
        said = str(error).strip().splitlines()
        if isinstance(error, BadInput) or not (
            isinstance(error, MemoryError) or any(part in line for line in said for part in TOO_LARGE)
        ):
            raise
        raise BadInput(
            f"{name}: needs more memory than there is ({said[0][:160] if said else 'out of memory'}); lower "
            "the option that sizes it, such as a batch, a sample count, a length or a rank"
        ) from None


class Instrument(Fields):
    """A study with parameters. Subclass, declare fields with `parameter(...)`,
    implement `_run(on, progress) -> Result`.

    `_run` gets a Subject (or Runs, as `on` declares) already on the right device with a private copy of its
    model when `changes_model` is True, and returns `self.result(...)`;
    everything else (cache, provenance, seed, stop) is done here.
    """

    on: ClassVar[Literal["subject", "runs"]] = "subject"
    changes_model: ClassVar[bool] = False
    cached: ClassVar[bool] = True
    summary_line: ClassVar[str] = ""

    seed: int = parameter(0, "seed of every random choice", ge=0, le=2**32 - 1, group="Machine and seed")

    @classmethod
    def name(cls) -> str:
        """The command-line name: the class name in lower-kebab case
        (`TopEigenvalues` -> `top-eigenvalues`).
        """
        return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """Field name -> pydantic FieldInfo, an instrument's own in declaration order, then inherited ones."""
        names = [name for base in cls.__mro__ for name in vars(base).get("__annotations__", {})]
        own = {k: cls.model_fields[k] for k in names if k in cls.model_fields and k not in ("seed", "device")}
        return own | {k: cls.model_fields[k] for k in ("device", "seed") if k in cls.model_fields}

    @classmethod
    def result_class(cls) -> type[Result]:
        """The Result subclass that knows how to draw this instrument's results."""
        return Result

    def check(self, on: Any) -> None:
        """Raise `BadInput` for anything that can be seen to fail before the computation starts."""

    @property
    def shares_weights(self) -> bool:
        """True when nothing is written to but by `Layer.write`: while it works the private copy may then have
        the tensors of the subject that it was made from.
        """
        return False

    def asks_beyond(self, on: Any) -> Iterator[str]:
        """A line for each number of examples that somebody set and that is more than there are."""
        return iter(())

    def foretold_words(self, on: Any) -> str:
        """What can be said of a run's outcome before it, from what is kept; "" when nothing can."""
        return ""

    def held_back(self) -> str:
        """Why the subject that a run gives is not to be saved or exported; "" when it may be."""
        return ""

    def cards(self, on: Any, result: Result) -> dict[str, pd.DataFrame]:
        """Tables that tell what the result was made from."""
        return {}

    def planned(self, on: Any) -> Plan | None:
        """The work of a run, where it can be foretold; `try_part` is then what it does to a part of it."""
        return None

    def try_part(self, on: Any, *part: Any) -> None:
        """Do to a part of the planned work what a run does, for how long it takes."""
        raise NotImplementedError

    def foretold_memory(self, on: Any) -> Forecast | None:
        """What a run holds at most, from shapes alone: no weight is read. None where it cannot be told."""
        plan = self.planned(on)
        return None if plan is None else plan.forecast()

    def foretold_seconds(self, on: Any) -> float | None:
        """Seconds that a run takes, from a trial of a small part of it; None where it cannot be told."""
        plan = self.planned(on)
        if plan is None or plan.predicted:
            return None
        return plan.seconds(functools.partial(self.try_part, on))

    def _run(self, on: Any, progress: Progress) -> Result:
        raise TypeError(f"{type(self).__name__} has no _run")

    def result(self, table: pd.DataFrame, facts: dict[str, Any] | None = None, **more: Any) -> Result:
        return self.result_class()(instrument=self, table=table, facts=facts or {}, **more)

    def run(
        self,
        on: Any,
        progress: Progress | None = None,
        cache: bool = True,
        fresh: bool = False,
        memory: int | str | None = None,
    ) -> Result:
        """Run on a Subject (or Runs). The same fields on the same subject with the same code come from
        the cache; one that was interrupted while it trained goes on from there, unless it is to begin
        `fresh`.

        memory : bytes that the run may hold, the subject's weights included, as a number or as '2GB'.
            A walk that holds more goes on with one block in memory and the others in files, with the same
            numbers; what does not fit then is refused before a weight is read. Default: 80 % of what is
            free.
        """
        progress = progress or TextProgress()
        given = None if memory is None else bytes_of(memory)
        if given is not None and getattr(on, "made", True):  # before a weight is read
            room_for(self, on, given, tells=False)
        key = self.key(on)
        slot = cache_folder() / "results" / key
        stored_before = from_slot(slot) if cache and self.cached else None
        if stored_before is not None:  # checked when it was stored; checking may compute a derived model
            result = stored_before
            if self.changes_model:
                count = result.provenance["threads"]
                result.subject = on.derived(self, key, lambda: self._again(on, count))
            return result
        if hasattr(on, "check_finite"):
            on.check_finite()
            if weight_bytes(on.model) >= LARGE:
                reclaim()  # what an earlier run has left of its model
        for told in (*self.idle(), *self.asks_beyond(on)):
            notice(told)
        self.check(on)
        room = room_for(self, on, given)
        where = on_disk(cache_folder()) if room.on_disk else contextlib.nullcontext()
        with journal(key, self.about(on), progress, fresh) as kept, where:
            result = self._measure(on, progress, key)
            if room.limit is not None:
                result.provenance |= {"memory": room.limit, "in_files": room.on_disk}
            stored = cache and self.cached and not result.partial
            if stored:
                to_slot(result, slot)
            if stored or (kept.root and not result.partial):
                kept.clear()
        return result

    def begins_anew(self) -> bool:
        """Whether the weights that come in are not what the run starts with, so that none of their zeros is
        meant.
        """
        return getattr(self, "start", "") == "random" or bool(getattr(self, "from_scratch", False))

    def about(self, on: Any) -> dict[str, Any]:
        """What this run is, for whoever finds what it has left."""
        return {
            "instrument": self.name(),
            "fields": self.model_dump(mode="json"),
            "on": getattr(on, "name", type(on).__name__),
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _again(self, on: Any, count: int) -> Any:
        """The subject of a cached run, computed with the threads that its key tells; a part of a training is
        not that subject.
        """
        with threads(count):
            result = self.run(on, cache=False)
        if result.partial:
            raise KeyboardInterrupt
        return result.subject

    def stored(self, on: Any) -> bool:
        """True when this exact run is in the cache."""
        return self.cached and (cache_folder() / "results" / self.key(on) / "result.json").exists()

    def _measure(self, on: Any, progress: Progress, key: str) -> Result:
        import torch

        shares, fingerprint = self._shares(), on.fingerprint
        prepared = (
            on.prepared(getattr(self, "device", "auto"), self.changes_model, shares)
            if hasattr(on, "prepared")
            else on
        )
        if hasattr(prepared, "check_outputs_finite"):
            prepared.check_outputs_finite()
        torch.manual_seed(self.seed)
        np.random.seed(self.seed)
        began = time.perf_counter()
        with interrupt_stops(progress), within_memory(self.name()):
            result = self._explained(on, prepared, progress)
        if isinstance(progress, TextProgress):
            progress.close()
        result.partial = result.partial or progress.partial
        result.tables |= self.cards(prepared, result)
        result.provenance = provenance(self, on, fingerprint, time.perf_counter() - began) | {"key": key}
        if self.changes_model:
            assert result.subject is not None, f"{self.name()} declares changes_model and returned no subject"
            if (
                "revived" not in result.facts
                and not self.begins_anew()
                and (n := result.subject.revived_from(on))
            ):
                result.facts["revived"] = n
            if shares:
                from workbench.subjects.changes import own_tensors

                own_tensors(result.subject.model)
            result.subject.adopt(parent=on, instrument=self, fingerprint=None if result.partial else key)
        return result

    def _shares(self) -> bool:
        """What somebody's own entries write to is not known."""
        own = (owner(entry.value) == "package" for entry in entries_in(self))
        return self.shares_weights and all(own)

    def _explained(self, on: Any, prepared: Any, progress: Progress) -> Result:
        """`_run`; a failure, or facts that are NaN, are explained by the subject's own numbers where
        those are not finite; what a Stop has left too empty to be summed up is no fault of anybody's.
        """
        try:
            result = self._run(prepared, progress)
        except NotFinite as error:
            told = on.not_finite() if hasattr(on, "not_finite") else None
            raise BadInput(told or str(error)) from error
        except (BadInput, MemoryError):
            raise
        except Exception as error:
            if progress.stop.is_set():
                raise Stopped(f"{self.name()}: stopped before there was anything to report") from error
            if hasattr(on, "not_finite") and (told := on.not_finite()):
                raise BadInput(told) from error
            raise
        undefined = [name for name, value in result.facts.items() if is_nan(value)]
        if undefined and hasattr(on, "not_finite") and (told := on.not_finite()):
            raise BadInput(told)
        return result

    def key(self, on: Any) -> str:
        """Hash of fields, subject fingerprint, code, versions of libraries, device and threads:
        the name of this run.
        """
        device = on.resolve_device(getattr(self, "device", "auto")) if hasattr(on, "resolve_device") else ""
        text = json.dumps(
            [
                self.name(),
                self.model_dump(mode="json"),
                on.fingerprint,
                str(device),
                self.code(),
                versions(),
                surroundings(device or None),
            ],
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def given(self) -> dict[str, Any]:
        """The fields that somebody set; the others follow from them (`filled`) or are defaults."""
        return {
            name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set
        }

    def with_fields(self, **fields: Any) -> Self:
        """A copy with some fields changed, validated. What follows from a changed field follows again."""
        return type(self)(**(self.given() | fields))

    def code(self) -> str:
        """Version of the code that this run reaches: its own, and that of the entries it has chosen."""
        return code_version(type(self), [entry.value for entry in entries_in(self)])


#: What calibration examples decide.
WEIGHTS, NUMBERS = "weights", "reported numbers"


class SubjectInstrument(Instrument):
    """An instrument that computes on a model, so it also has a device."""

    device: str = parameter(
        "auto",
        "where to compute: auto (the best present), cpu, cuda or cuda:N",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        group="Machine and seed",
    )

    def calibrates(self) -> dict[str, tuple[str, int]]:
        """What decides -> (split, examples) of it that are read first: see `calibration`."""
        if "calibration_examples" not in type(self).model_fields:
            return {}
        given: Any = self
        decides = WEIGHTS if self.changes_model else NUMBERS
        return {decides: (getattr(self, "calibration_split", "calibration"), given.calibration_examples)}

    def cards(self, on: Any, result: Result) -> dict[str, pd.DataFrame]:
        """`calibration`: one row for what was calibrated on; the columns of `Subject.examples_card`, and
        decides : the weights that were changed, or only numbers that are reported
        unreached, least_share : experts that none of the tokens reached (over all layers), and the smallest
            share of a layer's tokens that an expert got; of mixtures, the shares are in the table `experts`
        """
        rows = [
            {"decides": decides, "source": on.data_note, "split": split} | on.examples_card(split, examples)
            for decides, (split, examples) in self.calibrates().items()
            if split in on.splits
        ]
        experts = result.tables.get("experts")
        if experts is not None:
            shares = {"unreached": int((experts["tokens"] == 0).sum()), "least_share": experts["share"].min()}
            rows = [row | shares for row in rows]
        return {"calibration": pd.DataFrame(rows)} if rows else {}

    def asks_beyond(self, on: Any) -> Iterator[str]:
        fields = type(self).model_fields
        for usual in ("calibration", "test"):
            name = f"{usual}_examples"
            split = getattr(self, f"{usual}_split", getattr(self, "split", usual))
            if name not in fields or split not in on.splits:
                continue
            asked, there = getattr(self, name), on.size(split)
            if asked > there and asked != fields[name].default:
                yield f"{name}: {asked} are asked for, and the split {split} has {there}; these are taken"


@dataclass(frozen=True)
class Room:
    """limit : bytes that a run may hold; None where the system does not say what is free
    foretold : what it will hold; None where it cannot be told
    """

    limit: int | None
    foretold: Forecast | None

    @property
    def on_disk(self) -> bool:
        """Whether the run stays below the limit with one block in memory, and not otherwise."""
        return self.foretold is not None and self.foretold.in_files


def room_for(instrument: Instrument, on: Any, given: int | None, tells: bool = True) -> Room:
    """What a run may hold, a share of what is free where nobody says it, and what it will hold, once it is
    known that it stays below; `BadInput` when it does not.

    tells : say when a limit is given to an instrument that does not know what it will hold
    """
    limit = given
    if limit is None:
        device = getattr(instrument, "device", "auto")
        free = free_bytes(on.resolve_device(device) if hasattr(on, "resolve_device") else None)
        limit = None if free is None else int(SHARE * free)
    found = None if limit is None else instrument.foretold_memory(on)
    if found is not None and limit is not None:
        found = found.within(limit)
        found.check(instrument.name(), limit, given is not None)
    elif given is not None and (least := weight_bytes(on.model) if hasattr(on, "model") else 0) > given:
        raise BadInput(
            f"memory: {in_words(given)} is less than the subject's weights, which take {in_words(least)}; "
            f"give --memory {-(-least // 1_000_000)}MB and more"
        )
    elif given is not None and tells:
        notice(
            f"memory: {instrument.name()} does not say what it will hold; nothing keeps it below the limit"
        )
    return Room(limit, found)


def from_slot(slot: Path) -> Result | None:
    """The result that a slot of the cache holds. A damaged one is said, and computed again."""
    if not slot.is_dir():
        return None
    try:
        result = Result.load(slot, open_subject=False)
        if result.provenance.get("key") != slot.name:
            raise BadInput(f"folder: {str(slot)!r} holds the result of another run")
    except (BadInput, OSError) as error:
        if slot.is_dir():  # else somebody has just cleared the cache
            notice(f"cache: {reason_of(error)}; now it is computed again")
        return None
    return result


def to_slot(result: Result, slot: Path) -> None:
    """Keep a result in the cache. Where that cannot be written, the result is all the same the caller's."""
    try:
        result.store(slot)
    except (CannotWrite, OSError) as error:
        notice(f"cache: {reason_of(error)}; this result is not kept, the same run is computed again")


def reason_of(error: Exception) -> str:
    """An error's words without the field that another message names."""
    return str(error).removeprefix("folder: ").removeprefix("cache: ").partition("; ")[0]


def is_nan(value: Any) -> bool:
    return isinstance(value, (float, np.floating)) and bool(np.isnan(value))


def provenance(instrument: Instrument, on: Any, fingerprint: str, seconds: float) -> dict[str, Any]:
    """Who made this, from what, with which versions."""
    import platform

    import torch

    return {
        "on": getattr(on, "name", type(on).__name__),
        "fingerprint": fingerprint,
        "data": getattr(on, "data_note", ""),
        "history": list(getattr(on, "history", [])),
        "versions": {"workbench": __version__, **versions()},
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "code": instrument.code(),
        "seconds": round(seconds, 3),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
