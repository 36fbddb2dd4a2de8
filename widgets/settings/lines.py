"""Values of any type as a line of text: lists with commas, mappings with colons, in YAML's words."""

from __future__ import annotations

import math
import types
from typing import Any, Union, get_args, get_origin

import yaml

from workbench.errors import BadInput
from workbench.values import Parameters, reads_otherwise

BLANKS = " \t\r\n"  # white space to YAML; a no-break space is text


def holds(kind: Any) -> tuple[bool, bool]:
    """Whether a field of this type holds a list, and whether it holds a mapping."""
    listing = get_origin(kind) in (list, tuple, set) or kind in (list, tuple)
    return listing, kind is dict or get_origin(kind) is dict


def from_line(text: str, kind: Any, name: str) -> Any:
    """The value that a line of text stands for, brackets and braces added where they are left out."""
    listing, mapping = holds(kind)
    line = text.strip(BLANKS)
    if not line:
        return [] if listing else {} if mapping else None
    if listing and not line.startswith("["):
        line = f"[{line}]"
    if mapping and not line.startswith("{"):
        line = f"{{{line}}}"
    try:
        value = yaml.load(line, Parameters)
    except yaml.YAMLError:
        advice = "write values separated by commas, and texts with special characters in quotes"
        raise BadInput(f"{name}: {line!r} cannot be read; {advice}") from None
    a_text = str in get_args(kind) and get_origin(kind) in (Union, types.UnionType)
    return line if a_text and isinstance(value, str) and line[0] not in "'\"" else value


class Lines(yaml.SafeDumper):
    """Puts a text in quotes that `Parameters` would read as something else, `0E0` as a number."""


def _as_text(dumper: Lines, text: str) -> yaml.Node:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="'" if reads_otherwise(text) else None
    )


Lines.add_representer(str, _as_text)


def as_line(value: Any, kind: Any) -> str:
    """The line that `from_line` reads as this value."""
    if value is None:
        return ""
    line = yaml.dump(
        value, Dumper=Lines, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False
    ).strip(BLANKS)
    line = line.removesuffix("...").strip(BLANKS)
    bare = any(holds(kind)) and not line.startswith(("[[", "[{", "{{"))
    return line[1:-1] if bare else line
