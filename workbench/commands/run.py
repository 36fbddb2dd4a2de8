"""`workbench run NAME`: an instrument, a published method, or an entry of an axis,
on a subject or on runs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.commands import options
from workbench.commands.export import check_export, check_place, exported
from workbench.commands.help_text import run_help
from workbench.commands.options import Parser, parse
from workbench.errors import BadInput, notice
from workbench.families import load_plugins
from workbench.progress import TextProgress
from workbench.storage import check_target
from workbench.storage.forecast import bytes_of
from workbench.unfinished.journal import kept
from workbench.values import read


def run(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(
            "workbench run NAME --subject SUBJECT [--field value ...]; "
            "NAME is an instrument, a method or an entry"
        )
        print("`workbench list` names them, `workbench run NAME --help` lists what one takes")
        return 0
    if not arguments or arguments[0].startswith("-"):
        raise BadInput(
            "instrument: is missing; workbench run NAME --subject SUBJECT; "
            "`workbench list` names what there is"
        )
    name, rest = arguments[0], arguments[1:]
    load_plugins(plugins_in(rest))
    if any(option in rest for option in ("-h", "--help")):
        print(help_on(name))
        return 0
    return run_steps(name, rest)


def plugins_in(arguments: Sequence[str]) -> list[str]:
    """The files that `--plugins` names; read before everything else, for they may add options."""
    found = ""
    for option, following in itertools.pairwise([*arguments, ""]):
        if option == "--plugins":
            found = following
        elif option.startswith("--plugins="):
            found = option.partition("=")[2]
    return options.files_in(found)


def help_on(name: str) -> str:
    """What an instrument, a method, or the instrument where an entry is chosen takes."""
    from workbench.index import current

    found = run_help(name, current())
    if found is not None:
        return found
    from workbench.names import in_words, recipe

    steps = recipe(name)
    index = current()
    found = run_help(steps[0][0], index)
    assert found is not None
    return f"{name} = {in_words(steps)}\n\n{found}"


def run_steps(name: str, arguments: Sequence[str]) -> int:
    from workbench.names import find, in_words, instruments_of, recipe, run_in_turn

    steps = recipe(name)
    classes = [find(instrument) for instrument, _ in steps]
    parser = Parser(prog=f"workbench run {name}", allow_abbrev=False)
    known = field_options(classes)
    fields = {name.replace("_", "-") for cls in classes for name in cls.parameters()}
    for option in known:
        old = option not in fields and "." not in option  # neither listed nor offered
        about = argparse.SUPPRESS if old else None
        parser.add_argument(f"--{option}", dest=f"field:{option}", default=argparse.SUPPRESS, help=about)
    options.add_texts(
        parser,
        options.SUBJECT_OPTIONS | {"subject": ""} if classes[0].on == "subject" else options.RUNS_OPTIONS,
    )
    parser.add_argument("--out")
    parser.add_argument("--export")
    parser.add_argument("--plugins")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--no-cache", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    if "memory" not in known:  # an instrument with a field of that name has no forecast of what it holds
        parser.add_argument("--memory")
    parser.add_argument("--dry-run", action="store_true")
    space = parse(parser, arguments)
    texts = {k.split(":", 1)[1]: v for k, v in vars(space).items() if k.startswith("field:")}
    given = {option.replace("-", "_"): read(text, known[option], option) for option, text in texts.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("always", FutureWarning)
        warnings.showwarning = told
        instruments = instruments_of(steps, given)
    memory = None if getattr(space, "memory", None) is None else bytes_of(space.memory)
    check_export(space.export, instruments, space.out)
    if space.out is not None and (reason := instruments[-1].held_back()):
        raise BadInput(reason)
    if space.out is not None:
        goal = check_target(space.out, overwrite=space.overwrite, files=("result.json", "table.parquet"))
        subject = getattr(space, "subject", None)
        if (
            subject
            and os.path.isdir(subject)
            and os.path.realpath(subject) == str(goal)
            and not space.overwrite
        ):
            raise BadInput(
                f"out: {space.out!r} is the folder of the subject, whose weights the result would replace; "
                "give another place, or --overwrite"
            )
        if earlier := saved_there(goal):
            told(f"out: {space.out!r} holds {earlier}, which this run's result will replace")
    if len(steps) > 1 or name != steps[0][0]:
        changed = "".join(f" --{option} {text}" for option, text in texts.items())
        print(f"{name} = {in_words(steps)}{', with' + changed if changed else ''}")
    on = opened(space, classes[0].on, memory)
    check_place(space.export, instruments, on, space.out, space.overwrite)
    if space.dry_run:
        return foretold(instruments, on, memory, cache=not space.no_cache)
    progress = TextProgress()
    cache, fresh = not space.no_cache, space.fresh
    for result in run_in_turn(instruments, on, progress, cache=cache, fresh=fresh, memory=memory):
        print(result.summary())
    print(
        result.leading().head(40).to_string(index=False, float_format=lambda v: f"{v:.5g}", max_colwidth=60)
    )
    for line in result.calibration():
        print(line)
    code = 0 if space.out is None else saved(result, space.out, space.overwrite)
    if space.export is not None and not code:
        code = exported(result, space.export, space.out, space.overwrite)
    return stopped(result, progress) or code if result.partial else code


def foretold(instruments: Sequence[Any], on: Any, memory: int | None, cache: bool) -> int:
    """Say what each step would hold and how long it would take; `BadInput` for one that does not fit."""
    from workbench.instruments import room_for

    for step, instrument in enumerate(instruments):
        for told in instrument.asks_beyond(on):
            notice(told)
        found = room_for(instrument, on, memory, tells=False).foretold
        if not step and (words := instrument.foretold_words(on)):
            print(f"{instrument.name()} {words}")
            continue
        if found is None:
            print(f"{instrument.name()}: what it holds and how long it takes is not known before it runs")
            continue
        if not step and cache and instrument.stored(on):
            print(f"{instrument.name()}: this run is stored already")
            continue
        print(f"{instrument.name()} {replace(found, seconds=instrument.foretold_seconds(on)).words()}")
    return 0


def saved_there(folder: Path) -> str:
    """What an earlier command has saved in a folder, in words; empty where there is none."""
    from workbench.results import Result

    try:
        found = Result.load(folder, open_subject=False)
    except BadInput:
        return ""
    model = " and its model" if (folder / "workbench.json").exists() else ""
    return f"a result of {found.instrument.name()}{model}"


def saved(result: Any, out: str, overwrite: bool) -> int:
    """Save what was computed and say so; the exit code."""
    import sys

    notes: list[str] = []
    try:
        place = result.save(out, overwrite=overwrite, told=notes.append)
    except BadInput as error:
        again = "" if result.partial or not result.instrument.cached else " (the cache keeps it)"
        text = str(error).removeprefix("out: ").removeprefix("folder: ")
        print(f"workbench: the result was computed{again} and is not saved: {text}", file=sys.stderr)
        return 1
    print(f"saved in {place}" + "".join(f" ({note})" for note in notes))
    return 0


def stopped(result: Any, progress: TextProgress) -> int:
    """Say how an interrupted run goes on; the exit code of a command that a signal ended, 0 without one."""
    if kept(result.provenance.get("key", "")):
        print("stopped: the same command goes on from here, and with --fresh from the beginning")
    elif progress.signal is not None:
        print("stopped before the end: the result is partial and is not kept in the cache")
    return 0 if progress.signal is None else 128 + progress.signal


def told(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one line of the command."""
    import sys

    print(f"workbench: {message}", file=sys.stderr)


