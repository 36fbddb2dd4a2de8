"""What instruments that put a changed model beside the subject have in common."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.instruments import SubjectInstrument
from workbench.measures.fidelity import candidate, check_comparable, stamp
from workbench.subjects import Subject


def changed_parameter() -> Any:
    """The declaration of `changed`; an instrument says it again where it stands among its own fields."""
    return parameter("", "the changed model: a folder, a saved result, a GGUF file, a hub id or a built-in")


class BesideChanged(SubjectInstrument):
    """An instrument on a subject and the model that `changed` names."""

    changed: str = changed_parameter()
    split: str = parameter("test", "split the texts come from", group="Data")

    def check(self, on: Subject) -> None:
        on.split(self.split)
        check_comparable(on, "changed", [self.changed])
        self.check_task(on)
        if not self.changed.strip():
            raise BadInput(
                "changed: is empty; give a folder, a saved result, a GGUF file, a hub id or a built-in name"
            )

    def check_task(self, on: Subject) -> None:
        """`BadInput` for a task that this instrument is not for."""

    def key(self, on: Any) -> str:
        return hashlib.sha256(json.dumps([super().key(on), stamp(self.changed)]).encode()).hexdigest()[:24]

    def changed_model(self, on: Subject) -> Subject:
        """The changed model, on the subject's data, by the name of its folder or file."""
        opened = candidate(self.changed, on)
        opened.model.name = opened.name
        return opened.model
