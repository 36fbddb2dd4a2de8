"""Many damaged inputs for each loader, with a time limit each and a bound on memory.

A loader is a function of an empty folder; it makes what is to be damaged there and returns a function
that draws one input: (what it is, a function that opens it). Opening ends by itself ("accepted"), in
`BadInput` ("refused"), or in something that is looked for: another exception ("traceback"), more than one
line ("long"), the time limit ("hang") or the end of the process ("crash").

Inputs of one loader are opened in a process of its own, which is watched from outside: one that hangs where
no signal reaches it is killed, and the next process goes on after the input that did it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from workbench import BadInput

Case = tuple[str, Callable[[], Any]]
Drawing = Callable[[random.Random], Case]
Loader = Callable[[Path], Drawing]
GOOD = ("accepted", "refused")
BAD = ("traceback", "long", "hang", "crash")
#: Characters of a message that is still one readable line.
LONGEST = 3000
#: Seconds that opening one input may take, and those after which its process is killed.
LIMIT, KILL = 60.0, 180.0
#: Bytes of address space that a process may take beyond what it has once the originals are made.
MEMORY = 3 * 2**30


class Overtime(BaseException):
    """The time limit of one input; no loader catches it."""


class Odd(Exception):
    """Opening ended in a way that is looked for: (end, what was said)."""


def drawn(loader: str, seed: int, index: int) -> random.Random:
    return random.Random(f"{seed}-{loader}-{index}")


def attempt(call: Callable[[], Any], limit: float = LIMIT) -> tuple[str, str]:
    """(how opening ended, what it said)."""

    def overtime(*_: Any) -> None:
        raise Overtime

    before = signal.signal(signal.SIGALRM, overtime)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        told = call()
        return ("refused", told) if isinstance(told, str) else ("accepted", "")
    except BadInput as error:
        said = str(error)
        return ("long" if "\n" in said or len(said) > LONGEST else "refused"), said
    except Odd as error:
        return error.args
    except Overtime:
        return "hang", traceback.format_exc()
    except (Exception, SystemExit):
        return "traceback", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def surroundings() -> Iterator[Path]:
    """An empty folder that is the working directory, with a cache in it; no network, no bars."""
    here, before = Path.cwd(), dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        os.environ |= {
            "WORKBENCH_CACHE": f"{place}/cache",
            "WORKBENCH_EVIDENCE": f"{place}/evidence",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        os.chdir(place)
        try:
            yield Path(place)
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(before)


def briefly(name: str, loader: Loader, inputs: Iterable[int], seed: int) -> tuple[Counter[str], list[str]]:
    """A few inputs, by their numbers, here: the ends, and what was said at those that are looked for."""
    ends, told = Counter[str](), []
    with surroundings() as root:
        draw_case = loader(root)
        for index in inputs:
            what, call = draw_case(drawn(name, seed, index))
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                end, said = attempt(call)
            ends[end] += 1
            if end not in GOOD:
                told.append(f"{name} {index}: {what}: {end}\n{said}")
    return ends, told


# ---- at length ---------------------------------------------------------------------------------------------
def work(name: str, loader: Loader, seed: int, begin: int, end: int) -> None:
    """The watched process: one line a finished input on what was standard output."""
    import torch

    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    with surroundings() as root:
        draw_case = loader(root)
        before = peak()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        print(json.dumps({"ready": before}), file=out, flush=True)
        for index in range(begin, end):
            what, call = draw_case(drawn(name, seed, index))
            began = time.perf_counter()
            ended, said = attempt(call)
            note: dict[str, Any] = {"index": index, "end": ended, "peak": peak()}
            note["seconds"] = round(time.perf_counter() - began, 4)
            if ended not in GOOD:
                note |= {"what": what, "said": said[-3000:]}
            print(json.dumps(note), file=out, flush=True)


def peak() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any] | None]:
    """The notes of a worker; None once when it says nothing for too long. The originals take their time."""
    assert process.stdout is not None
    file, rest, patience = process.stdout.fileno(), b"", 10 * KILL
    while True:
        if not select.select([file], [], [], patience)[0]:
            yield None
            return
        got = os.read(file, 65536)
        if not got:
            return
        patience = KILL
        *whole, rest = (rest + got).split(b"\n")
        yield from (json.loads(line) for line in whole)


def campaign(name: str, count: int, seed: int, state: Path) -> dict[str, Any]:
    """Bring one loader's counts to `count` inputs, from wherever an earlier call stopped."""
    found: dict[str, Any] = {
        "loader": name,
        "seed": seed,
        "done": 0,
        "ends": {},
        "seconds": 0.0,
        "slowest": 0.0,
    }
    found |= {"peak": 0, "more": 0, "faults": []}
    if state.is_file() and (kept := json.loads(state.read_text()))["seed"] == seed:
        found = kept
    saved = time.monotonic()
    while found["done"] < count:
        command = [sys.executable, "-m", "tests.fuzz", "--worker", name, str(found["done"]), str(count)]
        process = subprocess.Popen(
            [*command, "--seed", str(seed)], stdout=subprocess.PIPE, start_new_session=True, text=True
        )
        hung, ready = False, 0
        for note in lines(process):
            if note is None:
                hung = True
                break
            if "ready" in note:
                ready = note["ready"]
                continue
            add(found, note, ready)
            if time.monotonic() - saved > 5:
                keep(state, found)
                saved = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if found["done"] < count:
            if not ready:
                raise RuntimeError(f"{name}: the process of this loader ends before its first input")
            end = "hang" if hung else "crash"
            note = {"index": found["done"], "end": end, "seconds": KILL if hung else 0.0, "peak": 0}
            add(found, note | {"what": "", "said": f"the process ended: {process.returncode}"}, ready)
        keep(state, found)
    return found


def add(found: dict[str, Any], note: dict[str, Any], ready: int) -> None:
    found["done"] = note["index"] + 1
    found["ends"][note["end"]] = found["ends"].get(note["end"], 0) + 1
    found["seconds"] += note["seconds"]
    found["slowest"] = max(found["slowest"], note["seconds"])
    found["peak"] = max(found["peak"], note["peak"])
    found["more"] = max(found["more"], note["peak"] - ready)
    if note["end"] not in GOOD and len(found["faults"]) < 200:
        found["faults"].append({k: note[k] for k in ("index", "end", "what", "said")})


def keep(state: Path, found: dict[str, Any]) -> None:
    state.parent.mkdir(parents=True, exist_ok=True)
    draft = state.with_suffix(".part")
    draft.write_text(json.dumps(found, indent=1))
    os.replace(draft, state)


def table(states: list[dict[str, Any]]) -> str:
    """The counts as Markdown."""
    heads = "loader inputs accepted refused tracebacks long hangs crashes mean slowest memory".split()
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for state in states:
        ends = state["ends"]
        counts = [ends.get(end, 0) for end in (*GOOD, *BAD)]
        mean = 1000 * state["seconds"] / max(state["done"], 1)
        cells = [state["loader"], state["done"], *counts, f"{mean:.1f} ms", f"{state['slowest']:.2f} s"]
        rows.append("| " + " | ".join(map(str, [*cells, f"+{state['more'] / 1e6:.0f} MB"])) + " |")
    return "\n".join(rows) + "\n"
