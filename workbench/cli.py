"""The `workbench` command: list, run, report, evidence, kernels.
Options come from the instruments' own fields.

Exit codes: 0 done, 1 a computation failed, 2 the request was wrong (one line says how), 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from workbench.catalog import catalog, find, methods
from workbench.errors import BadInput
from workbench.instruments import Instrument
from workbench.progress import TextProgress
from workbench.results import plain
from workbench.storage import replacing

SUBJECT_OPTIONS = {
    "data": "a CSV / JSONL / Parquet file, hf:ID, or random (shapes and speed only)",
    "text-column": "column of the text",
    "label-column": "column of the label",
    "image-column": "column of the image's path",
    "task": "how a batch becomes a loss, when it cannot be told from the checkpoint",
    "max-length": "tokens per example",
    "max-examples": "use at most this many rows of the data",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, exit code 2."""

    def error(self, message: str) -> Any:
        raise BadInput(message)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "list": list_command,
        "run": run_command,
        "report": report_command,
        "evidence": evidence_command,
        "kernels": kernels_command,
    }
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(usage())
            return 0
        if arguments[0] == "--version":
            from workbench import __version__

            print(__version__)
            return 0
        if arguments[0] not in commands:
            close = difflib.get_close_matches(arguments[0], commands, 1)
            raise BadInput(
                f"command: {arguments[0]!r} is unknown; "
                f"{'did you mean ' + close[0] + '? ' if close else ''}known: {', '.join(commands)}"
            )
        return commands[arguments[0]](arguments[1:])
    except BadInput as error:
        print(f"workbench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("workbench: interrupted", file=sys.stderr)
        return 130


def usage() -> str:
    return """workbench list [instruments | methods | subjects]
workbench run INSTRUMENT --subject SUBJECT [--field value ...] [--out FOLDER]
workbench run INSTRUMENT --runs FILE [--field value ...] [--out FOLDER]
workbench report NOTEBOOK [--subject SUBJECT] [--parameter value ...] [--out FOLDER]
workbench evidence METHOD [METHOD ...] | --family FAMILY [--out FOLDER]
workbench kernels list | check | bench
`workbench run INSTRUMENT --help` lists an instrument's fields, \
`workbench report NOTEBOOK --help` a report's parameters."""


def list_command(arguments: list[str]) -> int:
    from workbench.subjects.registry import BUILTINS

    parser = Parser(prog="workbench list")
    parser.add_argument("what", nargs="?", choices=("instruments", "methods", "subjects"))
    what = parser.parse_args(arguments).what
    if what in (None, "instruments"):
        print("instruments")
        for name, cls in catalog().items():
            print(f"  {name:24} {first_line(cls)}")
    if what in (None, "subjects"):
        print("subjects")
        for name, (_, _, note) in BUILTINS.items():
            print(f"  {name:24} {note}")
    if what in (None, "methods"):
        print("methods")
        for name, card in methods().items():
            measured = card.evidence()
            state = (
                "no evidence yet"
                if measured is None
                else ("holds here" if measured.get("holds") else "does not hold here")
            )
            print(f"  {name:24} {card.family:14} {state:20} {card.title} ({card.source})")
    return 0


def first_line(cls: type) -> str:
    """The first paragraph of a class's docstring on one line."""
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


def field_arguments(parser: argparse.ArgumentParser, cls: type[Instrument]) -> None:
    """One option for each field of the instrument, with its help, unit, bounds and default."""
    for name, info in cls.parameters().items():
        extra = info.json_schema_extra or {}
        notes = [info.description or ""]
        choices = [str(a) for a in get_args(info.annotation) if isinstance(a, (str, int))]
        if choices:
            notes.append("one of " + ", ".join(choices))
        notes += [str(m) for m in info.metadata if hasattr(m, "__slots__") and "Meta" not in type(m).__name__]
        if extra.get("unit"):
            notes.append(f"in {extra['unit']}")
        notes.append(
            "required" if info.is_required() else f"default {info.get_default(call_default_factory=True)!r}"
        )
        text = "; ".join(notes).replace("%", "%%")
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"field:{name}",
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=text,
        )


