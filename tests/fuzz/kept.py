"""Loaders of what the workbench keeps: results, its cache, checkpoints of trainings, ledgers of sweeps,
records of evidence, patterns of experts.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import workbench
from tests.fuzz import checkpoint_folders, mutation
from tests.fuzz.campaign import Case, Drawing, Odd
from tests.fuzz.models import RANDOM, changed_file, checkpoint, copied
from tests.fuzz.tables import rows_changed
from tests.unfinished.stopping import Stopped
from workbench.progress import Progress
from workbench.results import Result
from workbench.storage import cache_folder
from workbench.storage.writing import MANIFEST


def listed_again(folder: Path) -> None:
    """The list of a save says what its files are now, so that damage reaches what reads them."""
    listing = json.loads((folder / MANIFEST).read_text())
    for name, entry in listing["files"].items():
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(listing))


def computed(root: Path) -> list[Path]:
    """Saved results of four instruments: tables, arrays, of runs and of subjects."""
    from tests.fuzz.tables import table
    from workbench.curvature import WeightSpectrum
    from workbench.scaling import ScalingFit
    from workbench.scaling.runs import Runs

    on = workbench.subject(checkpoint(root, "bert"), **RANDOM)
    runs = Runs.from_table(table().drop(columns=["status", "seed"]))
    results = {
        "spectrum": WeightSpectrum().run(on, Progress(), cache=False),
        "fit": ScalingFit(resamples=20).run(runs, Progress(), cache=False),
    }
    return [result.save(root / name) for name, result in results.items()]


def results(root: Path) -> Drawing:
    """Folders of saved results, with the list of their files made good, gone or as it was."""
    wholes = computed(root)
    place = root / "damaged"

    def opened() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = Result.load(place)
            assert found.summary() and found._repr_html_()

    def draw_case(draw: random.Random) -> Case:
        copied(draw.choice(wholes), place)
        files = [f for f in sorted(place.iterdir()) if f.is_file()]
        file = draw.choices(files, [5 if f.name == "result.json" else 1 for f in files])[0]
        told = changed_file(draw, file)
        what = draw.random()
        if file.name != MANIFEST and what < 0.6:
            listed_again(place)
        elif file.name != MANIFEST and what < 0.8:
            (place / MANIFEST).unlink()
        return told, opened

    return draw_case


def cached(root: Path) -> Drawing:
    """Slots of the cache: what is damaged is computed again, `workbench results` lists and clears it."""
    from tests.fuzz.tables import table
    from workbench.commands.results import results as command
    from workbench.instruments import from_slot
    from workbench.scaling import ScalingFit
    from workbench.scaling.runs import Runs

    runs = Runs.from_table(table().drop(columns=["status", "seed"]))
    ScalingFit(resamples=20).run(runs, Progress())
    (slot,) = (cache_folder() / "results").iterdir()
    whole = Path(shutil.copytree(slot, root / "whole"))

    def opened(clearing: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from_slot(slot)
            command(["--clear", "damaged"] if clearing else [])

    def draw_case(draw: random.Random) -> Case:
        copied(whole, slot)
        file = draw.choice([f for f in sorted(slot.iterdir()) if f.is_file()])
        told = changed_file(draw, file)
        if file.name != MANIFEST and draw.random() < 0.6:
            listed_again(slot)
        clearing = draw.random() < 0.2
        return told, lambda: opened(clearing)

    return draw_case


def training_checkpoints(root: Path) -> Drawing:
    """What an interrupted training left, found by the next call: its note, its state, its tensors, with
    checksums that are right or wrong.
    """
    from workbench.training import Train
    from workbench.training import checkpoint as files
    from workbench.unfinished import left_behind

    on = workbench.subject("digits-softmax")
    run = Train(steps=4, batch_size=8, device="cpu")
    run.run(on, Stopped("train", 2), cache=False)
    (left,) = left_behind()
    whole = Path(shutil.copytree(left.folder, root / "whole"))

    def right(note: Path, draw: random.Random) -> str:
        """The state changed, and its checksum with it."""
        content = json.loads(note.read_text())["content"]
        tensors = note.with_name(content["tensors"])
        if draw.random() < 0.3:
            checkpoint_folders.header(draw, tensors)
            content["checksum"] = files.of_file(tensors)
            text = json.dumps(content)
        else:
            part = draw.choice(["state", "state", "state", "history", "all"])
            if part == "all":
                text = mutation.as_json(draw, content)
            else:
                text = json.dumps(content | {part: mutation.value(draw, content[part])})
        encoded = text.encode("utf-8", "replace").decode()
        note.write_text(files.HEAD % files.of_text(encoded) + encoded + "}")
        return encoded[:1500]

    def opened() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            left_behind()
            found = run.run(on, Progress(), cache=False)
            if len(found.table) != 4:
                raise Odd("traceback", f"the table has {len(found.table)} rows for 4 steps")

    def draw_case(draw: random.Random) -> Case:
        copied(whole, left.folder)
        note = next(left.folder.rglob("state.json"))
        if draw.random() < 0.4:
            return f"right: {right(note, draw)}", opened
        named = [f for f in sorted(left.folder.rglob("*")) if f.is_file() and f.name != "lock"]
        return changed_file(draw, draw.choice(named)), opened

    return draw_case


def states(root: Path) -> Drawing:
    """The two files of a checkpoint alone: read, and written over."""
    from workbench.training import checkpoint as files

    state = {
        "model": {"a.weight": torch.arange(6.0).view(2, 3).T},
        "step": 3,
        "parts": [1, (2.5, None)],
        4: "x",
    }
    files.save(root / "whole", state, [{"step": 1.0, "loss": 2.0}])
    place = root / "damaged"

    def opened() -> None:
        try:
            files.load(place)
        finally:
            files.save(place, state, [])
            assert files.load(place)[1] == []

    def draw_case(draw: random.Random) -> Case:
        copied(root / "whole", place)
        note = place / files.NOTE
        if draw.random() < 0.5:
            content = json.loads(note.read_text())["content"]
            text = mutation.as_json(draw, content).encode("utf-8", "replace").decode()
            note.write_text(files.HEAD % files.of_text(text) + text + "}")
            return f"right: {text[:1500]}", opened
        return changed_file(draw, draw.choice(sorted(place.iterdir()))), opened

    return draw_case


def square(params: dict[str, Any], trial: Any) -> dict[str, float]:
    return {"value": (float(params["x"]) - 3) ** 2}


def ledgers(root: Path) -> Drawing:
    """The database of a sweep: bytes, cells, columns and tables; read, claimed from, and gone on with."""
    from workbench.training.sweep.sweeps import Sweep
    from workbench.training.sweep.trial_ledger import Ledger

    whole, file = root / "whole.sqlite", root / "damaged.sqlite"
    space = {"x": [1, 2, 4, 8]}
    Sweep("study", space, square, storage=f"sqlite:///{whole}").run(workers=1)
    connection = sqlite3.connect(whole)
    connection.execute(
        "update workbench_trials set state = 'waiting', owner = '', result = null where number > 1"
    )
    connection.execute(
        "update workbench_trials set state = 'running', owner = 'elsewhere|77|x', beat = 0 where number = 3"
    )
    connection.commit()
    connection.execute(f"vacuum into '{root / 'packed.sqlite'}'")  # without a log beside it
    connection.close()
    whole = root / "packed.sqlite"
    sweep = Sweep("study", space, square, storage=f"sqlite:///{file}")

    def opened(going_on: bool) -> None:
        if going_on:
            found = sweep.run(workers=1)
            assert isinstance(found, pd.DataFrame)
            return
        ledger = Ledger(f"sqlite:///{file}", "study")
        try:
            ledger.spec()
            claim = ledger.claim("here|1|x")
            if claim is not None:
                ledger.finish(claim.number, "here|1|x", "done", {"value": 1.0}, 0.1)
            sweep.table()
        finally:
            ledger.close()

    def draw_case(draw: random.Random) -> Case:
        for old in root.glob("damaged.sqlite*"):
            old.unlink()
        shutil.copy(whole, file)
        if draw.random() < 0.65:
            told = rows_changed(draw, file)
        else:
            told = "bytes"
            file.write_bytes(mutation.damaged(draw, file.read_bytes(), draw.choice([0, 100, 20_000])))
        going_on = draw.random() < 0.1
        return f"{told} {going_on}", lambda: opened(going_on)

    return draw_case


def evidence(root: Path) -> Drawing:
    """Records of evidence of the user's own, as `list` and `show` read them."""
    import os

    from workbench.cli import main
    from workbench.storage import evidence_folders, evidence_record, verdict

    shipped = evidence_folders()[1] / "pruning" / "wanda.json"
    whole = json.loads(shipped.read_text())
    file = Path(os.environ["WORKBENCH_EVIDENCE"]) / "pruning" / "wanda.json"
    file.parent.mkdir(parents=True)

    def opened(showing: bool) -> str | None:
        if showing:
            if main(["show", "wanda"]) == 2:
                return "refused"
        else:
            verdict(evidence_record("pruning", "wanda"))
        return None

    def draw_case(draw: random.Random) -> Case:
        what = draw.random()
        if what < 0.6:
            file.write_bytes(mutation.encoded(mutation.as_json(draw, whole)))
        else:
            file.write_bytes(mutation.damaged(draw, json.dumps(whole).encode()))
        showing = draw.random() < 0.1
        return f"{showing} {file.read_bytes()[:500]!r}", lambda: opened(showing)

    return draw_case


def expert_patterns(root: Path) -> Drawing:
    """Files of experts' scores."""
    from workbench.pruning.saliency.expert_routing import ExpertPatterns

    whole = ExpertPatterns({"code": torch.rand(2, 4), "prose": torch.rand(2, 4)}).save(
        root / "whole.safetensors"
    )
    file = root / "damaged.safetensors"

    def opened() -> None:
        found = ExpertPatterns.load(file)
        for task in found.scores:
            found.kept(task, 2)

    def draw_case(draw: random.Random) -> Case:
        shutil.copy(whole, file)
        if draw.random() < 0.5:
            mutation.json_header(draw, file)
        else:
            file.write_bytes(mutation.damaged(draw, file.read_bytes(), draw.choice([0, 200])))
        return repr(file.read_bytes()[:400]), opened

    return draw_case


LOADERS: dict[str, Callable[[Path], Drawing]] = {
    "results": results,
    "cache": cached,
    "checkpoint-files": states,
    "training-checkpoints": training_checkpoints,
    "sweep-ledgers": ledgers,
    "evidence": evidence,
    "expert-patterns": expert_patterns,
}
