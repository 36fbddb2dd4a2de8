"""The code that a result depends on: the package's files that its instrument's class reaches by imports,
the user's code that it is given, and the hash of both.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from workbench.keys import live_code
from workbench.keys.imports import NOT_COMPUTING, PACKAGE, closure, digest

__all__ = ["NOT_COMPUTING", "PACKAGE", "closure", "code_version", "digest"]


def code_version(cls: type, entries: Iterable[object] = (), root: Path = PACKAGE) -> str:
    """Hash of the code that `cls` and the chosen `entries` of its axes reach: a changed routine never answers
    from an old result.

    What is defined outside the package and outside the installed libraries adds its own code: see
    `workbench.keys.live_code`.
    """
    modules: list[str] = []
    outside: list[object] = []
    for defined in (*cls.__mro__, *entries):
        home = getattr(defined, "__module__", None) or type(defined).__module__
        if home.split(".")[0] == PACKAGE.name:
            modules.append(home)
        else:
            outside.append(defined)
    return digest(closure(modules, root=root), root, [live_code.digest_of(outside, root).encode()])
