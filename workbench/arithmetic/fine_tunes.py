"""Models to merge or to compress where nobody names any: fine-tunes of the subject, made here."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from workbench.errors import BadInput, Stopped
from workbench.progress import Progress
from workbench.subjects import Subject
from workbench.training.studies.train import Train


def fine_tuned(
    on: Subject, count: int, steps: int, learning_rate: float, seed: int, progress: Progress
) -> list[Subject]:
    """`count` fine-tunes of the subject on its training split, in other orders of the data (seeds seed,
    seed + 1, ...). Each is a run of `train`, kept in the cache.
    """
    found = []
    for which in range(count):
        train = Train(steps=steps, learning_rate=learning_rate, seed=seed + which)
        result = train.run(on, progress.within(f"fine-tune {which + 1} of {count}"))
        if result.partial or result.subject is None:
            raise Stopped("fine_tunes: stopped before they were made")
        if result.facts["diverged"]:
            raise BadInput(f"learning_rate: training at {learning_rate} diverged; lower it")
        made = result.subject
        made.name = f"{on.name}, seed {seed + which}"
        found.append(made)
    return found


def idle_where_named(settings: BaseModel, field: str) -> Iterator[str]:
    """A line for each setting of the fine-tunes that somebody set, and that nothing reads where `field` names
    models.
    """
    for name in ("fine_tunes", "steps", "learning_rate"):
        if getattr(settings, field) and name in settings.model_fields_set:
            yield f"{name}: has no effect where {field} is given"


def check_trains(on: Subject) -> None:
    """`BadInput` where there is nothing to fine-tune on."""
    if "train" not in on.splits:
        raise BadInput(
            "parents: is empty and the subject has no training split to make fine-tunes on; name models"
        )
