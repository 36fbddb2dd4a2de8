"""The ledger of a sweep: one row a trial, claimed and finished by single atomic statements,
in SQLite or PostgreSQL.

Exactly one result per trial holds by construction, not by luck: a claim is an UPDATE whose WHERE clause still
says "waiting" (or abandoned), a finish is one whose WHERE clause still names the claimant,
and only the statement that changed a row counts.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sql
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError

from workbench.errors import BadInput, said
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
#: Times that a trial may be begun before it counts as failed.
ATTEMPTS = 3
#: What a database says when waiting cannot help.
PERMANENT = (
    "unable to open database file",
    "file is not a database",
    "disk image is malformed",
    "readonly database",
    "read-only",
    "disk is full",
    "no space left",
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "permission denied",
    "access denied",
    "could not translate host name",
    "name or service not known",
    "nodename nor servname",
    "failed to resolve host",
    "unknown database",
)
#: What SQLite says when another process is at the file; everything else that it says stays as it is.
BUSY = ("locked", "busy", "already exists", "schema has changed", "disk i/o error", "interrupted")
#: What it says while another worker creates tables.
RACING = ("no such table", "unique constraint failed")
#: What libraries make of rows that they have not written.
UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)
#: The server's own clock in seconds, so that a worker whose clock is wrong takes nobody's trial.
CLOCKS = {
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
    "postgresql": "extract(epoch from clock_timestamp())",
    "mysql": "unix_timestamp(now(6))",
    "mariadb": "unix_timestamp(now(6))",
}


def permanent(error: Exception) -> str:
    """The line of a database's complaint that no waiting mends, or nothing."""
    words = str(getattr(error, "orig", None) or error).splitlines()
    for line in filter(None, (word.strip() for word in words)):
        low = line.lower()
        missing = "does not exist" in low and any(word in low for word in ("database", "role", "user"))
        own_file = isinstance(getattr(error, "orig", None), sqlite3.Error)
        if (
            missing
            or any(part in low for part in PERMANENT)
            or (own_file and not any(p in low for p in BUSY))
        ):
            return line[:200]
    return ""


def storage_error(line: str) -> BadInput:
    return BadInput(
        f"storage: {line}; give an SQLAlchemy URL of a database that exists and may be written, such as "
        "sqlite:///sweep.sqlite or postgresql+psycopg://user:password@host/database"
    )


def patiently(action: Callable[[], Value], patience: float = PATIENCE, racing: bool = False) -> Value:
    """Repeat a database action while the server is away or busy (a restart, a lock),
    up to `patience` seconds; `BadInput` at once for what waiting does not mend, and when patience ends.

    racing : also when somebody else inserted the same row first,
        as two workers do that create optuna's tables at once.
    """
    from optuna.exceptions import OptunaError, StorageInternalError

    until, pause = time.monotonic() + patience, 0.02
    while True:
        try:
            return action()
        except (DBAPIError, StorageInternalError) as error:
            line = permanent(error.__cause__ if isinstance(error, StorageInternalError) else error)  # type: ignore[arg-type]
            if line and not (racing and any(part in line.lower() for part in RACING)):
                raise storage_error(line) from None
            if isinstance(error, IntegrityError) and not racing:
                raise storage_error(str(error.orig).splitlines()[0][:200]) from None
            if time.monotonic() > until:
                words = said(getattr(error, "orig", None) or error).strip().splitlines()
                raise storage_error(
                    f"{words[0][:160] if words else error!r} (tried for {patience:g} s)"
                ) from None
            time.sleep(pause)
            pause = min(pause * 2, 1.0)
        except BadInput:
            raise
        except (sql.exc.SQLAlchemyError, OptunaError, *UNREADABLE) as error:
            reason = f"{type(error).__name__}: {(said(error).strip().splitlines() or [''])[0][:160]}"
            raise storage_error(f"it holds what no sweep has written ({reason})") from error


def engine_options(url: str) -> dict[str, Any]:
    return {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}


def owner_name(driver: str) -> str:
    return f"{socket.gethostname()}|{os.getpid()}|{driver}"


def alive(owner: str) -> bool:
    """False only when the owner was a process of this machine that is gone."""
    host, _, rest = owner.partition("|")
    pid = rest.partition("|")[0]
    if host != socket.gethostname() or not pid.isdecimal() or len(pid) > 18:
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    status = Path(f"/proc/{pid}/stat")  # a killed process that nobody waited for still has its number
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


#: States of a trial that has no result yet. A suspect's worker died, perhaps by its doing.
OPEN = ("waiting", "running", "suspect")
STATES = (*OPEN, "done", "failed")
POISONED = (
    f"its worker died {ATTEMPTS} times (out of memory, or a crash of compiled code); run it alone to see, or "
    "leave its settings out"
)


