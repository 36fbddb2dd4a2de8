"""A run on disk: what it takes to go on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from workbench.errors import BadInput
from workbench.training import checkpoint


class Resumable(Protocol):
    """A run on the training loop, as far as its checkpoint knows it."""

    subject: Any
    optimizer: Any
    schedule: Any
    scaler: Any
    averaged: Any
    generators: Any
    rows: list[dict[str, Any]]
    step: int
    steps: int
    position: int
    items: int
    batch_size: int
    seconds: float


def save_run(folder: Path, run: Resumable) -> None:
    """Write everything that decides how a run goes on."""
    state: dict[str, Any] = {
        "model": run.subject.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "scaler": run.scaler.state_dict(),
        "rng": checkpoint.rng_state(run.subject.device),
        "step": run.step,
        "position": run.position,
        "items": run.items,
        "batch_size": run.batch_size,
        "seconds": run.seconds,
        "steps": run.steps,
    }
    if run.averaged is not None:
        state["averaged"] = run.averaged.state_dict()
    checkpoint.save(folder, state, run.rows)


def load_run(folder: Path, run: Resumable) -> None:
    """Bring a run that has just started to where the stored one stopped."""
    state, run.rows = checkpoint.load(folder)
    if state["steps"] != run.steps:
        raise BadInput(
            f"steps: the checkpoint in {str(folder)!r} is of a run of {state['steps']} steps, "
            f"not {run.steps}; delete it or ask for the same"
        )
    run.subject.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.schedule.load_state_dict(state["schedule"])
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(state["scaler"])
    if run.averaged is not None:
        run.averaged.load_state_dict(state["averaged"])
    run.generators = state["rng"]
    run.step, run.position, run.items = state["step"], state["position"], state["items"]
    run.batch_size, run.seconds = state["batch_size"], state["seconds"]
