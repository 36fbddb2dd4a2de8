"""Subjects: a model, its task and its data, from the built-ins, a folder, the hub,
a Python file or a plain module.
"""

from workbench.subjects.changes import Change, LowRank, Mask, attach, bake
from workbench.subjects.layers import Layer, all_layers, blocks, select
from workbench.subjects.loaders import subject
from workbench.subjects.subject import Split, Subject
from workbench.subjects.tasks import TASK, Batch, Task

__all__ = [
    "TASK",
    "Batch",
    "Change",
    "Layer",
    "LowRank",
    "Mask",
    "Split",
    "Subject",
    "Task",
    "all_layers",
    "attach",
    "bake",
    "blocks",
    "select",
    "subject",
]