def checked(row: Any) -> Any:
    """A row of the ledger whose every column holds what this module writes there; `BadInput` names the first
    that does not.
    """
    held = {
        "number": type(row.number) is int,
        "state": row.state in STATES,
        "owner": isinstance(row.owner, str),
        "beat": is_number(row.beat),
        "attempts": type(row.attempts) is int,
        "optuna": row.optuna is None or type(row.optuna) is int,
        "params": row.params is None or is_object(row.params),
        "result": is_object(row.result) or (not row.result and row.state not in ("done", "failed")),
        "seconds": row.seconds is None or is_number(row.seconds),
    }
    if wrong := [column for column, good in held.items() if not good]:
        raise BadInput(
            f"storage: trial {said(row.number)[:20]} of {said(row.study)[:80]!r} is damaged: its "
            f"{wrong[0]} is {said(getattr(row, wrong[0]))[:80]!r}; restore the database, or give the sweep "
            "another name"
        )
    return row


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_object(text: Any) -> bool:
    try:
        return isinstance(text, str) and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


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
        try:
            self.engine = sql.create_engine(url, **engine_options(url))
        except (ArgumentError, ImportError, ValueError) as error:  # no URL, or its driver is not installed
            raise storage_error(str(error).splitlines()[0][:160]) from None
        clock = CLOCKS.get(self.engine.dialect.name)
        if clock is None:
            raise storage_error(f"{self.engine.dialect.name} is not supported")
        self.clock = sql.literal_column(clock, sql.Float)
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
        if found is not None and not all(isinstance(part, str) for part in found):
            raise storage_error(f"the study {self.study!r} in it is damaged")
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

    def claim(self, owner: str, only: int | None = None) -> Claim | None:
        """The next trial that nobody runs (or that one `only`), or None when there is none left.

        Abandoned ones come back; those that crashed their workers wait until nothing else is left, and one
        that was begun `ATTEMPTS` times without an end is marked as failed.
        """

        def attempt() -> Claim | bool | None:
            with self.engine.connect() as connection:
                where = (TRIALS.c.study == self.study) & TRIALS.c.state.in_(OPEN)
                if only is not None:
                    where &= TRIALS.c.number == only
                chosen = sql.select(TRIALS).where(where).order_by(TRIALS.c.number)
                rows = [checked(row) for row in connection.execute(chosen)]
                now = float(connection.execute(sql.select(self.clock)).scalar_one())
            found = False
            for row in sorted(rows, key=lambda row: row.state == "suspect"):
                if row.state == "running" and row.beat > now - STALE and alive(row.owner):
                    continue
                found = True
                unchanged = (
                    (TRIALS.c.study == self.study)
                    & (TRIALS.c.number == row.number)
                    & (TRIALS.c.state == row.state)
                    & (TRIALS.c.owner == row.owner)
                    & (TRIALS.c.attempts == row.attempts)
                )
                if row.state == "running":
                    unchanged &= TRIALS.c.beat == row.beat
                if row.state in ("running", "suspect") and row.attempts >= ATTEMPTS:
                    self._update(unchanged, state="failed", result=json.dumps({"error": POISONED}))
                    continue
                taken = {"state": "running", "owner": owner, "beat": self.clock, "attempts": row.attempts + 1}
                if self._update(unchanged, **taken):
                    params = json.loads(row.params) if row.params else None
                    return Claim(row.number, params, row.optuna, row.attempts + 1)
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
        return self._update(self._mine(number, owner), beat=self.clock)

    def finish(self, number: int, owner: str, state: str, result: dict[str, Any], seconds: float) -> bool:
        """Record the one result of a trial; False when the claim was lost, and then nothing is recorded."""
        return self._update(
            self._mine(number, owner), state=state, result=json.dumps(result, default=plain), seconds=seconds
        )

    def give_back(self, number: int, owner: str, begun: bool = True) -> bool:
        """Return a claim; `begun` False when it was only stopped, which is no attempt."""
        attempts = {} if begun else {"attempts": TRIALS.c.attempts - 1}
        return self._update(self._mine(number, owner), state="waiting", owner="", **attempts)

    def release(self, driver: str) -> list[int]:
        """Suspect what the dead workers of one driver were running: the numbers."""
        mine = (
            (TRIALS.c.study == self.study)
            & (TRIALS.c.state == "running")
            & TRIALS.c.owner.like(f"%|{driver}")
        )

        def write() -> list[int]:
            with self.engine.begin() as connection:
                numbers = [n for (n,) in connection.execute(sql.select(TRIALS.c.number).where(mine))]
                connection.execute(sql.update(TRIALS).where(mine).values(state="suspect", owner=""))
                return numbers

        return patiently(write)

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
                mine = sql.select(TRIALS).where(TRIALS.c.study == self.study).order_by(TRIALS.c.number)
                return [checked(row) for row in connection.execute(mine)]

        return patiently(read)