def value_of(text: str, annotation: Any) -> Any:
    """An option's text as a value: taken literally for string fields, as YAML otherwise
    (numbers, true/false, null); lists as [a, b] or a, b.
    """
    if get_origin(annotation) in (list, tuple) and not text.lstrip().startswith("["):
        return [value_of(part.strip(), get_args(annotation)[0]) for part in text.split(",") if part.strip()]
    kinds = get_args(annotation) or (annotation,)
    if annotation is str or all(isinstance(k, str) for k in kinds):
        return text
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def parse(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    """Parse, naming an unknown option and its nearest known one."""
    space, rest = parser.parse_known_args(arguments)
    if rest:
        known = [o for action in parser._actions for o in action.option_strings]
        close = difflib.get_close_matches(rest[0].split("=")[0], known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        names = ", ".join(o.lstrip("-") for o in known if o.startswith("--") and o != "--help")
        raise BadInput(f"{rest[0].lstrip('-')}: unknown field{hint} (fields: {names})")
    return space


def add_subject_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--subject", help="a built-in name, a folder, a hub id or file.py:function")
    for option, text in SUBJECT_OPTIONS.items():
        parser.add_argument(f"--{option}", help=text)


def subject_options(space: argparse.Namespace) -> dict[str, Any]:
    found = {o.replace("-", "_"): getattr(space, o.replace("-", "_")) for o in SUBJECT_OPTIONS}
    found = {k: v for k, v in found.items() if v is not None}
    for number in ("max_length", "max_examples"):
        if number in found:
            try:
                found[number] = int(found[number])
            except ValueError:
                raise BadInput(
                    f"{number.replace('_', '-')}: {found[number]!r} is not a whole number"
                ) from None
    return found


def run_command(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        raise BadInput(
            "instrument: is missing; workbench run INSTRUMENT --subject SUBJECT; known: "
            f"{', '.join(catalog())}"
        )
    cls = find(arguments[0])
    parser = Parser(prog=f"workbench run {cls.name()}", description=first_line(cls), allow_abbrev=False)
    field_arguments(parser, cls)
    if cls.on == "subject":
        add_subject_options(parser)
    else:
        parser.add_argument("--runs", help="a table of finished runs (CSV, Parquet, JSONL, ...)")
        parser.add_argument("--columns", help="own column names, as 'params=N,tokens=D,loss=val_loss'")
    parser.add_argument("--out", help="save the result in this folder")
    parser.add_argument(
        "--no-cache", action="store_true", help="run again even when this exact run is stored"
    )
    space = parse(parser, arguments[1:])
    given = {k.split(":", 1)[1]: v for k, v in vars(space).items() if k.startswith("field:")}
    instrument = cls(
        **{name: value_of(text, cls.model_fields[name].annotation) for name, text in given.items()}
    )
    if space.out and Path(space.out).exists() and not Path(space.out).is_dir():
        raise BadInput(f"out: {space.out!r} is a file; give a folder")
    on: Any
    if cls.on == "subject":
        if not space.subject:
            raise BadInput("subject: is missing; give --subject NAME, FOLDER, hub id or file.py:function")
        from workbench.subjects import subject

        on = subject(space.subject, **subject_options(space), progress=TextProgress())
    else:
        if not space.runs:
            raise BadInput("runs: is missing; give --runs FILE")
        from workbench.scaling import load_runs

        on = load_runs(space.runs, columns=column_mapping(space.columns))
    result = instrument.run(on, cache=not space.no_cache)
    print(result.summary())
    print(result.table.head(40).to_string(index=False, float_format=lambda v: f"{v:.5g}", max_colwidth=60))
    if space.out:
        print(f"saved in {result.save(space.out)}")
    return 0


def column_mapping(text: str | None) -> dict[str, str]:
    """'params=N,loss=val' -> {'params': 'N', 'loss': 'val'}."""
    if not text:
        return {}
    pairs = [part.partition("=") for part in text.split(",")]
    for ours, sign, theirs in pairs:
        if not sign or not ours.strip() or not theirs.strip():
            raise BadInput(f"columns: {text!r} is not a mapping; write it as params=N,tokens=D,loss=val_loss")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def report_command(arguments: list[str]) -> int:
    from workbench import reports

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
    space = parse(parser, arguments[1:])
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


def evidence_command(arguments: list[str]) -> int:
    import time

    from workbench import evidence
    from workbench.storage import evidence_target

    parser = Parser(prog="workbench evidence")
    parser.add_argument("method", nargs="*")
    parser.add_argument("--family")
    parser.add_argument("--out", help="folder to write to, in place of the project's or your own")
    parser.add_argument("--missing", action="store_true", help="only those without stored evidence")
    space = parser.parse_args(arguments)
    cards = methods()
    target = Path(space.out) if space.out else evidence_target()
    names = space.method or [n for n, c in cards.items() if space.family and c.family == space.family]
    unknown = [n for n in names if n not in cards]
    if unknown or not names:
        raise BadInput(f"method: {', '.join(unknown) or 'none given'}; known: {', '.join(cards)}")
    for name in names:
        card = cards[name]
        if not evidence.measurable(name):
            raise BadInput(f"method: {name} has no measurement to run")
        if space.missing and card.evidence() is not None:
            continue
        began = time.perf_counter()
        record = evidence.measure(name, TextProgress())
        record |= {
            "method": name,
            "claim": card.claim,
            "seconds": round(time.perf_counter() - began, 1),
            "code": evidence.code(name),
            "versions": versions(),
        }
        with replacing(target / card.family / f"{name}.json") as draft:
            draft.write_text(json.dumps(finite(record), indent=1, allow_nan=False) + "\n")
        print(
            f"{name}: {'holds' if record.get('holds') else 'does not hold'} here; "
            f"{record.get('note', '')} ({record['seconds']} s)"
        )
    return 0


def finite(value: Any) -> Any:
    """The record as strict JSON: numpy values as plain ones, infinities and NaN as words."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else finite(plain(value))


def versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    return {"python": platform.python_version()} | {
        p: version(p) for p in ("torch", "transformers", "numpy", "scipy")
    }


def kernels_command(arguments: list[str]) -> int:
    from workbench import kernels

    return kernels.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
