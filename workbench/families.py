"""The families of methods, and a user's own files; importing one registers its instruments,
changes and the entries of its axes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from workbench.errors import BadInput, said

FAMILIES = (
    "curvature",
    "pruning",
    "quantization",
    "latency",
    "training",
    "scaling",
    "measures",
    "arithmetic",
)
#: Environment variable: Python files of the user's own, separated as in PATH. Reports and worker processes
#: inherit it, so that what is registered here is known there.
PLUGINS = "WORKBENCH_PLUGINS"


def import_families() -> None:
    """Import every family that is there, then the plugins; importing registers what they define."""
    _import_own()
    import_plugins()


@functools.lru_cache(1)
def _import_own() -> None:
    for family in FAMILIES:
        if importlib.util.find_spec(f"workbench.{family}") is not None:
            importlib.import_module(f"workbench.{family}")


def own_files() -> list[str]:
    """The files that the environment names."""
    return [part for part in os.environ.get(PLUGINS, "").split(os.pathsep) if part]


def load_plugins(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Import these files too, now and in every process that is started from here."""
    files = [str(Path(path).absolute()) for path in paths]
    for file in files:
        import_plugin(file)
    if files:
        os.environ[PLUGINS] = os.pathsep.join(dict.fromkeys([*own_files(), *files]))


def import_plugins() -> None:
    """Import the files that the environment names."""
    for file in own_files():
        import_plugin(file)


def import_plugin(path: str | os.PathLike[str]) -> None:
    """Import one file, once. `BadInput` names the file and what its error says."""
    file = Path(os.path.realpath(path))
    name = module_name(file)
    if name in sys.modules:
        return
    if file.suffix != ".py" or not os.path.isfile(file):
        raise BadInput(f"plugins: {str(path)!r} is not a Python file; give the path of a .py file")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if not isinstance(error, (Exception, SystemExit)):
            raise
        raise BadInput(f"plugins: {str(path)!r} failed: {of_own_code(error, file)}") from error


def of_own_code(error: BaseException, file: Path) -> str:
    """What a user's own file raised, and in which of its lines."""
    first = (said(error).strip().splitlines() or ["no message"])[0]
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)
    ]
    return f"{type(error).__name__}: {first}" + (f" (line {lines[-1]})" if lines else "")


def module_name(file: Path) -> str:
    """A name that a plugin's path alone decides: what is pickled in one process is found in another."""
    stem = re.sub(r"\W", "_", file.stem)
    return f"workbench_plugin_{stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
