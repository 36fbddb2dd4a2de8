"""The built-in subjects by name, and how their parts become a Subject."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.subjects.subject import Subject
from workbench.subjects.tasks import TASK

# name -> (module under workbench.subjects.builtin, function, what it is)
BUILTINS: dict[str, tuple[str, str, str]] = {
    "digits-softmax": (
        "digits",
        "softmax",
        "softmax regression on scikit-learn's digits at zero weights; its Hessian is known exactly",
    ),
    "digits-vit": (
        "digits",
        "vit",
        "a small vision transformer on scikit-learn's digits, trained in seconds",
    ),
    "bytelm": (
        "bytelm",
        "bytelm",
        "a 1.8 M-parameter Llama-style byte language model trained by the project on Python's own source",
    ),
    "bytemoe": (
        "bytelm",
        "bytemoe",
        (
            "a 1.5 M-parameter Mixtral-style byte mixture of experts (4 experts, 2 active), "
            "trained briefly on the same text"
        ),
    ),
    "hidden-markov": (
        "hidden_markov",
        "chain",
        "an untrained GPT-2 of two layers on sequences of a hidden Markov chain, whose states are known",
    ),
    "minilm-docstrings": (
        "minilm",
        "minilm",
        "the 22.7 M-parameter MiniLM-L6 BERT, fine-tuned to tell packages by their docstrings",
    ),
    "smollm2": (
        "smollm2",
        "smollm2",
        (
            "the 135 M-parameter Llama-style SmolLM2, on documentation of installed packages; "
            "its weights lie on a 4-bit grid in groups of 32"
        ),
    ),
}


def build(name: str, progress: Progress | None = None, **options: Any) -> Subject:
    """The built-in subject `name`; `options` go to its builder (an unknown one is refused)."""
    import inspect

    module, function, _ = BUILTINS[name]
    builder = getattr(importlib.import_module(f"workbench.subjects.builtin.{module}"), function)
    accepted = set(inspect.signature(builder).parameters) - {"progress"}
    unknown = set(options) - accepted
    if unknown:
        raise BadInput(
            f"subject: {name!r} takes no option {', '.join(sorted(unknown))}; "
            f"it takes {', '.join(sorted(accepted)) or 'none'}"
        )
    parts = builder(progress=progress, **options)
    return Subject(
        name,
        parts.model.eval(),
        TASK[parts.task].value(),
        parts.splits,
        tokenizer=parts.tokenizer,
        data_note=parts.info.get("note", ""),
        labels=parts.info.get("labels"),
        origin={"builtin": name},
    )


def skeleton(name: str) -> nn.Module | None:
    """An untrained model of a built-in that is a plain module (others rebuild from their config);
    None for unknown names.
    """
    from workbench.subjects.builtin import digits

    return digits.softmax().model if name == "digits-softmax" else None
