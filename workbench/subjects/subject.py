"""The subject: a model, its task and its data splits, with a fingerprint that names exactly this state
of them.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.errors import BadInput, Stopped
from workbench.kernels.sequence.unpadded import unpadded
from workbench.progress import Progress, TextProgress
from workbench.storage import replacing
from workbench.storage.resident import disk, trim
from workbench.subjects import finite, identity
from workbench.subjects import layers as layer_selection
from workbench.subjects.changes import bake, computed_once, copied, describe_changes, same_tensors
from workbench.subjects.examples.card import card
from workbench.subjects.identity import Seen
from workbench.subjects.layers import Layer, plain_experts
from workbench.subjects.stored import declare_wide, narrow, write_tensors
from workbench.subjects.tasks import Batch, LanguageModel, Measured, Task

if TYPE_CHECKING:
    from workbench.instruments import Instrument

SHARDS = {"max_shard_size": "500MB"}  # of a model that a run kept in files: one is held at a time
TOKENS = 4096  # of a batch whose answers are measured
Split = dict[str, Tensor]  # column -> (examples, ...)


class Subject:
    """Model + task + splits (train, calibration, validation, test).
    Instruments never change the one they are given.

    `model` may be a callable that makes the model: a subject derived by a cached run exists by its
    fingerprint and is only computed when somebody asks for its weights.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module | Callable[[], nn.Module],
        task: Task,
        splits: dict[str, Split],
        *,
        tokenizer: Any = None,
        data_note: str = "",
        labels: list[str] | None = None,
        history: list[dict[str, Any]] | None = None,
        fingerprint: str | None = None,
        origin: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.task, self.splits, self.tokenizer = name, task, splits, tokenizer
        self.data_note, self.labels, self.history, self.origin = (
            data_note,
            labels,
            history or [],
            origin or {},
        )
        self._model = plain_experts(model) if isinstance(model, nn.Module) else None
        self._make = None if isinstance(model, nn.Module) else model
        self._fingerprint = fingerprint
        #: Why this is not to be saved; "" for all that may be.
        self.held_back = ""
        self._memory: dict[tuple[Any, ...], Any] = {}
        self._seen = self._look() if fingerprint else None
        for split, columns in splits.items():
            lengths = {k: len(v) for k, v in columns.items()}
            if len(set(lengths.values())) > 1:
                raise BadInput(f"data: split {split!r} has columns of different lengths: {lengths}")
            if not lengths or min(lengths.values()) == 0:
                raise BadInput(f"data: split {split!r} is empty; every split needs at least one example")

    # ---- the model -----------------------------------------------------------------------------------------
    @property
    def model(self) -> nn.Module:
        if self._model is None:
            assert self._make is not None
            self._model = plain_experts(self._make()).eval()
            if self._seen is not None:
                self._seen = replace(self._look(), data=self._seen.data)
        return self._model

    @property
    def made(self) -> bool:
        """Whether the model is there, else it is made when somebody asks for it."""
        return self._model is not None

    def _settings(self) -> str:
        return identity.settings(self.task, self.labels, self.tokenizer)

    def _look(self) -> Seen:
        return identity.look(self._model, self.splits, self._settings())

    @property
    def fingerprint(self) -> str:
        """Hash of weights, modules and their code, configuration, task, tokenizer and data;
        changes when any of them does.
        """
        seen = self._look()
        if self._fingerprint is None or self._seen is None or self._seen != seen:
            model = self.model
            self._fingerprint = identity.content(model, self.splits, self._settings())
            self._seen = self._look()
        return self._fingerprint

    def resolve_device(self, device: str = "auto") -> torch.device:
        if device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise BadInput(f"device: {device!r} was asked for but no CUDA device is present; use auto or cpu")
        return torch.device(device)

    @property
    def device(self) -> torch.device:
        tensor = next(iter(self.model.parameters()), None)
        return tensor.device if tensor is not None else torch.device("cpu")

    def copy(self, shares: bool = False) -> Subject:
        """A subject with its own copy of the weights (data is shared).

        shares : own modules with the same tensors, for who writes to none but by `Layer.write`, which gives
            what it writes memory of its own
        """
        # a module has a dozen empty tables of hooks; deepcopy would spend half of a small model's copy on
        # them
        empty = {
            id(table): type(table)()
            for module in self.model.modules()
            for table in vars(module).values()
            if type(table) in (dict, OrderedDict) and not table
        }
        known: dict[int, Any] = empty | (same_tensors(self.model) if shares else {})
        made = self.with_model(copy.deepcopy(self.model, known))
        made.adopt_fingerprint(self.fingerprint)
        return made

    def with_model(self, model: nn.Module) -> Subject:
        made = Subject(
            self.name,
            model,
            self.task,
            self.splits,
            tokenizer=self.tokenizer,
            data_note=self.data_note,
            labels=self.labels,
            history=list(self.history),
            origin=self.origin,
        )
        made._memory = self._memory  # keys hold the fingerprint, so sharing is safe
        return made

    def with_split(self, name: str, columns: Split) -> Subject:
        """The same model with these examples as its split `name`."""
        return Subject(
            self.name,
            self.model,
            self.task,
            self.splits | {name: columns},
            tokenizer=self.tokenizer,
            data_note=self.data_note,
            labels=self.labels,
            origin=self.origin,
        )

    def prepared(self, device: str, copy: bool, shares: bool = False) -> Subject:
        """What an instrument works on: eval mode, on the device,
        a private copy when it will change the weights (`shares`: see `copy`).
        """
        target = self.resolve_device(device)
        if copy or target != self.device:
            mine = self.copy(shares)
            mine.model.to(target).eval()
            return mine
        self.model.eval()
        return self

    def derived(self, instrument: Instrument, key: str, make: Callable[[], Subject | None]) -> Subject:
        """The subject a cached run produced: known by its fingerprint, computed on demand."""

        def weights() -> nn.Module:
            made = make()
            assert made is not None
            return made.model

        found = Subject(
            self.name,
            weights,
            self.task,
            self.splits,
            tokenizer=self.tokenizer,
            data_note=self.data_note,
            labels=self.labels,
            history=[*self.history, step(instrument)],
            fingerprint=key,
            origin=self.origin,
        )
        found.held_back = instrument.held_back()
        return found

    def adopt_fingerprint(
        self, fingerprint: str, evaluations: Mapping[tuple[str, int], dict[str, float]] | None = None
    ) -> None:
        """Take the fingerprint of the subject this one was saved from, the same weights, task and data,
        and what was measured on it.
        """
        self._fingerprint, self._seen = fingerprint, self._look()
        for (split, examples), found in (evaluations or {}).items():
            self.memo(("evaluate", split, examples), functools.partial(dict, found))

    def memo(self, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        """A statistic of this subject, kept in memory while its fingerprint stays;
        the ones used last are kept.
        """
        counted = self._seen is not None and self._seen.counted(self._model, self.splits)
        full = (self._fingerprint if counted else self.fingerprint, str(self.device), *key)
        found = self._memory.pop(full) if full in self._memory else compute()
        while len(self._memory) >= 16:
            self._memory.pop(next(iter(self._memory)))
        self._memory[full] = found
        return found

    def evaluated(
        self, split: str = "test", limit: int | None = None, progress: Progress | None = None
    ) -> dict[str, float]:
        """`evaluate`, remembered while the weights stay; what a stop cut short is not kept."""
        progress = progress or Progress()
        key = ("evaluate", split, min(self.size(split), limit or self.size(split)))
        known = self.evaluations.get(key[1:])
        found = known or self.evaluate(split, limit=limit, progress=progress)
        return found if progress.stopped else dict(self.memo(key, lambda: found))

    @property
    def evaluations(self) -> dict[tuple[str, int], dict[str, float]]:
        """What `evaluated` remembers: (split, examples) -> loss and metrics."""
        begin = (self.fingerprint, str(self.device), "evaluate")
        return {key[3:]: value for key, value in self._memory.items() if key[:3] == begin}

    def adopt(self, parent: Subject, instrument: Instrument, fingerprint: str | None) -> None:
        """Record what was done to get here; the run's key becomes the fingerprint
        (None: hash the weights).
        """
        self.history = [*parent.history, step(instrument)]
        self.held_back = self.held_back or instrument.held_back()
        self._fingerprint = fingerprint
        self._seen = self._look() if fingerprint else None

    # ---- data ----------------------------------------------------------------------------------------------
    def split(self, name: str) -> Split:
        if name not in self.splits:
            raise BadInput(f"split: {name!r} does not exist; this subject has {', '.join(self.splits)}")
        return self.splits[name]

    def size(self, split: str) -> int:
        return len(next(iter(self.split(split).values())))

    def batches(
        self,
        split: str,
        batch_size: int = 32,
        limit: int | None = None,
        device: torch.device | None = None,
        by_length: bool = False,
    ) -> Iterator[Batch]:
        """Batches of the first `limit` examples, trimmed to the longest sequence in each;
        in order, or shortest first.
        """
        columns = self.split(split)
        device = device or self.device
        for rows in self.order(split, limit, by_length).split(batch_size):
            batch = {k: v[rows] for k, v in columns.items()}
            yield {k: v.to(device) for k, v in self.task.trimmed(batch).items()}

    def order(self, split: str, limit: int | None = None, by_length: bool = False) -> Tensor:
        """The rows of the first `limit` examples as `batches` gives them: in order, or shortest first."""
        total = min(self.size(split), limit or self.size(split))
        if by_length:
            lengths = self.task.lengths({k: v[:total] for k, v in self.split(split).items()})
            if lengths is not None:
                return lengths.argsort(stable=True)
        return torch.arange(total)

    def examples_at_once(self, split: str, most: int) -> int:
        """Examples of a batch: `most`, or fewer where the split's sequences are long."""
        return max(min(most, TOKENS // self.task.longest(self.split(split))), 1)

    def examples_card(self, split: str, limit: int) -> dict[str, Any]:
        """What the first `limit` examples of a split are: see `examples.card`."""
        return card(self.task, self.split(split), limit, self.tokenizer, getattr(self.model, "config", None))

    # ---- measuring -----------------------------------------------------------------------------------------
    def loss(self, batch: Batch) -> Tensor:
        return self.task.loss(self.model, batch)

    @torch.no_grad()
    def evaluate(
        self,
        split: str = "test",
        batch_size: int = 64,
        limit: int | None = None,
        progress: Progress | None = None,
        seen: Callable[[Tensor, Any, Batch], Measured | None] | None = None,
    ) -> dict[str, float]:
        """Mean loss and metrics over a split (perplexity for language models); exact whatever the batch size,
        which is the largest: there are no more than `TOKENS` tokens in a batch of several examples.
        `seen` gets what a loss is measured of: the rows of the split, the task's output and the batch; what
        it gives is taken for the batch's loss and metrics.
        """
        progress = progress or Progress()
        if self.task.targets in self.task.columns and self.task.targets not in self.split(split):
            raise BadInput(
                f"split: {split!r} has no column {self.task.targets}, only {', '.join(self.split(split))}; "
                "give the targets, or another split"
            )
        sums: dict[str, float] = {}
        was_training, total, items = self.model.training, 0.0, 0
        self.model.eval()
        trim()
        batch_size = self.examples_at_once(split, batch_size)
        rows = self.order(split, limit, by_length=True).split(batch_size)
        with computed_once(self.model), unpadded(self.model), layer_selection.block_after_block(self.model):
            batches = zip(rows, self.batches(split, batch_size, limit, by_length=True), strict=True)
            for examples, batch in progress.track(batches, f"evaluate {split}", len(rows)):
                weight = self.task.items(batch)
                if weight == 0:
                    continue
                watch = None if seen is None else functools.partial(seen, examples)
                loss, metrics = self.task.measured(self.model, batch, watch)
                total += loss * weight
                items += weight
                for key, value in metrics.items():
                    sums[key] = sums.get(key, 0.0) + value
        self.model.train(was_training)
        trim()
        if items == 0 and progress.stopped:
            raise Stopped(f"split: stopped before anything of {split!r} was measured")
        if items == 0:
            raise BadInput(f"split: {split!r} has no item with a target; check the label column")
        found = {"loss": total / items} | {k: v / items for k, v in sums.items()}
        if isinstance(self.task, LanguageModel):
            found["perplexity"] = float(torch.tensor(found["loss"]).exp())
        return found

    def check_finite(self) -> None:
        """Raise `BadInput` for weights, buffers and inputs that are not finite, by name."""
        if self._model is not None:
            finite.check(self._model, self.splits, self.task.targets)

    def check_outputs_finite(self) -> None:
        """Raise `BadInput` when the loss of the first examples is not finite, by layer."""
        finite.check_outputs(self)

    def not_finite(self) -> str | None:
        """The first batch and layer, or gradient, whose numbers are not finite; None when all are."""
        return finite.explanation(self)

    # ---- structure -----------------------------------------------------------------------------------------
    def layers(self, glob: str = "blocks") -> list[Layer]:
        return layer_selection.select(self.model, glob)

    def revived_from(self, before: Subject) -> int:
        """Weights that were zero there and are not here."""
        return layer_selection.revived(before.model, self.model)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return layer_selection.blocks(self.model)

    def parameter_count(self) -> int:
        """Distinct parameters of the dense model (tied weights once; changes not counted)."""
        return sum(
            p.numel() for p in {id(p): p for p in bake(copy.deepcopy(self.model)).parameters()}.values()
        )

    # ---- disk ----------------------------------------------------------------------------------------------
    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        private: bool = False,
        told: Callable[[str], Any] | None = None,
    ) -> Path:
        """A folder that `workbench.subject(folder)` opens with its changes,
        and `transformers` opens with them baked in. What a save left there is replaced, anything else is
        refused by name unless `overwrite`.

        told : open the folder in a fresh process and compare the loss before it takes its place, and say
            with this what came of it; private : a folder of the cache
        """
        if self.held_back and not private:
            raise BadInput(self.held_back)
        with replacing(folder, overwrite=overwrite, private=private, field="folder") as draft:
            draft.mkdir()
            self.save_into(draft)
            if told is not None:
                self.reopened(draft, told)
        return Path(folder)

    @property
    def has_file(self) -> bool:
        """Whether a saved folder is enough for another process; of a plain module the code is missing."""
        return hasattr(self.model, "save_pretrained") or bool(self.origin.get("builtin"))

    def reopened(self, folder: Path, told: Callable[[str], Any]) -> None:
        """Open a saved folder in a fresh process; `BadInput` when that fails or its loss is another."""
        from workbench.storage.reopening import check_saved

        told(check_saved(self, folder))

    def save_into(self, folder: Path) -> None:
        from workbench.subjects.structure.removal import opens_again, record_of, stock

        if named := getattr(self.model, "without_file", ""):
            raise BadInput(
                f"subject: a model changed by {named} has no file format; keep the run, which makes it again"
            )
        records, tensors = describe_changes(self.model)
        baked = stock(bake(copied(self.model))).cpu()
        opens_again(baked)
        save_pretrained = getattr(baked, "save_pretrained", None)
        if save_pretrained is not None:
            from workbench.subjects.checkpoints import quiet_transformers

            mixed = narrow(baked)
            with quiet_transformers():
                save_pretrained(folder, safe_serialization=True, **({} if disk() is None else SHARDS))
            if mixed:
                declare_wide(folder)
        else:
            from safetensors.torch import save_model

            save_model(baked, str(folder / "model.safetensors"))
        if self.tokenizer is not None and hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)
        if tensors:
            write_tensors(folder / "changes.safetensors", tensors)
        columns = {f"{s}/{k}": v for s, c in self.splits.items() for k, v in c.items()}
        write_tensors(folder / "splits.safetensors", columns)
        note = {
            "name": self.name,
            "task": self.task.name,
            "data_note": self.data_note,
            "labels": self.labels,
            "history": self.history,
            "origin": self.origin,
            "changes": records,
            "removed": record_of(self.model),
            "frozen": sorted(n for n, p in self.model.named_parameters() if not p.requires_grad),
            "fingerprint": self.fingerprint,
            "files": identity.files_in(folder),
        }
        (folder / "workbench.json").write_text(json.dumps(note, indent=1))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{k} {self.size(k)}" for k in self.splits)
        done = " > ".join(s["instrument"] for s in self.history)
        return f"Subject({self.name!r}, {self.task.name}, {sizes}{', after ' + done if done else ''})"

    def card(self, progress: Progress | None = None) -> dict[str, Any]:
        """The reproducibility card: what a reader must know to get the same numbers."""
        test = self.evaluated(
            "test" if "test" in self.splits else next(iter(self.splits)), progress=progress or TextProgress()
        )
        return {
            "subject": self.name,
            "task": self.task.name,
            "architecture": type(self.model).__name__,
            "parameters": self.parameter_count(),
            "layers": len(self.layers()),
            "data": self.data_note,
            **{f"{k} examples": self.size(k) for k in self.splits},
            "fingerprint": self.fingerprint,
        } | {f"test {k}": v for k, v in test.items()}


def step(instrument: Instrument) -> dict[str, Any]:
    return {"instrument": instrument.name(), "fields": instrument.model_dump(mode="json")}
