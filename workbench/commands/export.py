"""`--export`: the model of a run written for other programs, beside its result."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench.errors import BadInput
from workbench.storage import check_target
from workbench.storage.forecast import in_words


def check_export(kind: str | None, steps: Sequence[Any], out: str | None) -> None:
    """`BadInput` for an export that the options alone say cannot be."""
    if kind is None:
        return
    from workbench.quantization.exports import check_settings

    check_settings(kind, steps)
    if out is None:
        raise BadInput(f"export: {kind} needs a folder to write to; give --out FOLDER")


def check_place(kind: str | None, steps: Sequence[Any], on: Any, out: str | None, overwrite: bool) -> None:
    """The same for the subject, and for the place where the file goes."""
    if kind is None or out is None:
        return
    from workbench.quantization.exports import check_on, export_called

    check_on(kind, steps, on)
    export = export_called(kind)
    check_target(export.place(out, on.name), overwrite=overwrite, folder=export.folder, field="export")


def exported(result: Any, kind: str, out: str, overwrite: bool) -> int:
    """Write the model and say so; the exit code."""
    from workbench.quantization.exports import export_called

    export = export_called(kind)
    if result.partial:
        print(f"workbench: a partial result is not exported as {kind}", file=sys.stderr)
        return 0
    notes: list[str] = []
    goal = export.place(out, result.subject.name)
    try:
        place = export.write(result.subject, goal, overwrite=overwrite, told=notes.append)
    except BadInput as error:
        print(f"workbench: the result is saved and is not exported: {error}", file=sys.stderr)
        return 1
    print(f"exported as {kind}: {place} ({'; '.join([in_words(size_of(place)), *notes])})")
    return 0


def size_of(place: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    files = [place] if place.is_file() else place.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
