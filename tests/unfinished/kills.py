"""`python -m tests.unfinished.kills [KIND ...] [--count N] [--seed S] [--fresh]`: kill -9 at random moments.

For each moment the command is killed and typed again. The second call has to complete, with the numbers of a
run that nobody disturbed; what the first had finished is not computed again; no process, no temporary folder
and no file that is half written is left. An interrupted campaign goes on; counts go to `--table`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from tests.conftest import new_cache
from workbench.results import Result
from workbench.storage.writing import DRAFT, SCRATCH, damage

ROOT = Path(__file__).parent.parent.parent
STATES = ROOT / "build" / "kills"
TABLE = ROOT / "data" / "benchmarks" / "kills.md"
SWEEP = {"examples": 256, "learning_rate_points": 3, "batch_sizes": [8, 32]}
REPORT = SWEEP | {"noise_groups": 6, "noise_size": 8, "target_batches": [8, 32, 128]}
REPORT |= {"target_learning_rate_low": 0.01, "target_learning_rate_high": 0.16}


def options(fields: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]


#: kind -> what is typed after `workbench`; {out} is the folder that it writes to.
COMMANDS: dict[str, list[str]] = {
    "run": ["run", "trace", "--subject", "digits-vit", "--products", "60", "--out", "{out}"],
    "train": [
        "run",
        "train",
        "--subject",
        "digits-vit",
        "--steps",
        "20",
        "--batch-size",
        "16",
        "--out",
        "{out}",
    ],
    "sweep": [
        *("run", "learning-rate-batch-size", "--subject", "digits-softmax", *options(SWEEP)),
        *("--workers", "2", "--out", "{out}"),
    ],
    "report": [
        *("report", "learning-rate-batch-size", "--subject", "digits-softmax", *options(REPORT)),
        *("--workers", "2", "--out", "{out}"),
    ],
}
#: What differs between two runs of the same numbers.
TIMED = ("seconds", "items_per_second", "pid", "attempts")


class Place:
    """A folder with a cache, a place for temporary files and a folder to write to, and a command there."""

    def __init__(self, folder: Path, kind: str, cache: Path) -> None:
        self.folder, self.kind = folder, kind
        self.cache, self.temporary, self.out = folder / "cache", folder / "temporary", folder / "out"
        self.temporary.mkdir(parents=True)
        shutil.copytree(cache, self.cache)
        self.process: subprocess.Popen[str] | None = None
        self.began = 0.0

    def start(self) -> subprocess.Popen[str]:
        words = [word.format(out=self.out) if "{out}" in word else word for word in COMMANDS[self.kind]]
        surroundings = os.environ | {
            "WORKBENCH_CACHE": str(self.cache),
            "WORKBENCH_CHECKPOINT_SECONDS": "0",
            "TMPDIR": str(self.temporary),
            "JOBLIB_TEMP_FOLDER": str(self.temporary),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "workbench.cli", *words],
            env=surroundings,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self.process

    def ended(self, seconds: float = 900) -> tuple[int, str]:
        """(exit code, standard output and error)."""
        assert self.process is not None
        out, error = self.process.communicate(timeout=seconds)
        return self.process.returncode, f"{out}\n{error}"

    def processes(self) -> list[int]:
        """Processes that were started from this command: they know its cache."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                number = int(entry.name)
                if (
                    number != os.getpid()
                    and f"WORKBENCH_CACHE={self.cache}\0".encode() in (entry / "environ").read_bytes()
                ):
                    found.append(number)
        return found

    def wait_for_orphans(self, seconds: float = 20) -> list[int]:
        until = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.1)
        return left

    def worked(self) -> bool:
        """Whether there is a sign of the work itself."""
        marks = ("unfinished/*", "results/*", "sweeps/*.sqlite")
        return any(True for mark in marks for _ in self.cache.glob(mark)) or any(self.temporary.iterdir())


