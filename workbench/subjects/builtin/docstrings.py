"""Docstrings of installed packages, labelled by package:
a classification data set that every installation has.

Files are parsed with `ast`, never imported. The unit of splitting is the module (one file): all of its
docstrings are in one split, chosen by a hash of its path, so a test text never has a sibling in train. Texts
that say the same in other modules are kept once, and the packages' own names are replaced, so the label has
to be told from what the text is about.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path

from workbench.errors import BadInput
from workbench.subjects.builtin.corpora import split_of

#: The classes. All are dependencies of the project, so an installation that can train has them.
PACKAGES = ("numpy", "pandas", "plotly", "scipy", "sklearn", "sympy", "torch", "transformers")

#: Names that would give the label away, replaced by the word "package" wherever they stand as a word
#: or a prefix.
GIVEAWAYS = re.compile(
    r"\b(?:numpy|ndarray|pandas|dataframe|plotly|scipy|scikit[- "
    r"]learn|sklearn|sympy|pytorch|torch\w*|transformers|hugging ?face)\b"
    r"|\b(?:np|pd|px|go)(?=\.)",
    re.IGNORECASE,
)

#: Folders with other people's code or with tests.
_SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "vendored", "externals", "extern", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """One docstring: its package is the label, its module (path within site-packages) decides the split."""

    text: str
    package: str
    module: str
    split: str


def collect(limits: dict[str, int], packages: Sequence[str] = PACKAGES, per_module: int = 16) -> list[Text]:
    """At most `limits[split]` texts of every package and split, at most `per_module` from one module.

    Modules are visited in the order of a hash of their path, and parsing stops when the limits are met:
    a random, reproducible subset without reading 150 MB of source.
    Raises `BadInput` for a package that is not installed.
    """
    seen: set[str] = set()
    found: list[Text] = []
    for package in packages:
        counts: Counter[str] = Counter()
        for module, path in modules(package):
            split = split_of(module, validation=0.1, test=0.2)
            if counts[split] >= limits.get(split, 0):
                continue
            taken = 0
            for docstring in module_docstrings(path):
                text, key = clean(docstring), duplicate_key(docstring)
                if (
                    len(text.split()) < 8
                    or key in seen
                    or taken == per_module
                    or counts[split] == limits[split]
                ):
                    continue
                seen.add(key)
                found.append(Text(text, package, module, split))
                counts[split], taken = counts[split] + 1, taken + 1
            if all(counts[name] >= limit for name, limit in limits.items()):
                break
    return found


def modules(package: str) -> list[tuple[str, Path]]:
    """(name, file) of every module of an installed package, in the order of the hash of the name."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            f"subject: the package {package!r} is not installed; "
            f"'minilm-docstrings' needs {', '.join(PACKAGES)}"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    named = {path.relative_to(root.parent).as_posix(): path for path in root.rglob("*.py")}
    kept = [name for name in named if not _SKIPPED_FOLDERS.intersection(name.split("/"))]
    return [
        (name, named[name]) for name in sorted(kept, key=lambda name: hashlib.sha256(name.encode()).digest())
    ]


def module_docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a module, its classes and functions, in the order of `ast.walk`."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and files for other Python versions
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def clean(docstring: str) -> str:
    """White space to single blanks and the packages' names to the word "package"."""
    return GIVEAWAYS.sub("package", " ".join(docstring.split()))


def duplicate_key(docstring: str) -> str:
    """The first 32 plain lower-case words: equal for texts that differ in names, numbers or layout only.

    Generated and copied docstrings ("Configuration of the BERT model", "... of the GPT-2 model") share it.
    """
    words = re.findall(r"(?<![\w.])[a-z]{2,}(?![\w.]*\w)", docstring)
    return " ".join(words[:32])


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The installed version of the distribution that carries each package."""
    owners = packages_distributions()
    return {package: version(owners[package][0]) if package in owners else "absent" for package in packages}
