"""A run on disk: what it takes to go on where it stopped."""

from __future__ import annotations

import hashlib
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.subjects import Change
from workbench.training import checkpoint
from workbench.unfinished import current

#: What took so many seconds is worth keeping.
WORTH = 1.0
#: Settings that tell one training from another, when their weights are the same at the start.
TELLING = (
    "batch_size",
    "micro_batch",
    "learning_rate",
    "optimizer",
    "weight_decay",
    "schedule",
    "warmup",
    "clip",
    "precision",
    "ema",
    "loss",
    "split",
    "order",
    "evaluate_every",
    "seed",
    "own_generator",
    "batch_rule",
    "label",
)


@runtime_checkable
class Stateful(Protocol):
    """Whatever a run's course depends on besides model and optimizer.

    `load_state_dict` comes first when a run goes on: it puts on the model what was on it, and gives
    the optimizer what it had been given, before their own states are read.
    """

    def state_dict(self) -> dict[str, Any]:
        """Numbers, text, tensors, and lists and mappings of them."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Be as it was when that state was taken."""


class Resumable(Protocol):
    """A run on the training loop, as far as its checkpoint knows it."""

    subject: Any
    settings: Any
    optimizer: Any
    schedule: Any
    scaler: Any
    averaged: Any
    generators: Any
    rows: list[dict[str, Any]]
    step: int
    steps: int
    skipped: int
    position: int
    items: int
    batch_size: int
    seconds: float
    stop: bool


def save_run(folder: Path, run: Resumable) -> None:
    """Write everything that decides how a run goes on."""
    state: dict[str, Any] = {
        "parts": [part.state_dict() for part in stateful(run)],
        "changes": numbers_of(run.subject.model),
        "model": run.subject.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "scaler": run.scaler.state_dict(),
        "rng": checkpoint.rng_state(run.subject.device),
        "step": run.step,
        "skipped": run.skipped,
        "position": run.position,
        "items": run.items,
        "batch_size": run.batch_size,
        "seconds": run.seconds,
        "steps": run.steps,
        "stop": run.stop,
    }
    if run.averaged is not None:
        state["averaged"] = run.averaged.state_dict()
    checkpoint.save(folder, state, run.rows)


def load_run(folder: Path, run: Resumable) -> None:
    """Bring a run that has just started to where the stored one stopped."""
    state, rows = checkpoint.load(folder)
    try:
        if state["steps"] != run.steps:
            raise BadInput(
                f"steps: the checkpoint in {str(folder)!r} is of a run of {state['steps']} steps, "
                f"not {run.steps}; delete it or ask for the same"
            )
        check_course(state, rows, run)
        for part, kept in zip(stateful(run), state["parts"], strict=True):
            part.load_state_dict(kept)
        run.subject.model.load_state_dict(state["model"])
        set_numbers(run.subject.model, state["changes"])
        check_form(state, run)
        run.optimizer.load_state_dict(state["optimizer"])
        run.schedule.load_state_dict(state["schedule"])
        if run.scaler.is_enabled():
            run.scaler.load_state_dict(state["scaler"])
        if run.averaged is not None:
            run.averaged.load_state_dict(state["averaged"])
        run.rows, run.generators, run.skipped = rows, state["rng"], state["skipped"]
        run.step, run.position, run.items = state["step"], state["position"], state["items"]
        run.batch_size, run.seconds, run.stop = state["batch_size"], state["seconds"], state["stop"]
    except BadInput:
        raise
    except checkpoint.UNREADABLE as error:
        raise checkpoint.damaged(folder, error) from None


def check_course(state: dict[str, Any], rows: Any, run: Resumable) -> None:
    """`ValueError` unless the numbers of a stored run can be those of this one."""
    lowest = {"step": 0, "skipped": 0, "position": 0, "items": 0, "batch_size": 1}
    for name, low in lowest.items():
        if type(state[name]) is not int or state[name] < low:
            raise ValueError(f"{name} is {str(state[name])[:60]!r}")
    if state["step"] > run.steps or not isinstance(state["stop"], bool):
        raise ValueError(f"it stands at step {state['step']} of {run.steps}")
    if type(state["seconds"]) not in (int, float) or not 0 <= state["seconds"] < math.inf:
        raise ValueError(f"seconds is {str(state['seconds'])[:60]!r}")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("its history is no list of steps")
    names = {name for row in rows for name in row}
    for row in rows:
        for name in ("step", "loss", "gradient_norm"):
            if type(row.get(name)) not in (int, float):
                raise ValueError(f"its history has the {name} {str(row.get(name))[:60]!r}")
    diverged = bool(rows) and not all(math.isfinite(rows[-1][name]) for name in ("loss", "gradient_norm"))
    steps = [row["step"] for row in rows]
    last = steps[-1] if diverged else state["step"]
    whole = steps == list(range(state["skipped"] + 1, last + 1))
    if not whole or any(not isinstance(name, str) for name in names):
        raise ValueError(
            f"its history has {len(rows)} rows at step {state['step']}, {state['skipped']} of them skipped"
        )


