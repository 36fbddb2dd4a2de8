"""Catalog cards of the methods that train with masks or train a part, and of recovery on a pretrained BERT."""

from __future__ import annotations

import functools
from typing import Any

from workbench.instruments import Method
from workbench.pruning.training_evidence import recovered_accuracy

# One epoch of the training split is 320 such steps; what is asked of each pruning is the project's own goal.
RECOVERY: dict[str, Any] = {"recovery": "distil", "lr": 2e-4, "batch_size": 16, "gradients": 64}

CARDS: list[Method] = [
    Method("recovery-minilm", "pruning", "Recovery of a pretrained BERT", "Kurtic et al. 2022; Mishra et al. 2021; Kurtic, Frantar and Alistarh 2023",
           "gradual oBERT, SparseGPT at 2:4, and ZipLM's structures, each with distillation", "fine-tuning",
           "80 % of the weights within 1 accuracy point of dense, 2:4 within 1, half of heads and neurons within 3 at a measured 1.4x", 0,
           functools.partial(recovered_accuracy, targets={
               "oBERT at 80 %": (RECOVERY | {"method": "obert", "sparsity": 0.8, "schedule": "cubic", "steps": 4, "recovery_steps": 180}, 1.0, 0.0),
               "2:4": (RECOVERY | {"method": "sparsegpt", "pattern": "2:4", "recovery_steps": 120}, 1.0, 0.0),
               "half of heads and neurons": (RECOVERY | {"method": "ziplm", "pattern": "heads+neurons", "sparsity": 0.5, "schedule": "cubic", "steps": 3,
                                                         "recovery_steps": 150}, 3.0, 1.4)})),
]  # fmt: skip
