"""The pages of the reference: one for every name that a package publishes."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from markup import cell, code, code_cell, first_sentence, prose, table
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from workbench.field_text import bounds_text
from workbench.instruments import Instrument

#: The reference begins with these; further packages with an `__all__` follow in the order of their names.
FIRST = (
    "workbench",
    "workbench.subjects",
    "workbench.curvature",
    "workbench.pruning",
    "workbench.quantization",
    "workbench.training",
    "workbench.scaling",
)


@functools.cache
def packages() -> tuple[str, ...]:
    """The packages that publish names: those with an `__all__`."""
    found = ["workbench", "widgets"]
    for root in ("workbench", "widgets"):
        folders = importlib.import_module(root).__path__
        found += [item.name for item in pkgutil.walk_packages(folders, f"{root}.") if item.ispkg]
    named = sorted(name for name in found if getattr(importlib.import_module(name), "__all__", None))
    return tuple(sorted(named, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST)))


def public_names(package: str) -> list[str]:
    """The names a package publishes: its `__all__`."""
    return sorted(importlib.import_module(package).__all__, key=lambda name: (name.lower(), name))


def page_name(name: str, names: Iterable[str]) -> str:
    """The page of `name`; functions and constants that differ from a class in capitals only get pages of
    other names.
    """
    alone = sum(other.lower() == name.lower() for other in names) == 1
    if alone:
        return name
    if name == name.upper():
        return f"{name}-constant"
    return f"{name}-function" if name == name.lower() else name


def api_pages(folder: Path) -> dict[str, Path]:
    written: dict[str, Path] = {}
    links = api_links()
    rows = []
    for package in packages():
        module = importlib.import_module(package)
        names = public_names(package)
        (folder / package).mkdir(parents=True)
        entries = []
        for name in names:
            value = getattr(module, name)
            file = folder / package / f"{page_name(name, names)}.md"
            file.write_text(api_page(package, name, value, links), encoding="utf-8")
            written[f"{package}.{name}"] = file
            entries.append((f"[`{name}`]({file.name})", kind_of(value), cell(first_sentence(value))))
        (folder / package / "index.md").write_text(
            f"# {package}\n\n{prose(module.__doc__)}\n\n{table(('name', 'kind', 'what it is'), entries)}\n",
            encoding="utf-8",
        )
        about = cell((module.__doc__ or "").strip().splitlines()[0])
        rows.append((f"[`{package}`]({package}/index.md)", str(len(names)), about))
    (folder / "index.md").write_text(
        (
            "# API\n\n"
            "Every name that a package publishes has a page. Anything else may change without notice.\n\n"
        )
        + table(("package", "names", "what it holds"), rows)
        + "\n",
        encoding="utf-8",
    )
    return written


def api_links() -> dict[type, str]:
    """Public class -> its page, relative to a page of any package."""
    links: dict[type, str] = {}
    for package in packages():
        module, names = importlib.import_module(package), public_names(package)
        for name in names:
            value = getattr(module, name)
            if isinstance(value, type):
                links.setdefault(value, f"../{package}/{page_name(name, names)}.md")
    return links


def kind_of(value: Any) -> str:
    if isinstance(value, type):
        return "instrument" if issubclass(value, Instrument) and value is not Instrument else "class"
    return "function" if callable(value) else "data"


def api_page(package: str, name: str, value: Any, links: Mapping[type, str]) -> str:
    parts = [f"# {name}", f"`{package}.{name}` ({kind_of(value)})"]
    if isinstance(value, type):
        parts += class_parts(name, value, links)
    elif callable(value):
        parts += [code(f"{name}{signature(value)}"), prose(inspect.getdoc(value))]
    else:
        about = inspect.getdoc(value) if inspect.getdoc(value) != inspect.getdoc(type(value)) else ""
        parts += [f"A `{type(value).__name__}`.", prose(about)]
        if isinstance(value, Mapping):
            parts.append("Its keys: " + ", ".join(f"`{key}`" for key in value) + ".")
    return "\n\n".join(part for part in parts if part) + "\n"


def class_parts(name: str, cls: type, links: Mapping[type, str]) -> list[str]:
    parts = []
    bases = [f"[`{base.__name__}`]({links[base]})" for base in cls.__mro__[1:] if base in links]
    if bases:
        parts.append("Based on " + ", ".join(bases) + ".")
    fields: list[tuple[str, ...]] = []
    if issubclass(cls, Instrument) and cls is not Instrument:
        on = "--runs FILE" if cls.on == "runs" else "--subject SUBJECT"
        parts.append(code(f"workbench run {cls.name()} {on}", "text"))
    elif not issubclass(cls, BaseModel):
        parts.append(code(f"{name}{signature(cls)}"))
    parts.append(prose(inspect.getdoc(cls)))
    if issubclass(cls, BaseModel):
        fields = fields_of(cls)
        parts += ["## Fields", table(("field", "default", "accepted", "unit", "meaning"), fields)]
    elif dataclasses.is_dataclass(cls):
        fields = [
            (f"`{f.name}`", code_cell(f.type), code_cell(default_of(f))) for f in dataclasses.fields(cls)
        ]
        parts += ["## Fields", table(("field", "type", "default"), fields)]
    members = list(members_of(cls))
    if members:
        parts.append("## Methods")
    for member, function, marks in members:
        parts += [
            f"### {member}",
            code(f"{marks}{member}{signature(function)}"),
            prose(inspect.getdoc(function)),
        ]
    return parts


def members_of(cls: type) -> Iterable[tuple[str, Callable[..., Any], str]]:
    """Public methods and properties that the class or a class of the project below it defines:
    name, function, marks.
    """
    seen: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] not in ("workbench", "widgets"):
            continue
        if base is Instrument and cls is not Instrument:  # described on its own page
            continue
        for name, found in vars(base).items():
            if name.startswith("_") or name in seen or name.startswith("model_"):
                continue
            marks = ""
            if isinstance(found, (classmethod, staticmethod)):
                marks, found = f"@{type(found).__name__}\n", found.__func__
            elif isinstance(found, property):
                marks, found = "@property\n", found.fget
            elif hasattr(found, "func") and not inspect.isfunction(found):
                marks, found = "@cached_property\n", found.func
            if inspect.isfunction(found):
                seen.add(name)
                yield name, found, marks


def signature(value: Callable[..., Any]) -> str:
    try:
        found = str(inspect.signature(value))
    except (TypeError, ValueError):
        return "(...)"
    found = re.sub(r" at 0x[0-9a-f]+", "", found).replace("'", '"')
    found = re.sub(r'(: |-> )"([^"]+)"', r"\1\2", found)  # annotations that are kept as text
    return found if len(found) < 90 else split_signature(found)


def split_signature(text: str) -> str:
    """One parameter a line."""
    depth, at, parts = 0, 1, []
    for i, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if (sign == "," and depth == 1) or (sign == ")" and depth == 0):
            parts.append(text[at:i].strip())
            at = i + 1
            if sign == ")":
                break
    return "(\n" + "".join(f"    {part},\n" for part in parts if part) + ")" + text[at:]


def fields_of(cls: type[BaseModel]) -> list[tuple[str, ...]]:
    """One row a field: name, default, what is accepted, unit, meaning."""
    declared = cls.parameters() if issubclass(cls, Instrument) else cls.model_fields
    rows = []
    for name, info in declared.items():
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        default = (
            "required" if info.is_required() else code_cell(repr(info.get_default(call_default_factory=True)))
        )
        unit = cell(str(extra.get("unit") or ""))
        rows.append((f"`{name}`", default, accepted(info), unit, cell(info.description or "")))
    return rows


def accepted(info: FieldInfo) -> str:
    """What a field accepts: its choices, or its type and bounds."""
    if get_origin(info.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(info.annotation))
    return ", ".join(code_cell(text) for text in (annotation(info.annotation), bounds_text(info)) if text)


def annotation(kind: Any) -> str:
    if isinstance(kind, type) and not isinstance(kind, types.GenericAlias):
        return kind.__name__
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(kind))


def default_of(item: dataclasses.Field[Any]) -> str:
    if item.default is not dataclasses.MISSING:
        return re.sub(r" at 0x[0-9a-f]+", "", repr(item.default))
    return f"{annotation(item.default_factory)}()" if item.default_factory is not dataclasses.MISSING else ""
