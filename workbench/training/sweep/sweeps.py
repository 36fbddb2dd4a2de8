"""Sweeps that survive anything: optuna samples, a ledger in SQLite or PostgreSQL hands out trials,
joblib runs the workers.

    sweep = Sweep("demo", {"lr": Range(1e-4, 1e-1, log=True), "batch_size": [8, 16, 32]}, objective,
    trials=60) table = sweep.run(workers=2)

Any number of machines may run the same sweep on one PostgreSQL URL at once. A killed worker's, or a killed
machine's, runs in flight are run again; nothing else is. A diverged run is a result;
an objective that raises is recorded as failed with its words.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.storage import cache_folder
from workbench.storage.together import pool
from workbench.training.sweep.trial_ledger import (
    ATTEMPTS,
    Claim,
    Ledger,
    engine_options,
    owner_name,
    patiently,
)

Sampling = Literal["grid", "random", "tpe"]
#: An objective gets the parameters and a `Trial`; it returns facts, of which `value` is minimised.
Objective = Callable[[dict[str, Any], "Trial"], Mapping[str, Any]]


@dataclass(frozen=True)
class Range:
    """A numeric axis from `low` to `high`; `points` of it when a grid is wanted."""

    low: float
    high: float
    log: bool = False
    points: int = 5

    def grid(self) -> list[float]:
        fractions = [i / max(self.points - 1, 1) for i in range(self.points)]
        if self.log:
            return [self.low * (self.high / self.low) ** f for f in fractions]
        return [self.low + (self.high - self.low) * f for f in fractions]


class Trial:
    """What an objective sees of the sweep: `progress` obeys Stop,
    `report` returns True when the run should end early.
    """

    def __init__(self, number: int, progress: Progress, trial: Any = None) -> None:
        self.number, self.progress, self._trial = number, progress, trial

    def report(self, value: float, step: int) -> bool:
        if self._trial is None or not math.isfinite(value):
            return False
        patiently(lambda: self._trial.report(value, step))
        return bool(patiently(self._trial.should_prune))


class Sweep:
    """A named set of trials over `space`: field -> values or a `Range`.

    sampling : "grid" (every combination), "random" or "tpe" (Bergstra et al. 2011), the latter two with
        `trials` points. halving: end unpromising runs early (successive halving, Jamieson & Talwalkar 2016)
        as the objective reports. storage : an SQLAlchemy URL, by default an SQLite file in the cache folder.
        The same name, space and settings go on where they stopped; others are refused.
    """

    def __init__(
        self,
        name: str,
        space: Mapping[str, Sequence[Any] | Range],
        objective: Objective,
        sampling: Sampling = "grid",
        trials: int | None = None,
        halving: bool = False,
        storage: str | None = None,
        seed: int = 0,
        note: str = "",
    ) -> None:
        if not space or any(not isinstance(values, Range) and len(values) == 0 for values in space.values()):
            raise BadInput("space: every field of a sweep needs at least one value")
        if sampling not in ("grid", "random", "tpe"):
            raise BadInput(f"sampling: {sampling!r} is unknown; known: grid, random, tpe")
        if sampling != "grid" and not trials:
            raise BadInput(f"trials: {sampling} sampling needs a number of trials")
        self.name, self.space, self.objective, self.sampling, self.halving, self.seed = (
            name,
            dict(space),
            objective,
            sampling,
            halving,
            seed,
        )
        if storage is None:
            folder = cache_folder() / "sweeps"
            folder.mkdir(parents=True, exist_ok=True)
            storage = f"sqlite:///{folder / 'sweeps.sqlite'}"
        self.storage, self._shown = storage, -1
        grid = [
            dict(zip(space, values, strict=True))
            for values in itertools.product(
                *(v.grid() if isinstance(v, Range) else v for v in space.values())
            )
        ]
        self.points = grid if sampling == "grid" else None
        self.trials = len(grid) if sampling == "grid" else int(trials or 0)
        shown = {
            k: [v.low, v.high, v.log, v.points] if isinstance(v, Range) else list(v) for k, v in space.items()
        }
        self.spec = json.dumps(
            {
                "space": shown,
                "sampling": sampling,
                "trials": self.trials,
                "halving": halving,
                "seed": seed,
                "note": note,
            },
            sort_keys=True,
        )

    # ---- set-up --------------------------------------------------------------------------------------------
    def _optuna(self, study: str, create: bool = False) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        store = optuna.storages.RDBStorage(self.storage, engine_kwargs=engine_options(self.storage))
        sampler = (
            optuna.samplers.RandomSampler(self.seed)
            if self.sampling == "random"
            else optuna.samplers.TPESampler(seed=self.seed, constant_liar=True)
        )
        pruner = optuna.pruners.SuccessiveHalvingPruner() if self.halving else optuna.pruners.NopPruner()
        make = optuna.create_study if create else optuna.load_study
        return make(study_name=study, storage=store, sampler=sampler, pruner=pruner)

    def _distributions(self) -> dict[str, Any]:
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        return {
            k: FloatDistribution(v.low, v.high, log=v.log)
            if isinstance(v, Range)
            else CategoricalDistribution(list(v))
            for k, v in self.space.items()
        }

    def open(self) -> Ledger:
        """The ledger, with the study in it; `BadInput` when the name is taken by a different sweep."""
        ledger = Ledger(self.storage, self.name)
        found = ledger.spec()
        if found is None:
            label = f"{self.name}#{uuid.uuid4().hex[:8]}"
            study = patiently(lambda: self._optuna(label, create=True), racing=True)
            points: list[tuple[dict[str, Any] | None, int | None]] = [(None, None)] * self.trials
            if self.points is not None:
                points = [(point, None) for point in self.points]
            elif self.sampling == "random":
                asked = patiently(lambda: [study.ask(self._distributions()) for _ in range(self.trials)])
                points = [(trial.params, trial.number) for trial in asked]
            if not ledger.create(self.spec, label, points):
                import optuna

                patiently(lambda: optuna.delete_study(study_name=label, storage=study._storage))
            found = ledger.spec()
            if found is None:  # its trials are there, so it could not be written
                ledger.close()
                raise BadInput(
                    f"name: the storage holds trials of {self.name!r} and not the sweep, so it is damaged; "
                    "restore the database, or give this sweep another name"
                )
        if found[0] != self.spec:
            ledger.close()
            raise BadInput(
                f"name: {self.name!r} is a different sweep in this storage ({found[0]}); "
                "give this one another name"
            )
        return ledger

    # ---- running -------------------------------------------------------------------------------------------
    def run(
        self,
        workers: int = 2,
        backend: str = "loky",
        progress: Progress | None = None,
        on_change: Callable[[pd.DataFrame], None] | None = None,
    ) -> pd.DataFrame:
        """Run what is left and return `table()`. Ends early on Stop, keeping what is finished;
        run again to go on.

        workers : 1 runs here, more run in joblib's `backend`: "loky" (processes), "dask" (joins the current
            `dask.distributed.Client`) or "ray" (joins the current cluster). on_change : called with `table()`
            whenever another trial has finished.
        """
        progress = progress or Progress()
        ledger = self.open()
        ledger.stop(False)
        if workers == 1:
            with watching(ledger, progress):
                self.work(
                    uuid.uuid4().hex[:12],
                    on_done=lambda: self._show(ledger, progress, on_change),
                    progress=progress,
                )
        else:
            self._pool(ledger, workers, backend, progress, on_change)
        if progress.stopped:
            ledger.stop(False)
        self._reconcile(ledger)
        table = self.table()
        ledger.close()
        return table

    def _pool(
        self,
        ledger: Ledger,
        workers: int,
        backend: str,
        progress: Progress,
        on_change: Callable[[pd.DataFrame], None] | None,
    ) -> None:
        import joblib
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        if backend == "ray":
            try:
                from ray.util.joblib import register_ray
            except ImportError:
                raise BadInput("backend: 'ray' is not installed; use loky or dask") from None
            register_ray()
        errors: list[BaseException] = []
        driver = uuid.uuid4().hex[:12]

        def lives(calls: list[int | None]) -> list[int] | None:
            """Run workers; the trials that were running when one was killed and took the pool along."""
            try:
                with pool(backend, workers):
                    joblib.Parallel()(joblib.delayed(self.work)(driver, only=only) for only in calls)
            except TerminatedWorkerError:
                return ledger.release(driver)
            return None

        def drive() -> None:
            idle = 0
            try:
                while (lost := lives([None] * workers)) is not None:
                    idle = 0 if lost else idle + 1
                    if idle == ATTEMPTS:
                        raise BadInput(
                            "workers: they die before they take a trial; run with workers=1 to see why"
                        )
                    for number in lost:  # alone, so that only the one that kills is blamed
                        for _ in range(ATTEMPTS):
                            if not lives([number]):
                                break
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=drive, daemon=True)
        thread.start()
        asked = False
        while thread.is_alive():
            thread.join(0.3)
            self._show(ledger, progress, on_change)
            if progress.stopped and not asked:
                ledger.stop(True)
                asked = True
        if errors:
            raise errors[0]

    def _show(
        self, ledger: Ledger, progress: Progress, on_change: Callable[[pd.DataFrame], None] | None
    ) -> None:
        rows = ledger.rows()
        done = sum(row.state in ("done", "failed") for row in rows)
        progress.show("trials", done, len(rows))
        if on_change is not None and done != self._shown:
            on_change(frame(rows))
        self._shown = done

    def work(
        self,
        driver: str,
        on_done: Callable[[], None] | None = None,
        progress: Progress | None = None,
        only: int | None = None,
    ) -> int:
        """What one worker does: claim, run, record, until nothing is left (or that one trial `only`).
        Returns how many results it recorded.
        """
        ledger, owner, recorded = self.open(), owner_name(driver), 0
        found = ledger.spec()
        assert found is not None
        study = patiently(lambda: self._optuna(found[1]), racing=True)
        while not ledger.stopped() and not (progress is not None and progress.stopped):
            claim = ledger.claim(owner, only)
            if claim is None:
                break
            recorded += self._run_one(ledger, study, claim, owner, progress)
            if on_done:
                on_done()
        ledger.close()
        return recorded

    def _run_one(self, ledger: Ledger, study: Any, claim: Claim, owner: str, outer: Progress | None) -> int:
        params, number = claim.params, claim.optuna
        if params is None:
            trial = patiently(lambda: study.ask(self._distributions()))
            params, number = trial.params, trial.number
            if not ledger.sampled(claim.number, owner, params, number):
                return 0
        if params.keys() != self.space.keys():
            raise BadInput(
                f"storage: trial {claim.number} of {self.name!r} is damaged: it has the fields "
                f"{', '.join(params) or 'none'}, not {', '.join(self.space)}; restore the database, or give "
                "the sweep another name"
            )
        inner = Progress()
        if outer is not None:
            inner.stop = outer.stop
        began = time.perf_counter()
        with beating(ledger, claim.number, owner, inner):
            state, facts = "done", {}
            try:
                handle = self._handle(study, number) if number is not None and self.halving else None
                facts = dict(self.objective(params, Trial(claim.number, inner, handle)))
            except Exception as error:  # the objective is the user's code
                if claim.attempt < ATTEMPTS:
                    ledger.give_back(claim.number, owner)
                    return 0
                state, facts = "failed", {"error": f"{type(error).__name__}: {error}"}
        if inner.partial:
            ledger.give_back(claim.number, owner, begun=False)
            return 0
        value = float(facts.get("value", math.nan))
        facts["diverged"] = bool(facts.get("diverged", False)) or (
            state == "done" and not math.isfinite(value)
        )
        if not ledger.finish(claim.number, owner, state, facts, time.perf_counter() - began):
            return 0
        self._tell(study, number, params, facts, state)
        return 1

    def _handle(self, study: Any, number: int) -> Any:
        import optuna

        place = (study._study_id, number)
        known = patiently(lambda: study._storage.get_trial_id_from_study_id_trial_number(*place))
        return optuna.trial.Trial(study, known)

    def _tell(
        self, study: Any, number: int | None, params: dict[str, Any], facts: dict[str, Any], state: str
    ) -> None:
        """Let optuna know, for its sampler and its dashboards; the ledger is what counts."""
        from optuna.trial import TrialState, create_trial

        value = float(facts.get("value", math.nan))
        good = state == "done" and math.isfinite(value)
        if number is None:
            patiently(
                lambda: study.add_trial(
                    create_trial(
                        params=params,
                        distributions=self._distributions_of_grid(),
                        state=TrialState.COMPLETE if good else TrialState.FAIL,
                        value=value if good else None,
                    )
                )
            )
        else:
            patiently(
                lambda: study.tell(
                    number,
                    value if good else None,
                    state=None if good else TrialState.FAIL,
                    skip_if_finished=True,
                )
            )

    def _distributions_of_grid(self) -> dict[str, Any]:
        from optuna.distributions import CategoricalDistribution

        return {
            k: CategoricalDistribution(v.grid() if isinstance(v, Range) else list(v))
            for k, v in self.space.items()
        }

    def _reconcile(self, ledger: Ledger) -> None:
        """Tell optuna about results whose worker died between the ledger and optuna."""
        if self.points is not None:
            return
        found = ledger.spec()
        assert found is not None
        study = patiently(lambda: self._optuna(found[1]), racing=True)
        trials = patiently(lambda: study.trials)
        open_numbers = {trial.number for trial in trials if not trial.state.is_finished()}
        for row in ledger.rows():
            if row.state in ("done", "failed") and row.optuna in open_numbers:
                self._tell(study, row.optuna, json.loads(row.params), json.loads(row.result), row.state)

    # ---- results -------------------------------------------------------------------------------------------
    def table(self) -> pd.DataFrame:
        """One row per trial, finished or not: trial, state, the fields, the facts, attempts, seconds."""
        ledger = self.open()
        found = frame(ledger.rows())
        ledger.close()
        return found


def frame(rows: list[Any]) -> pd.DataFrame:
    """Rows of the ledger as a table."""
    return pd.DataFrame(
        [
            {
                "trial": r.number,
                "state": r.state,
                **(json.loads(r.params) if r.params else {}),
                **(json.loads(r.result) if r.result else {}),
                "attempts": r.attempts,
                "seconds": r.seconds,
            }
            for r in rows
        ]
    )


@contextlib.contextmanager
def beating(ledger: Ledger, number: int, owner: str, inner: Progress, every: float = 5.0) -> Iterator[None]:
    """Keep a claim alive while the block runs; a lost claim, or a sweep that was stopped, stops the run."""
    ended = threading.Event()

    def loop() -> None:
        waited = 0.0
        while not ended.wait(1.0):
            waited += 1.0
            if ledger.stopped() or (waited % every == 0 and not ledger.beat(number, owner)):
                inner.stop.set()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


@contextlib.contextmanager
def watching(ledger: Ledger, progress: Progress) -> Iterator[None]:
    """Mark the sweep as stopped when the block ends because of a Stop, so that workers elsewhere end too."""
    yield
    if progress.stopped:
        ledger.stop(True)
