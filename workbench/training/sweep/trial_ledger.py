"""The ledger of a sweep: one row a trial, claimed and finished by single atomic statements,
in SQLite or PostgreSQL.

Exactly one result per trial holds by construction, not by luck: a claim is an UPDATE whose WHERE clause still
says "waiting" (or abandoned), a finish is one whose WHERE clause still names the claimant,
and only the statement that changed a row counts.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sql
from sqlalchemy.exc import DBAPIError, IntegrityError

from workbench.results import plain

Value = TypeVar("Value")
META = sql.MetaData()
STUDIES = sql.Table(
    "workbench_studies",
    META,
    sql.Column("study", sql.String(200), primary_key=True),
    sql.Column("spec", sql.Text),
    sql.Column("optuna", sql.String(255)),
    sql.Column("stopped", sql.Boolean, default=False),
)
TRIALS = sql.Table(
    "workbench_trials",
    META,
    sql.Column("study", sql.String(200), primary_key=True),
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("state", sql.String(16)),
    sql.Column("owner", sql.String(200)),
    sql.Column("beat", sql.Float),
    sql.Column("attempts", sql.Integer),
    sql.Column("optuna", sql.Integer),
    sql.Column("params", sql.Text),
    sql.Column("result", sql.Text),
    sql.Column("seconds", sql.Float),
)
#: A claim without a heartbeat for this long is abandoned (a dead process of this machine is noticed at once).
STALE = 30.0
PATIENCE = 90.0


def patiently(action: Callable[[], Value], patience: float = PATIENCE, racing: bool = False) -> Value:
    """Repeat a database action while the server is away or busy (a restart, a lock),
    up to `patience` seconds.

    racing : also when somebody else inserted the same row first,
        as two workers do that create optuna's tables at once.
    """
    from optuna.exceptions import StorageInternalError

    until, pause = time.monotonic() + patience, 0.02
    while True:
        try:
            return action()
        except (DBAPIError, StorageInternalError) as error:
            if time.monotonic() > until or (isinstance(error, IntegrityError) and not racing):
                raise
            time.sleep(pause)
            pause = min(pause * 2, 1.0)


def engine_options(url: str) -> dict[str, Any]:
    return {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}


def owner_name(driver: str) -> str:
    return f"{socket.gethostname()}|{os.getpid()}|{driver}"


def alive(owner: str) -> bool:
    """False only when the owner was a process of this machine that is gone."""
    host, pid, _ = owner.split("|", 2)
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    status = Path(f"/proc/{pid}/stat")  # a killed process that nobody waited for still has its number
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


@dataclass
class Claim:
    number: int
    params: dict[str, Any] | None
    optuna: int | None
    attempt: int


class Ledger:
    """All statements of one study. Open one per process."""

    def __init__(self, url: str, study: str) -> None:
        self.url, self.study = url, study
        self.engine = sql.create_engine(url, **engine_options(url))
        if url.startswith("sqlite"):
            sql.event.listen(
                self.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=NORMAL")
            )
        patiently(self._prepare)

    def _prepare(self) -> None:
        if self.url.startswith("sqlite"):
            with self.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        try:
            META.create_all(self.engine, checkfirst=True)
        except (IntegrityError, sql.exc.ProgrammingError, sql.exc.OperationalError):
            META.create_all(
                self.engine, checkfirst=True
            )  # somebody created them between the check and the creation

    def close(self) -> None:
        self.engine.dispose()

    def spec(self) -> tuple[str, str] | None:
        """(specification, optuna study) when the study exists."""

        def read() -> Any:
            with self.engine.connect() as connection:
                return connection.execute(
                    sql.select(STUDIES.c.spec, STUDIES.c.optuna).where(STUDIES.c.study == self.study)
                ).first()

        found = patiently(read)
        return None if found is None else (found[0], found[1])

    def create(self, spec: str, optuna: str, points: list[tuple[dict[str, Any] | None, int | None]]) -> bool:
        """Write the study and all its trials in one transaction; False when another process was first."""
        rows = [
            {
                "study": self.study,
                "number": i,
                "state": "waiting",
                "owner": "",
                "beat": 0.0,
                "attempts": 0,
                "optuna": number,
                "params": None if params is None else json.dumps(params),
            }
            for i, (params, number) in enumerate(points)
        ]

        def write() -> bool:
            try:
                with self.engine.begin() as connection:
                    connection.execute(
                        sql.insert(STUDIES),
                        {"study": self.study, "spec": spec, "optuna": optuna, "stopped": False},
                    )
                    connection.execute(sql.insert(TRIALS), rows)
                return True
            except IntegrityError:
                return False

        return patiently(write)

    def claim(self, owner: str) -> Claim | None:
        """The next trial that nobody runs, or None when there is none left; abandoned ones come back."""

        def attempt() -> Claim | bool | None:
            with self.engine.connect() as connection:
                where = (TRIALS.c.study == self.study) & TRIALS.c.state.in_(("waiting", "running"))
                rows = connection.execute(sql.select(TRIALS).where(where).order_by(TRIALS.c.number)).all()
            now, found = time.time(), False
            for row in rows:
                if row.state == "running" and row.beat > now - STALE and alive(row.owner):
                    continue
                found = True
                same = (TRIALS.c.study == self.study) & (TRIALS.c.number == row.number)
                unchanged = (
                    (TRIALS.c.state == row.state)
                    & (TRIALS.c.owner == row.owner)
                    & (TRIALS.c.attempts == row.attempts)
                )
                if row.state == "running":
                    unchanged &= TRIALS.c.beat == row.beat
                with self.engine.begin() as connection:
                    change = (
                        sql.update(TRIALS)
                        .where(same & unchanged)
                        .values(state="running", owner=owner, beat=now, attempts=row.attempts + 1)
                    )
                    if connection.execute(change).rowcount == 1:
                        return Claim(
                            row.number,
                            json.loads(row.params) if row.params else None,
                            row.optuna,
                            row.attempts + 1,
                        )
            return found  # True: lost every race, look again

        while True:
            found = patiently(attempt)
            if not isinstance(found, bool):
                return found
            if not found:
                return None

    def _mine(self, number: int, owner: str) -> Any:
        return (
            (TRIALS.c.study == self.study)
            & (TRIALS.c.number == number)
            & (TRIALS.c.owner == owner)
            & (TRIALS.c.state == "running")
        )

    def _update(self, where: Any, **values: Any) -> bool:
        def write() -> bool:
            with self.engine.begin() as connection:
                return connection.execute(sql.update(TRIALS).where(where).values(**values)).rowcount == 1

        return patiently(write)

    def sampled(self, number: int, owner: str, params: dict[str, Any], optuna: int) -> bool:
        return self._update(self._mine(number, owner), params=json.dumps(params), optuna=optuna)

    def beat(self, number: int, owner: str) -> bool:
        """Keep a claim; False when it was lost."""
        return self._update(self._mine(number, owner), beat=time.time())

    def finish(self, number: int, owner: str, state: str, result: dict[str, Any], seconds: float) -> bool:
        """Record the one result of a trial; False when the claim was lost, and then nothing is recorded."""
        return self._update(
            self._mine(number, owner), state=state, result=json.dumps(result, default=plain), seconds=seconds
        )

    def give_back(self, number: int, owner: str) -> bool:
        return self._update(self._mine(number, owner), state="waiting", owner="")

    def release(self, driver: str) -> None:
        """Return what the dead workers of one driver were running."""

        def write() -> None:
            with self.engine.begin() as connection:
                where = (
                    (TRIALS.c.study == self.study)
                    & (TRIALS.c.state == "running")
                    & TRIALS.c.owner.like(f"%|{driver}")
                )
                connection.execute(sql.update(TRIALS).where(where).values(state="waiting", owner=""))

        patiently(write)

    def stop(self, value: bool) -> None:
        def write() -> None:
            with self.engine.begin() as connection:
                connection.execute(
                    sql.update(STUDIES).where(STUDIES.c.study == self.study).values(stopped=value)
                )

        patiently(write)

    def stopped(self) -> bool:
        def read() -> bool:
            with self.engine.connect() as connection:
                return bool(
                    connection.execute(
                        sql.select(STUDIES.c.stopped).where(STUDIES.c.study == self.study)
                    ).scalar()
                )

        return patiently(read)

    def rows(self) -> list[Any]:
        def read() -> list[Any]:
            with self.engine.connect() as connection:
                return list(
                    connection.execute(
                        sql.select(TRIALS).where(TRIALS.c.study == self.study).order_by(TRIALS.c.number)
                    ).all()
                )

        return patiently(read)
