"""The axis of model changes: what is put in the place of a model's parts before it is trained.

An entry is a function (subject, options) -> subject. A change whose model transformers has no class for
names itself in `model.without_file`, and such a model is not saved.
"""

from __future__ import annotations

from workbench.axis import Axis, Options
from workbench.subjects import Subject

MODEL_CHANGE = Axis(
    "model-change",
    "what is changed in the model before it is trained",
    found_in=(
        "workbench.training.models.model_change",
        "workbench.training.models.lipschitz",
        "workbench.training.batch.normalisation",
    ),
)


@MODEL_CHANGE.add("none", formula="f", source="")
def none(on: Subject, options: Options) -> Subject:
    """The model as it is."""
    return on
