"""The axes of `train-sparse` besides those of `prune`: what is chosen, and where the entries are found.

training-masks      (course, sparsity, options): puts its masks on the course's layers
side-terms          (course, options): attaches its terms
trainable           (on, seed, options) -> the parameters that learn
training-objective  (on, teacher, batch, options) -> loss
backward-pass       (layers, pattern, options) -> a context for the loss, or None
training-portion    (on, stage, stages, options) -> the subject with a stage's training split
sparse-method       (options) -> fields that the method fixes unless they are given
"""

from __future__ import annotations

from workbench.axis import Axis

_FOUND = "workbench.pruning.sparse_training"

MASKS = Axis("training-masks", "what the masks do while training", found_in=f"{_FOUND}.masks")
TERMS = Axis(
    "side-terms", "terms added to a weight: under its mask, or beside it", found_in=f"{_FOUND}.terms"
)
TRAINABLE = Axis("trainable", "what learns", found_in=f"{_FOUND}.parts")
OBJECTIVE = Axis(
    "training-objective",
    "task's loss, alone or with distillation from the subject as it was given",
    found_in=f"{_FOUND}.parts",
)
BACKWARD = Axis("backward-pass", "gradient that goes on to earlier layers", found_in=f"{_FOUND}.parts")
PORTION = Axis(
    "training-portion",
    "a stage sees all training examples, or its own part of them",
    found_in=f"{_FOUND}.parts",
)
SPARSE_METHOD = Axis(
    "sparse-method",
    "published method: fixes what is not given of the fields below",
    found_in=f"{_FOUND}.methods",
)