def field_options(classes: Iterable[Any]) -> dict[str, Any]:
    """Every option of these instruments -> the type of its value: fields, options of entries
    (`saliency.damp`), and the names of one release ago.
    """
    from workbench.axis import axis_of

    found: dict[str, Any] = {}
    flat: dict[str, Any] = {}
    for cls in classes:
        for name, info in cls.parameters().items():
            axis = axis_of(info)
            found[name.replace("_", "-")] = str if axis else info.annotation
            for option, annotation in options_within(axis, name).items():
                found.setdefault(option, annotation)
                if option.count(".") == 1:
                    flat.setdefault(option.partition(".")[2], annotation)
        for old, new in cls.renamed().items():
            if old in options.SUBJECT_OPTIONS:  # on the command line it names the subject's
                continue
            old, new = old.replace("_", "-"), new.replace("_", "-")
            flat[old] = found.get(new, object)
            flat |= {old + k.removeprefix(new): v for k, v in found.items() if k.startswith(f"{new}.")}
    return flat | found


def options_within(axis: Any, path: str, around: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every option of the entries of `axis`, dotted, and of the entries that their options choose among,
    each axis once on the way -> the type of its value.
    """
    from workbench.axis import axis_of

    found: dict[str, Any] = {}
    for entry in axis.entries.values() if axis else ():
        for option, info in entry.options.parameters().items():
            inner, dotted = axis_of(info), f"{path}.{option}".replace("_", "-")
            found.setdefault(dotted, str if inner else info.annotation)
            if inner is not None and inner.kind not in around:
                within = options_within(inner, dotted, (*around, axis.kind))
                found |= {name: kind for name, kind in within.items() if name not in found}
    return found


def opened(space: argparse.Namespace, on: str, memory: int | None = None) -> Any:
    """The subject or the runs that the options name."""
    if on == "subject":
        if not space.subject:
            raise BadInput(
                "subject: is missing; give --subject NAME, FOLDER, a GGUF file, hub id or file.py:function"
            )
        from workbench.subjects import subject

        told = options.subject_options(space) | {"memory": memory}
        return subject(space.subject, **told, progress=TextProgress())
    if not space.runs:
        raise BadInput("runs: is missing; give --runs FILE")
    from workbench.scaling import load_runs

    return load_runs(space.runs, columns=options.column_mapping(space.columns))
