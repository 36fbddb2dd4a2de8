"""Options of the command line: how their texts become values, and the ones that open a subject."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from workbench.errors import BadInput, did_you_mean
from workbench.values import number_of

SUBJECT_OPTIONS = {
    "data": "a CSV / JSONL / Parquet file, hf:ID, or random (shapes and speed only)",
    "text-column": "column of the text",
    "label-column": "column of the label",
    "image-column": "column of the image's path",
    "task": "how a batch becomes a loss, when it cannot be told from the checkpoint",
    "max-length": "tokens per example",
    "max-examples": "use at most this many rows of the data",
}
RUNS_OPTIONS = {
    "runs": "a table of finished runs (CSV, Parquet, JSONL, ...)",
    "columns": "own column names, as 'params=N,tokens=D,loss=val_loss'",
}
RUN_OPTIONS = {
    "out": "save the result in this folder",
    "export": "also write the changed model for other programs, in the folder of --out: gguf (llama.cpp), "
    "compressed-tensors (vLLM) or onnx",
    "overwrite": "replace files of the same names that no save has written; others stay",
    "no-cache": "run again even when this exact run is stored",
    "fresh": "do not go on from where an interrupted run of the same command stopped",
    "memory": "bytes that a run may hold, such as 2GB (default: 80 % of what is free); more is refused",
    "dry-run": "only say what the run would hold and how long it would take",
    "plugins": "Python files with entries of your own, separated by commas; they are run",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, exit code 2."""

    def error(self, message: str) -> Any:
        raise BadInput(message)


def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse, naming an unknown option and its nearest known one."""
    space, rest = parser.parse_known_args(arguments)
    for name, value in vars(space).items():
        if value == []:  # argparse takes the two dashes of `--option=--` for the end of the options
            setattr(space, name, "--")
    if rest:
        known = [
            o
            for action in parser._actions
            if action.help is not argparse.SUPPRESS
            for o in action.option_strings
        ]
        hint = did_you_mean(rest[0].split("=")[0], known)
        plain = [o.lstrip("-") for o in known if o.startswith("--") and o != "--help" and "." not in o]
        names = ", ".join(plain) + (
            "; a choice's as CHOICE.OPTION, see --help" if len(plain) < len(known) - 2 else ""
        )
        raise BadInput(f"{rest[0].lstrip('-')}: unknown field{'; ' + hint if hint else ''} (fields: {names})")
    return space


def add_texts(parser: argparse.ArgumentParser, options: dict[str, str]) -> None:
    for option, text in options.items():
        parser.add_argument(f"--{option}", help=text)


def files_in(text: str) -> list[str]:
    """The files that a value of `--plugins` names."""
    return [part.strip() for part in text.split(",") if part.strip()]


def subject_options(space: argparse.Namespace) -> dict[str, Any]:
    """What `workbench.subject` takes, of what was given."""
    found = {o.replace("-", "_"): getattr(space, o.replace("-", "_")) for o in SUBJECT_OPTIONS}
    found = {k: v for k, v in found.items() if v is not None}
    for number in ("max_length", "max_examples"):
        if number in found:
            field = number.replace("_", "-")
            value = number_of(found[number], field)
            if not isinstance(value, int):
                raise BadInput(f"{field}: {found[number]!r} is not a whole number")
            found[number] = value
    return found


def column_mapping(text: str | None) -> dict[str, str]:
    """'params=N,loss=val' -> {'params': 'N', 'loss': 'val'}."""
    if not text:
        return {}
    pairs = [part.partition("=") for part in text.split(",")]
    for ours, sign, theirs in pairs:
        if not sign or not ours.strip() or not theirs.strip():
            raise BadInput(f"columns: {text!r} is not a mapping; write it as params=N,tokens=D,loss=val_loss")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
