"""`workbench report NOTEBOOK`: a notebook with parameters, run headless and exported to one HTML file."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from workbench.commands.options import RUN_OPTIONS, Parser, files_in, parse
from workbench.errors import BadInput
from workbench.values import read, read_file


def report(arguments: list[str]) -> int:
    from workbench import reports
    from workbench.families import load_plugins

    if not arguments or arguments[0].startswith("-"):
        raise BadInput(f"report: is missing; known: {', '.join(reports.available())}")
    known = reports.parameters_of(arguments[0])
    parser = Parser(prog=f"workbench report {arguments[0]}", allow_abbrev=False)
    for name, info in known.items():
        text = f"{info.help}; default {info.default!r}".replace("%", "%%")
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"field:{name}",
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=text,
        )
    parser.add_argument("--out", default="reports", help="folder for the executed notebook and the HTML file")
    parser.add_argument(
        "--parameters", help="a YAML or JSON file of parameters, as a panel's Send to report writes it"
    )
    parser.add_argument("--overwrite", action="store_true", help=RUN_OPTIONS["overwrite"])
    parser.add_argument("--plugins", default="", help=RUN_OPTIONS["plugins"])
    space = parse(parser, arguments[1:])
    load_plugins(files_in(space.plugins))
    given: dict[str, Any] = {}
    if space.parameters:
        given = read_file(space.parameters)
    for key, text in vars(space).items():
        if key.startswith("field:"):
            name = key.split(":", 1)[1]
            given[name] = read(text, known[name].annotation, name.replace("_", "-"))
    for name in ("subject", "data", "runs"):  # the notebook runs in its own folder
        if isinstance(given.get(name), str) and lies_there(given[name]):
            given[name] = os.path.abspath(given[name])
    done = reports.render(arguments[0], given, space.out, overwrite=space.overwrite)
    for path in (done.notebook, done.html):
        print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")
    if done.error:
        print(f"workbench: {done.error}", file=sys.stderr)
        return 1
    return 0


def lies_there(text: str) -> bool:
    """Whether a text names a file or folder, or a function in one; what no file can be called does not."""
    file, function, _ = text.partition(".py:")
    return os.path.exists(file + ".py" if function else file)
