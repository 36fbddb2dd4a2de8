"""A merge written from checkpoint to checkpoint: a few tensors are held at a time, and no model is built."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.arithmetic.merging.merging import MERGE, Setting, merged
from workbench.arithmetic.models import side_by_side
from workbench.arithmetic.sources import Source, of_folder
from workbench.errors import BadInput
from workbench.progress import Progress, TextProgress
from workbench.storage import replacing
from workbench.subjects.checkpoint_files import check_folder, tensors_in
from workbench.subjects.stored import NAMES, write

TYPES = {name: dtype for dtype, name in NAMES.items()}
#: What a checkpoint has beside its weights.
BESIDE = (".json", ".txt", ".model", ".jinja")


def merge_checkpoints(
    base: str | os.PathLike[str],
    parents: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    method: str = "uniform",
    strength: float = 1.0,
    seed: int = 0,
    keep_zeros: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Merge folders of safetensors into the folder `out`, by a method that asks nothing of data, in the
    base's types; what differs between the models' heads is the base's. `options` are the method's own.

    `BadInput` for a method that needs data, for other architectures, and for numbers that are not finite.
    """
    chosen = MERGE.chosen(method, **options)
    if chosen.entry.needs:
        raise BadInput(f"method: {method} needs {chosen.entry.needs}; run the instrument merge on a subject")
    folders = [Path(each) for each in (base, *parents)]
    check_folder(folders[0])
    stored = tensors_in(folders[0])
    models = side_by_side(
        taken(folders[0], list(stored)), [taken(f, list(stored)) for f in folders[1:]], seed
    )
    progress = progress or TextProgress()
    rule = chosen.value(Setting(models, (), "", 1, lambda found: 0.0, progress), chosen.options)
    done = 0

    def value_of(name: str) -> Tensor:
        nonlocal done
        done += 1
        progress.show("merge", done, len(stored))
        if name not in models.names or not TYPES[stored[name].dtype].is_floating_point:
            return models.base.read(name)
        value = merged(models.parts(name), rule, strength, keep_zeros)
        if not bool(torch.isfinite(value).all()):
            raise BadInput(f"parents: {name} holds nan or inf; repair the checkpoint")
        return value.to(TYPES[stored[name].dtype])

    with replacing(out, overwrite=overwrite, field="out") as draft:
        draft.mkdir()
        for file in folders[0].iterdir():
            if (
                file.suffix in BESIDE
                and not file.name.endswith("index.json")
                and file.name != "workbench.json"
            ):
                shutil.copyfile(file, draft / file.name)
        told = {name: (each.dtype, list(each.shape)) for name, each in stored.items()}
        write(draft / "model.safetensors", told, value_of)
    return Path(out)


def taken(folder: Path, names: Sequence[str]) -> Source:
    found = of_folder(folder, names)
    if found is None:
        raise BadInput(
            f"parents: {str(folder)!r} has other tensors in its blocks than the base; give its kin"
        )
    return found
