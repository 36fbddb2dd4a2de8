"""The documentation's source: the pages written by hand, and those that the code itself declares.

    python docs/generate.py build      # build/pages and build/zensical.toml
    zensical build -f build/zensical.toml

`generate(folder)` writes the API page of every name in a package's `__all__`, and the tables of instruments,
methods and axes from the live registries. Nothing is downloaded,
and no model is run unless examples are asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shutil
import tomllib
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from markup import cell, code, code_cell, first_sentence, formula, prose, table, with_formulas
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import workbench
from workbench.field_text import bounds_text
from workbench.instruments import Instrument
from workbench.names import Method
from workbench.subjects.registry import BUILTINS

HERE = Path(__file__).parent
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
#: Reports that are run and shown as examples: page name -> notebook, parameters, what it shows.
EXAMPLES: dict[str, tuple[str, dict[str, Any], str]] = {
    "prune-digits-vit": (
        "instrument",
        {"instrument": "prune", "subject": "digits-vit", "settings": {"sparsity": 0.7}},
        (
            "One instrument, run without a screen: oBERT removes 70 % of the weights of a small vision "
            "transformer."
        ),
    ),
    "spectrum-digits-vit": (
        "spectrum",
        {"subject": "digits-vit"},
        (
            "The Hessian's spectrum of the same model before and after pruning, its layers, "
            "batches and learning rates."
        ),
    ),
}


def generate(folder: Path, examples: bool = False) -> dict[str, Path]:
    """Write the site's source into `folder` and return the API page of every public name
    (`package.name` -> file).
    """
    pages = folder / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(HERE / "pages", pages)
    for page in pages.glob("*.md"):
        page.write_text(with_formulas(page.read_text(encoding="utf-8")), encoding="utf-8")
    for picture in HERE.glob("*.png"):
        shutil.copy(picture, pages / picture.name)
    (pages / "tables").mkdir()
    (pages / "tables" / "instruments.md").write_text(instruments_page(), encoding="utf-8")
    (pages / "tables" / "subjects.md").write_text(subjects_page(), encoding="utf-8")
    (pages / "tables" / "methods.md").write_text(methods_page(), encoding="utf-8")
    (pages / "tables" / "axes.md").write_text(axes_page(), encoding="utf-8")
    written = api_pages(pages / "api")
    if examples:
        run_examples(pages / "examples")
    (pages / "examples.md").write_text(examples_page(examples), encoding="utf-8")
    (folder / "zensical.toml").write_text(configuration(), encoding="utf-8")
    return written


def configuration() -> str:
    """`zensical.toml` with the reference in its navigation."""
    text = (HERE / "zensical.toml").read_text(encoding="utf-8")
    reference = ['{"Overview" = "api/index.md"}'] + [f'{{"{p}" = "api/{p}/index.md"}}' for p in packages()]
    found = text.replace('{"API" = []}', '{"API" = [' + ", ".join(reference) + "]}")
    tomllib.loads(found)
    return found


# ---- API ---------------------------------------------------------------------------------------------------


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


# ---- tables ------------------------------------------------------------------------------------------------


def instruments_page() -> str:
    links = {cls: link.replace("../", "../api/", 1) for cls, link in api_links().items()}
    rows = []
    for name, cls in workbench.catalog().items():
        package = ".".join(cls.__module__.split(".")[:2])
        shown = f"`{package.removeprefix('workbench.')}.{cls.__name__}`"
        linked = f"[{shown}]({links[cls]})" if cls in links else shown
        changes = "yes" if cls.changes_model else ""
        rows.append((f"`{name}`", linked, cls.on, changes, cell(first_sentence(cls))))
    head = ("command", "class", "works on", "changes the model", "what it does")
    return (
        f"# Instruments\n\n`workbench run COMMAND --help` lists the fields of one.\n\n{table(head, rows)}\n"
    )


def subjects_page() -> str:
    rows = [(f"`{name}`", cell(note)) for name, (_, _, note) in BUILTINS.items()]
    return (
        "# Subjects\n\n"
        "Built-in subjects need no download. A folder, a hub id, `file.py:function` and an `nn.Module` are "
        "subjects too: see [`subject`](../api/workbench/subject-function.md).\n\n"
        f"{table(('name', 'what it is'), rows)}\n"
    )


def methods_page() -> str:
    parts = [
        "# Methods",
        "Published methods, with what their source claims and what was measured here: "
        "equal budget, tuned on validation, "
        "reported on test. A claim that does not hold at this scale is shown as not holding.",
    ]
    families: dict[str, list[Method]] = {}
    for card in workbench.methods().values():
        families.setdefault(card.family, []).append(card)
    for family, cards in families.items():
        rows = []
        for card in cards:
            name = f"`{card.name}`<br>{cell(card.title)}"
            what = (cell(card.source), formula(card.formula), card.needs, cell(card.claim))
            rows.append((name, *what, found_here(card)))
        head = ("method", "source", "formula", "needs", "claim", "measured here")
        parts += [f"## {family.capitalize()}", table(head, rows)]
    return "\n\n".join(parts) + "\n"


def found_here(card: Method) -> str:
    """What the stored measurement says of the claim, and the subject it was measured on."""
    subject = (card.evidence() or {}).get("subject")
    return card.verdict() + (f", on {cell(subject)}" if isinstance(subject, str) and subject else "")


def axes() -> dict[str, Any]:
    """The registered axes (none in a version without them)."""
    if importlib.util.find_spec("workbench.axis") is None:
        return {}
    module = importlib.import_module("workbench.axis")
    workbench.catalog()  # importing the families registers their choices
    return dict(module.axes()) if hasattr(module, "axes") else {}


def axes_page() -> str:
    parts = [
        "# Axes",
        "A method is a choice on each axis of its family; an instrument's fields name the axes. "
        "A choice of one's own "
        "is [added in twenty lines](../add-a-method.md).",
    ]
    registered = axes()
    for kind, axis in registered.items():
        rows = []
        for entry in axis.entries.values():
            options = "; ".join(option_text(name, info) for name, info in entry.options.model_fields.items())
            traits = ", ".join(sorted(entry.traits))
            rows.append(
                (
                    f"`{entry.name}`",
                    formula(entry.formula),
                    cell(entry.source),
                    cell(entry.needs),
                    cell(traits),
                    options,
                )
            )
        head = ("choice", "formula", "source", "needs", "traits", "options")
        parts += [f"## {kind.capitalize()}", table(head, rows)]
    if not registered:
        parts += ["## Choices by instrument", table(("instrument", "field", "choices"), choice_rows())]
    return "\n\n".join(parts) + "\n"


def choice_rows() -> list[tuple[str, ...]]:
    return [
        (f"`{name}`", f"`{field}`", accepted(info))
        for name, cls in workbench.catalog().items()
        for field, info in cls.parameters().items()
        if get_origin(info.annotation) is Literal and len(get_args(info.annotation)) > 2
    ]


def option_text(name: str, info: FieldInfo) -> str:
    default = "required" if info.is_required() else repr(info.get_default(call_default_factory=True))
    return f"`{name}` ({code_cell(default)}): {cell(info.description or '')}"


# ---- examples ----------------------------------------------------------------------------------------------


def run_examples(folder: Path) -> None:
    """Run the example reports and keep their pages."""
    from workbench import reports

    folder.mkdir()
    for page, (notebook, parameters, _) in EXAMPLES.items():
        done = reports.render(notebook, parameters, folder / page)
        if done.error:
            raise SystemExit(f"example {page}: {done.error}")
        done.html.rename(folder / f"{page}.html")
        shutil.rmtree(folder / page)


def examples_page(made: bool) -> str:
    rows = []
    for page, (notebook, parameters, about) in EXAMPLES.items():
        shown = f"[{page}](examples/{page}.html)" if made else page
        settings = ", ".join(f"{k}={v!r}" for k, v in parameters.items())
        rows.append((shown, f"`{notebook}`", code_cell(settings), cell(about)))
    head = ("report", "notebook", "parameters", "what it shows")
    return (
        "# Examples\n\n"
        "Each is a notebook of the project, run without a screen with `workbench report`; "
        "one file that needs no network."
        f"\n\n{table(head, rows)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the documentation's source.")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--examples", action="store_true", help="run the example reports too (about a minute)"
    )
    space = parser.parse_args()
    written = generate(space.folder, space.examples)
    print(
        f"wrote {len(written)} API pages, {len(workbench.catalog())} instruments, "
        f"{len(workbench.methods())} methods"
    )


if __name__ == "__main__":
    main()