def check_form(state: dict[str, Any], run: Resumable) -> None:
    """`ValueError` unless the stored optimizer's settings, schedule and generators have the form that they
    have here at the start, once the run's parts have given the optimizer what it had been given.
    """
    fresh = {
        "optimizer": settings_of(run.optimizer.state_dict()),
        "schedule": run.schedule.state_dict(),
        "rng": checkpoint.rng_state(run.subject.device),
    }
    for name, wanted in fresh.items():
        if (place := unlike(state[name], wanted, name)) is not None:
            raise ValueError(f"{place} is not of the form that it has here")


def settings_of(state: Any) -> Any:
    """The groups of an optimizer's state, also where it is made of several optimizers; the rest grows only in
    training.
    """
    if isinstance(state, dict) and "param_groups" in state:
        return {"param_groups": state["param_groups"]}
    if isinstance(state, dict):
        return {name: settings_of(part) for name, part in state.items() if isinstance(part, (dict, list))}
    return [settings_of(part) for part in state] if isinstance(state, list) else None


def unlike(kept: Any, fresh: Any, place: str) -> str | None:
    """The first part of a stored state that has another form than the fresh one has: a number is a number, a
    tensor has the shape and type, a mapping the names. What is None at the start may be anything.
    """
    if fresh is None:
        return None
    if isinstance(fresh, Tensor):
        same = isinstance(kept, Tensor) and kept.shape == fresh.shape and kept.dtype == fresh.dtype
        return None if same else place
    if isinstance(fresh, dict):
        if not isinstance(kept, dict):
            return place
        missing = [f"{place}.{name}" for name in fresh if name not in kept]
        inner = (
            unlike(kept[name], value, f"{place}.{name}") for name, value in fresh.items() if name in kept
        )
        return next(iter(missing), None) or next((found for found in inner if found), None)
    if isinstance(fresh, (list, tuple)):
        if not isinstance(kept, (list, tuple)):
            return place
        inner = (unlike(a, b, f"{place}.{i}") for i, (a, b) in enumerate(zip(kept, fresh, strict=False)))
        return next((found for found in inner if found), None)
    if isinstance(fresh, bool) or isinstance(kept, bool):
        return None if isinstance(kept, bool) and isinstance(fresh, bool) else place
    if isinstance(fresh, (int, float)):
        return None if isinstance(kept, (int, float)) else place
    return None if not isinstance(fresh, str) or isinstance(kept, str) else place


def remembered(name: str, compute: Callable[[], Any], always: bool = False) -> Any:
    """What a run computes between its trainings: from its journal, when an earlier process has left it there.
    Tensors, numbers, text, and lists and mappings of them; kept when it took long enough to be worth it,
    or always, when later checkpoints stand on it.
    """
    journal = current()
    if journal is None or not journal.usable:
        return compute()
    folder = journal.place(name)
    if (folder / checkpoint.NOTE).exists():
        return checkpoint.load(folder)[0]["value"]
    began = time.monotonic()
    found = compute()
    worth = time.monotonic() - began >= min(journal.every, WORTH) and not journal.progress.stop.is_set()
    if worth or always:
        try:
            if journal.begin():
                checkpoint.save(folder, {"value": found}, [])
        except (OSError, BadInput, SafetensorError) as error:
            journal.give_up(error)
    return found


def stateful(run: Resumable) -> list[Stateful]:
    """The run's parts that have a state of their own, in a fixed order."""
    wanted = run.settings
    parts = [wanted.loss, wanted.batch_rule, *wanted.before_step, *wanted.callbacks, *wanted.keeps]
    return [part for part in parts if isinstance(part, Stateful)]


def numbers_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The numbers and words that changes of weights hold besides their tensors, by the change's path."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Change):
            held = {k: v for k, v in vars(module).items() if k[0] != "_" and k != "training" and is_plain(v)}
            if held:
                found[path] = held
    return found


def set_numbers(model: nn.Module, numbers: Mapping[str, Mapping[str, Any]]) -> None:
    for path, held in numbers.items():
        for name, value in held.items():
            setattr(model.get_submodule(path), name, value)


def is_plain(value: Any) -> bool:
    """Whether a checkpoint keeps a value as it is."""
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def identity(run: Resumable) -> str:
    """What tells this training from the others of one run: its settings, what learns, where it starts."""
    model, wanted = run.subject.model, run.settings
    told = [run.steps, run.subject.size(wanted.split), *(named(getattr(wanted, name)) for name in TELLING)]
    told += [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    told += fingerprints(model.state_dict().items())
    if not wanted.own_generator:
        told += fingerprints(checkpoint.rng_state(run.subject.device).items())
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def named(value: Any) -> str:
    """A setting as text: what it says, or what it is when it is a function or an object."""
    if value is None or isinstance(value, (str, int, float, Mapping)):
        return repr(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def fingerprints(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Each tensor's name, shape and checksum."""
    for name, tensor in tensors:
        if isinstance(tensor, Tensor):
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            yield f"{name} {tuple(tensor.shape)} {zlib.crc32(content.numpy().data)}"
