"""Subjects that need no download: each builder returns the `Parts` of one (model, task name, data splits).

| name | module | what it is |
|---|---|---|
| `digits-softmax`, `digits-vit` | `digits` | scikit-learn's digits: softmax regression, a small transformer |
| `bytelm`, `bytemoe` | `bytelm` | byte language models trained by the project, weights in `data/` |
| `hidden-markov` | `hidden_markov` | sequences of a hidden Markov chain, a small GPT-2 without training |
| `minilm-docstrings` | `minilm` | the MiniLM-L6 BERT telling packages apart by their docstrings |
| `smollm2` | `smollm2` | SmolLM2-135M on documentation of installed packages; weights on a 4-bit grid |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ["Parts"]


@dataclass
class Parts:
    """What a subject is made of.

    `splits` has train, calibration, validation and test (calibration is drawn from train), each a dict
    of tensors with one row per example. `info` has at least `note` (a sentence on the data) and,
    for classifiers, `labels`.
    """

    model: nn.Module
    task: str
    splits: dict[str, dict[str, Tensor]]
    tokenizer: Any = None
    info: dict[str, Any] = field(default_factory=dict)
