"""The package's files that modules reach by imports, and their hash.

Imports are read, not executed. A name imported from a package is looked up in its `__init__` and followed to
the module that defines it: the `__init__` counts as a file, what else it offers does not.
Imports for types only compute nothing.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
#: Modules that draw, list or tell, and compute nothing that is stored:
#: a file of this name anywhere, or a folder's.
NOT_COMPUTING = (
    "names",
    "commands",
    "index",
    "cli",
    "evidence",
    "export_html",
    "families",
    "figures",
    "overview",
    "registry",
    "reports",
    "studies.py",
)


@dataclass(frozen=True)
class Import:
    """`from module import name as bound`, or `import module` (name is then empty),
    with the statement's place in the file.
    """

    module: str
    name: str
    bound: str


@dataclass(frozen=True)
class Source:
    """A file as it was read: its hash, all its imports, and for each name defined at the top the names that
    definition uses.
    """

    digest: str
    imports: tuple[Import, ...]
    uses: dict[str, frozenset[str]]


def closure(
    module_names: Iterable[str],
    stop: Collection[str] = frozenset(),
    root: Path = PACKAGE,
    left_out: Collection[str] = NOT_COMPUTING,
) -> set[Path]:
    """Files of the package that these modules reach by imports, their own included.

    Modules in `stop` count as files and are not followed (a registry, say, of which only the chosen entries
    matter). `root` is the package's folder.
    """
    found: set[Path] = set()
    followed: set[str] = set()
    waiting = list(module_names)
    while waiting:
        name = waiting.pop()
        file = file_of(name, root)
        if file is None or name in followed or not computes(name, left_out):
            continue
        followed.add(name)
        found |= {file, *packages_of(name, root)}
        if name in stop or file.name == "__init__.py":
            continue
        for item in source_of(file).imports:
            for reached, files in definitions(item, root, left_out):
                found |= files
                waiting.append(reached)
    return found


def computes(module: str, left_out: Collection[str] = NOT_COMPUTING) -> bool:
    """False for what draws, lists or tells: a module or folder of a name in `left_out`."""
    parts = module.split(".")[1:]
    last = f"{parts[-1]}.py" if len(parts) == 1 else ""
    return not any(part in left_out for part in parts) and last not in left_out


def definitions(
    item: Import, root: Path, left_out: Collection[str] = NOT_COMPUTING, seen: frozenset[Import] = frozenset()
) -> Iterator[tuple[str, set[Path]]]:
    """Modules that define what is imported, each with the `__init__` files on the way to it."""
    full = f"{item.module}.{item.name}" if item.name else item.module
    if file_of(full, root) is not None:
        yield full, set()
        return
    file = file_of(item.module, root)
    if file is None or item in seen:
        return
    if file.name != "__init__.py":
        yield item.module, set()
        return
    if not computes(item.module, left_out):
        return
    source = source_of(file)
    wanted = {item.name} | source.uses.get(item.name, frozenset())
    yield item.module, {file}
    for further in source.imports:
        if further.bound in wanted:
            for name, files in definitions(further, root, left_out, seen | {item}):
                yield name, files | {file}


def file_of(module: str, root: Path) -> Path | None:
    """`workbench.pruning.prune` -> its file; None for modules of other packages."""
    parts = module.split(".")
    if parts[0] != PACKAGE.name:
        return None
    place = root.joinpath(*parts[1:])
    for file in (place / "__init__.py", place.with_suffix(".py")):
        if len(parts) > 1 and file.is_file():
            return file
    return root / "__init__.py" if len(parts) == 1 else None


def packages_of(module: str, root: Path) -> set[Path]:
    """The `__init__` files that importing a module runs."""
    parts = module.split(".")[1:-1]
    return {root.joinpath(*parts[:depth]) / "__init__.py" for depth in range(len(parts) + 1)}


def source_of(file: Path) -> Source:
    """A file's hash and imports, read again only when its time or size has changed."""
    state = file.stat()
    return _source(file, state.st_mtime_ns, state.st_size)


@functools.lru_cache(2048)
def _source(file: Path, changed: int, size: int) -> Source:
    text = file.read_bytes()
    tree = ast.parse(text)
    uses: dict[str, frozenset[str]] = {}
    for node in tree.body:
        used = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
        for name in names_of(node):
            uses[name] = used
    return Source(hashlib.sha256(text).hexdigest(), tuple(imports_of(tree)), uses)


def names_of(node: ast.stmt) -> list[str]:
    """What a statement at the top of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def imports_of(node: ast.AST) -> Iterator[Import]:
    """Imports anywhere in a file but under `if TYPE_CHECKING`."""
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for statement in node.orelse:
            yield from imports_of(statement)
        return
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, "", alias.asname or alias.name.split(".")[0])
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        for alias in node.names:
            yield Import(node.module, alias.name, alias.asname or alias.name)
    for part in ast.iter_child_nodes(node):
        yield from imports_of(part)


def digest(files: Iterable[Path], root: Path = PACKAGE, outside: Iterable[bytes] = ()) -> str:
    """Hash of files by their place in the package and what is in them, and of further texts."""
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(file.relative_to(root).as_posix().encode() + source_of(file).digest.encode())
    for text in outside:
        total.update(text)
    return total.hexdigest()[:16]
