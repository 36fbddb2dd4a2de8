"""Learning rate x batch size surfaces of small byte language models:
the table behind the `learning-rate-batch-size` notebook.

    python data/runs/training_lr_batch.py
        # fills data/runs/training_lr_batch.csv, resuming where it stopped

Four cells (model size x examples) of the `bytelm` family, windows of 64 bytes, AdamW, cosine to zero after 10
% warm-up, random initial weights, equal examples in every run of a cell. Decided before any run was looked
at: the grid, the validation split as the judge, the bowl fitted to runs within 5 % of a cell's lowest loss.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import pandas as pd
import torch
import transformers

from workbench.progress import TextProgress
from workbench.training.studies.learning_rate_batch_size import LearningRateBatchSize, shape_of
from workbench.training.sweep.objective import language_subject

CELLS = ((24, 1024), (24, 4096), (48, 1024), (48, 4096))  # width, examples
FOLDER = Path(__file__).parent


def main() -> None:
    torch.set_num_threads(1)
    parts = []
    for width, examples in CELLS:
        on = language_subject(width)
        study = LearningRateBatchSize(
            examples=examples,
            learning_rate_low=1e-3,
            learning_rate_high=6.4e-2,
            learning_rate_points=7,
            batch_sizes=(8, 32, 128),
            evaluate_limit=256,
            workers=int(sys.argv[1]) if len(sys.argv) > 1 else 2,
        )
        result = study.run(on, progress=TextProgress())
        print(result.summary(), flush=True)
        shape = shape_of(on)
        frame = result.table.rename(columns={"lr": "learning_rate", "value": "loss"})
        frame["width"], frame["params"], frame["examples"] = width, int(shape["params"]), examples
        frame["tokens"] = round(examples * shape["tokens_per_example"])
        frame["batch_tokens"] = frame.batch_size * shape["tokens_per_example"]
        frame["name"] = [
            f"{width}-{examples}-b{r.batch_size}-lr{r.learning_rate:.3g}" for r in frame.itertuples()
        ]
        parts.append(frame.drop(columns=["trial", "state_bytes"], errors="ignore"))
        pd.concat(parts).to_csv(FOLDER / "training_lr_batch.csv", index=False, float_format="%.7g")
    note = {
        "script": "data/runs/training_lr_batch.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cells": CELLS,
        "machine": platform.machine(),
    }
    (FOLDER / "training_lr_batch.json").write_text(json.dumps(note, indent=1))


if __name__ == "__main__":
    main()
