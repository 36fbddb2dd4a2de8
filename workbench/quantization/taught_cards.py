"""Catalog cards of the methods that train through a rounding beside a teacher; `taught_evidence.py` measures their claims."""

from __future__ import annotations

from workbench.instruments import Method
from workbench.quantization import taught_evidence as evidence

CARDS: list[Method] = [
    Method("fbi-llm", "quantization", "FBI-LLM: binary from random weights by autoregressive distillation", "Ma, Sun, Shen 2024",
           r"\tilde W = \alpha\,\mathrm{sign}(W) + \beta;\ -\tfrac1n\sum_i\sum_c p_T(c \mid x_{<i})\log p(c \mid x_{<i})", "training, a teacher",
           "binary from random weights, equal steps: the teacher's distribution alone gives a lower loss on the text than the text itself", 252,
           evidence.distilled_binary),
]  # fmt: skip