def half_written(place: Place) -> list[str]:
    """Files under their final names that are not whole."""
    wrong = []
    for slot in [*place.cache.glob("results/*"), *([place.out] if place.out.is_dir() else [])]:
        if not slot.name.startswith(".") and (told := damage(slot)):
            wrong.append(f"{slot.name}: {told}")
    for file in [*place.folder.rglob("*.json"), *place.folder.rglob("*.ipynb")]:
        if any(part.startswith((DRAFT, SCRATCH)) for part in file.parts) or place.temporary in file.parents:
            continue
        try:
            json.loads(file.read_text())
        except ValueError:
            wrong.append(f"{file.name} is no JSON")
    for page in place.out.glob("*.html"):
        if not page.read_text().rstrip().endswith("</html>"):
            wrong.append(f"{page.name} does not end")
    return wrong


def leftovers(place: Place) -> list[str]:
    """Drafts, parts, temporary files and what an unfinished run keeps."""
    found = [str(p.relative_to(place.folder)) for p in place.folder.rglob(DRAFT + "*")]
    found += [str(p.relative_to(place.folder)) for p in place.folder.rglob("*.part")]
    found += [f"temporary/{p.name}" for p in place.temporary.iterdir()]
    return found + [f"unfinished/{p.name}" for p in place.cache.glob("unfinished/*")]


