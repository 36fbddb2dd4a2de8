"""The fresh process of `workbench.storage.reopening`: open a folder and print the loss as JSON.

python -m workbench.storage.reopened PARENT FOLDER SPLIT THREADS
"""

from __future__ import annotations

import json
import sys

from workbench.storage.together import ends_with_its_parent


def answer(folder: str, split: str, threads: str) -> None:
    import torch

    from workbench.storage.reopening import probe_loss
    from workbench.subjects.loaders import subject

    torch.set_num_threads(int(threads))
    try:
        print(json.dumps({"loss": probe_loss(subject(folder), split)}))
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    ends_with_its_parent(int(sys.argv[1]))
    answer(*sys.argv[2:])
