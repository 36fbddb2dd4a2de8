"""`workbench kernels list | check | bench`."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from workbench.commands.options import Parser
from workbench.errors import BadInput


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the three commands; 0 when all is well, 1 when a kernel got worse.
    `BadInput` for a request that cannot be met.
    """
    parser = Parser(prog="workbench kernels", description="Triton kernels: list, compile and check, time.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="kernels, their configurations and their recorded resources")
    checking = commands.add_parser(
        "check", help="compile for GPUs that are not here and compare with the committed table"
    )
    checking.add_argument(
        "--target", type=int, action="append", help="compute capability, e.g. 90 (default: 80, 90 and 100)"
    )
    checking.add_argument(
        "--record", action="store_true", help="write the table instead of comparing with it"
    )
    timing = commands.add_parser("bench", help="time every operation beside PyTorch (needs a GPU)")
    timing.add_argument(
        "--record", action="store_true", help="write the table by which backend='auto' chooses"
    )
    for command in (listing, checking, timing):
        command.add_argument(
            "--only", default="*", metavar="GLOB", help="kernels or operations by name, e.g. 'attention.*'"
        )
    arguments = parser.parse_args(argv)
    if arguments.command == "list":
        return _list(arguments.only)
    if arguments.command == "check":
        return _check(arguments.only, arguments.target, arguments.record)
    from workbench.kernels import bench

    written = bench.run(arguments.only, arguments.record)
    if written is not None:
        print(f"wrote {written}")
    return 0


def _list(only: str) -> int:
    from workbench.kernels import backend, check, registry

    if not backend.HAS_TRITON:
        raise BadInput("kernels list: Triton is not installed here; it exists for Linux only")
    recorded = check.load_table()["kernels"] if check.TABLE.exists() else {}
    for kernel in registry.kernels():
        if not fnmatch.fnmatch(kernel.name, only):
            continue
        for configuration in kernel.configurations:
            used = recorded.get(f"{kernel.name}/{configuration.name}/sm_90")
            cost = (
                f"{used['registers']:4d} registers, {used['shared'] / 1024:6.1f} KiB shared on sm_90"
                if used
                else "not recorded"
            )
            print(f"{kernel.name:34} {configuration.name:24} {cost}")
    return 0


def _check(only: str, targets: list[int] | None, record: bool) -> int:
    from workbench.kernels import check, registry

    if record and (only != "*" or targets):
        raise BadInput("kernels check --record: records the whole table; leave out --only and --target")
    chosen = [kernel for kernel in registry.kernels() if fnmatch.fnmatch(kernel.name, only)]
    if not chosen:
        raise BadInput(f"--only {only!r}: matches no kernel; `workbench kernels list` shows their names")
    now = check.measure(chosen, targets or check.TARGETS)
    if record:
        check.save_table(now)
        print(f"recorded {len(now)} compiled kernels in {check.TABLE}")
        return 0
    table = check.load_table()
    import triton

    if table["triton"] != triton.__version__:
        raise BadInput(
            f"kernels check: the table was recorded with Triton {table['triton']}, "
            f"this is {triton.__version__}; "
            "install that version, or record anew and look at the difference"
        )
    worse = check.regressions(now, table["kernels"])
    for line in worse:
        print(f"worse: {line}")
    print(f"{len(now)} compiled kernels, {len(worse)} worse than the table")
    return 1 if worse else 0