def steps_kept(cache: Path) -> int:
    """The furthest step of any checkpoint."""
    steps = [0]
    for note in cache.glob("unfinished/**/state.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            steps.append(len(json.loads(note.read_text())["content"]["history"]))
    return max(steps)


def trials(cache: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    """(study, number) -> result, seconds and attempts of every finished trial."""
    found: dict[tuple[str, int], tuple[Any, ...]] = {}
    for file in cache.glob("sweeps/*.sqlite"):
        connection = sqlite3.connect(file)
        with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(connection):
            rows = connection.execute(
                "select study, number, result, seconds, attempts from workbench_trials where state = 'done'"
            )
            found |= {(study, number): tuple(rest) for study, number, *rest in rows}
    return found


def stored(cache: Path) -> dict[str, float]:
    """Finished results of the cache, and when they were written."""
    notes = cache.glob("results/*/result.json")
    return {note.parent.name: note.stat().st_mtime for note in notes if not note.parent.name.startswith(".")}


def numbers(place: Place) -> dict[str, pd.DataFrame]:
    """Tables of the results in the cache (and of the one that was saved), without times."""
    folders = [*place.cache.glob("results/*"), *([place.out] if (place.out / "result.json").exists() else [])]
    tables = {}
    for folder in folders:
        table = Result.load(folder, open_subject=False).table
        name = "out" if folder == place.out else folder.name
        tables[name] = table.drop(columns=[c for c in table if c in TIMED or "seconds" in str(c)])
    return tables


def one_kill(
    kind: str, cache: Path, whole: dict[str, Any], draw: random.Random, folder: Path
) -> dict[str, Any]:
    """Kill one call at a random moment, call again, compare; `wrong` says what is not as it has to be."""
    place = Place(folder, kind, cache)
    wrong: list[str] = []
    process = place.start()
    early = draw.random() < 0.2
    if early:  # before the work: while modules are imported, the subject is opened
        time.sleep(draw.random() * whole["first"])
    else:
        while not place.worked() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.random() * (whole["seconds"] - whole["first"]))
    moment = time.monotonic() - place.began
    finished = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    process.wait()  # its pipes stay open for as long as an orphan lives
    if orphans := place.wait_for_orphans():
        wrong.append(f"processes are left after the kill: {orphans}")
        for number in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
    place.ended()
    wrong += [f"after the kill, {told}" for told in half_written(place)]
    step, before, kept = steps_kept(place.cache), trials(place.cache), stored(place.cache)
    place.start()
    code, said = place.ended()
    if code or "Traceback" in said or "partial" in said:
        wrong.append(f"the next call ended with {code}: {said[-600:]}")
    if orphans := place.wait_for_orphans():
        wrong.append(f"processes are left at the end: {orphans}")
    wrong += [f"at the end, {told}" for told in half_written(place)]
    wrong += [f"left over: {name}" for name in leftovers(place)]
    if step and f"goes on at step {step}" not in said and not finished:
        wrong.append(f"the checkpoint of step {step} was not used: {said[-300:]}")
    after, now = trials(place.cache), stored(place.cache)
    wrong += [f"trial {key} was computed again" for key in before if before[key] != after.get(key)]
    wrong += [f"result {key} was computed again" for key in kept if kept[key] != now.get(key)]
    try:
        found = numbers(place)
        if found.keys() != whole["numbers"].keys():
            wrong.append(f"other results: {sorted(found)} and {sorted(whole['numbers'])}")
        for name, table in found.items():
            pd.testing.assert_frame_equal(table, whole["numbers"][name], check_exact=True)
    except Exception as error:
        wrong.append(f"other numbers: {' '.join(str(error).split())[:300]}")
    files = sorted(p.name for p in place.out.iterdir()) if place.out.is_dir() else []
    if files != whole["files"]:
        wrong.append(f"other files: {files} and {whole['files']}")
    note = {"moment": round(moment, 2), "finished": finished, "wrong": wrong}
    shutil.rmtree(folder, ignore_errors=True)
    return note | {"step": step, "trials": len(before), "results": len(kept)}


def undisturbed(kind: str, cache: Path, folder: Path) -> dict[str, Any]:
    """What the command comes to when nobody disturbs it, and how long it takes."""
    place = Place(folder, kind, cache)
    process = place.start()
    while not place.worked() and process.poll() is None:
        time.sleep(0.02)
    first = time.monotonic() - place.began
    code, said = place.ended()
    seconds = time.monotonic() - place.began
    assert code == 0, said
    assert not place.wait_for_orphans() and not leftovers(place), leftovers(place)
    files = sorted(p.name for p in place.out.iterdir())
    return {"first": first, "seconds": seconds, "numbers": numbers(place), "files": files}


def campaign(kind: str, count: int, seed: int, state: Path) -> list[dict[str, Any]]:
    """Bring the kills of one kind to `count`, from wherever an earlier call stopped."""
    found: list[dict[str, Any]] = json.loads(state.read_text()) if state.is_file() else []
    if len(found) >= count:
        return found
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        cache = new_cache(Path(place) / "cache")
        whole = undisturbed(kind, cache, Path(place) / "whole")
        while len(found) < count:
            draw = random.Random(f"{seed}-{kind}-{len(found)}")
            found.append(one_kill(kind, cache, whole, draw, Path(place) / str(len(found))))
            state.parent.mkdir(parents=True, exist_ok=True)
            state.with_suffix(".part").write_text(json.dumps(found, indent=1))
            os.replace(state.with_suffix(".part"), state)
            print(f"{kind} {len(found)}: {found[-1]}", flush=True)
    return found


HEAD = """# Killed processes

`python -m tests.unfinished.kills` sends kill -9 to a command at random moments (one in five before its work,
the others within it) and types it again. *Completed*: the second call ended well, with the numbers and
the files of a run that nobody disturbed, computed nothing again that the first had finished (results in
the cache,
trials of the sweep, steps of the training up to its checkpoint), and left no process, no temporary folder and
no file that is half written. *Kept* is what the killed calls had finished, over all moments. Seed {seed}.

"""


def table(states: dict[str, list[dict[str, Any]]]) -> str:
    heads = ["command", "kills", "completed", "kept results", "kept trials", "kept steps", "moments (s)"]
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for kind, notes in states.items():
        moments = sorted(note["moment"] for note in notes)
        sums = [sum(note[name] for note in notes) for name in ("results", "trials", "step")]
        cells = [kind, len(notes), sum(not note["wrong"] for note in notes), *sums]
        rows.append("| " + " | ".join(map(str, cells)) + f" | {moments[0]:.1f} to {moments[-1]:.1f} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.unfinished.kills")
    parser.add_argument("kind", nargs="*", default=[])
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="begin again")
    parser.add_argument("--table", type=Path, default=TABLE)
    given = parser.parse_args()
    for kind in given.kind or COMMANDS:
        state = STATES / f"{kind}-{given.seed}.json"
        if given.fresh:
            state.unlink(missing_ok=True)
        campaign(kind, given.count, given.seed, state)
    files = {kind: STATES / f"{kind}-{given.seed}.json" for kind in COMMANDS}
    states = {kind: json.loads(file.read_text()) for kind, file in files.items() if file.is_file()}
    given.table.write_text(HEAD.format(seed=given.seed) + table(states))
    return int(any(note["wrong"] for notes in states.values() for note in notes))


if __name__ == "__main__":
    sys.exit(main())
