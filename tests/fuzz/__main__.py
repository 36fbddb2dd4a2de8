"""`python -m tests.fuzz [LOADER ...] [--count N] [--seed S] [--fresh]`: damaged inputs at length.

Counts are kept beside the checkout's other build products after every few inputs, so an interrupted
call goes on; the table of all loaders goes to `--table`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.fuzz.campaign import BAD, campaign, table, work
from tests.fuzz.loaders import LOADERS

#: A loader that starts a process for each input takes seconds an input.
FEWER = {"processes": 200}
ROOT = Path(__file__).parent.parent.parent
STATES = ROOT / "build" / "fuzz"
TABLE = ROOT / "data" / "benchmarks" / "fuzz.md"
HEAD = """# Damaged inputs

`make fuzz` opens damaged inputs with every loader, each loader in a process of its own with {limit:g} seconds
an input and 3 GiB of address space beyond what it has when the originals are made (`tests/fuzz`).
*Refused* is one line that names what is wrong;
*accepted* is an input whose damage does no harm, or that a checksum or a
second copy makes good. *Traceback* is any other exception, *long* more than one line, *crash* the end of the
process (`processes`: real ones, of typed commands). *Memory* is the peak of the process above its peak when
the originals were made, over all inputs. Seed {seed}.

"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("loader", nargs="*", choices=[*LOADERS, []], default=[])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="begin again")
    parser.add_argument("--table", type=Path, default=None, help=f"default: {TABLE}, of 10^4 inputs or more")
    parser.add_argument("--worker", nargs=3, metavar=("LOADER", "BEGIN", "END"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        name, begin, end = given.worker
        work(name, LOADERS[name], given.seed, int(begin), int(end))
        return 0
    bad = 0
    for name in given.loader or LOADERS:
        state = STATES / f"{name}-{given.seed}.json"
        if given.fresh:
            state.unlink(missing_ok=True)
        found = campaign(name, min(given.count, FEWER.get(name, given.count)), given.seed, state)
        print(f"{name}: {found['done']} inputs, {found['ends']}, {found['seconds']:.0f} s", flush=True)
        for fault in found["faults"][:20]:
            print(f"--- {fault['index']} {fault['end']}: {fault['what']}\n{fault['said'][-1500:]}")
        bad += sum(found["ends"].get(end, 0) for end in BAD)
    states = [STATES / f"{name}-{given.seed}.json" for name in LOADERS]
    found = [json.loads(state.read_text()) for state in states if state.is_file()]
    if given.table or (not given.loader and given.count >= 10_000):
        from tests.fuzz.campaign import LIMIT

        (given.table or TABLE).write_text(HEAD.format(limit=LIMIT, seed=given.seed) + table(found))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
