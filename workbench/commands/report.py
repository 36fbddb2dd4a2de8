"""`workbench report NOTEBOOK`: a notebook with parameters, run headless and exported to one HTML file."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from workbench.commands.options import RUN_OPTIONS, Parser, files_in, parse, value_of
from workbench.errors import BadInput


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
    parser.add_argument("--plugins", default="", help=RUN_OPTIONS["plugins"])
    space = parse(parser, arguments[1:])
    load_plugins(files_in(space.plugins))
    given: dict[str, Any] = {}
    if space.parameters:
        file = Path(space.parameters)
        if not file.is_file():
            raise BadInput(f"parameters: {space.parameters!r} is not a file")
        given = yaml.safe_load(file.read_text()) or {}
        if not isinstance(given, dict):
            raise BadInput(f"parameters: {space.parameters!r} must hold names and values")
    for key, text in vars(space).items():
        if key.startswith("field:"):
            name = key.split(":", 1)[1]
            given[name] = text if isinstance(known[name].default, str) else value_of(text, object)
    for name in ("subject", "data", "runs"):  # the notebook runs in its own folder
        if (
            isinstance(given.get(name), str)
            and Path(given[name].split(".py:")[0] + (".py" if ".py:" in given[name] else "")).exists()
        ):
            given[name] = os.path.abspath(given[name])
    done = reports.render(arguments[0], given, Path(space.out))
    for path in (done.notebook, done.html):
        print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")
    if done.error:
        print(f"workbench: {done.error}", file=sys.stderr)
        return 1
    return 0
