"""The `workbench` command: list, show, run, report, results, evidence, kernels.

Exit codes: 0 done, 1 a computation failed, 2 the request was wrong (one line says how), 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

from workbench.errors import BadInput, Notice, Stopped, unknown_name

#: command -> the function that does it; imported when it is asked for
COMMANDS = {
    "list": "workbench.commands.listing:list_",
    "show": "workbench.commands.listing:show",
    "run": "workbench.commands.run:run",
    "report": "workbench.commands.report:report",
    "results": "workbench.commands.results:results",
    "evidence": "workbench.commands.evidence:evidence",
    "kernels": "workbench.kernels.command:main",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    before, ignored = warnings.showwarning, sys.unraisablehook

    def heard(lost: sys.UnraisableHookArgs) -> None:
        """A Ctrl-C that fell into a finalizer, where Python drops exceptions, is heard a moment later."""
        if lost.exc_type is KeyboardInterrupt:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            ignored(lost)

    def one_line(message: Warning | str, category: type[Warning], *more: Any, **named: Any) -> None:
        if issubclass(category, Notice):
            print(f"workbench: {message}", file=sys.stderr)
        else:
            before(message, category, *more, **named)

    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(usage())
            return 0
        if arguments[0] == "--version":
            from workbench.version import __version__

            print(__version__)
            return 0
        if arguments[0] not in COMMANDS:
            raise unknown_name("command", arguments[0], COMMANDS)
        module, function = COMMANDS[arguments[0]].split(":")
        warnings.showwarning, sys.unraisablehook = one_line, heard
        done: int = getattr(importlib.import_module(module), function)(arguments[1:])
        sys.stdout.flush()  # a reader that has left is noticed here, not when the interpreter ends
        return done
    except Stopped as error:
        print(f"workbench: {error}", file=sys.stderr)
        return 130
    except BadInput as error:
        print(f"workbench: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("workbench: interrupted", file=sys.stderr)
        return 130
    finally:
        warnings.showwarning, sys.unraisablehook = before, ignored


def usage() -> str:
    return """Train and compress transformers: a subject, an instrument, a result and its prediction.

workbench list [instruments | methods | subjects | axes]
workbench show NAME                                    formula, source, file, recipe, options, evidence
workbench run NAME --subject SUBJECT [--field value ...] [--out FOLDER]
workbench run NAME --runs FILE [--field value ...] [--out FOLDER]
workbench report NOTEBOOK [--subject SUBJECT] [--parameter value ...] [--out FOLDER]
workbench results [list | open | compare | delete] [NAME ...]    stored results; --clear removes them
workbench evidence METHOD [METHOD ...] | --family FAMILY
workbench kernels list | check | bench

NAME is an instrument, a published method or an entry of an axis; `workbench run NAME --help` lists what it
takes, `workbench report NOTEBOOK --help` a report's parameters."""


if __name__ == "__main__":
    sys.exit(main())
