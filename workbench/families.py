"""The families of methods; importing one registers its instruments and changes."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterable

from workbench.errors import BadInput

PLUGINS = "WORKBENCH_PLUGINS"  # files of a user, separated as in PATH
FAMILIES = ("curvature", "pruning", "quantization", "latency", "training", "scaling")


@functools.lru_cache(1)
def import_families() -> None:
    """Import every family that is there; importing registers its instruments and changes."""
    for family in FAMILIES:
        if importlib.util.find_spec(f"workbench.{family}") is not None:
            importlib.import_module(f"workbench.{family}")
    load_plugins(part for part in os.environ.get(PLUGINS, "").split(os.pathsep) if part)


def load_plugins(paths: Iterable[str]) -> None:
    """Run these Python files, which register entries of their own, here and in the processes started here."""
    known = [part for part in os.environ.get(PLUGINS, "").split(os.pathsep) if part]
    wanted = [os.path.abspath(path) for path in paths]
    os.environ[PLUGINS] = os.pathsep.join(dict.fromkeys([*known, *wanted]))
    for path in wanted:
        load_plugin(path)


def load_plugin(path: str) -> None:
    """Import one file by its path, once."""
    name = f"workbench_plugin_{hashlib.sha256(path.encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if not os.path.isfile(path) or spec is None or spec.loader is None:
        raise BadInput(f"plugins: {path!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise BadInput(f"plugins: {path} cannot be run: {type(error).__name__}: {error}") from error
