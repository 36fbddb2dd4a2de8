"""Unpadded MiniLM on real, mixed-length docstrings against the padded model with fused attention, on the CPU.

    python tests/benchmarks/bench_kernels_unpadded.py

Prints the ratio of times beside the ideal (padded tokens / valid tokens), the share of the ideal that is
reached, and the largest difference: for the built-in subject `minilm-docstrings` on its own test split
(logits; its first use fine-tunes it), and for the bare encoder at several maximum lengths (hidden states).
Both run in one process, alternating.
"""

from __future__ import annotations

import copy
import inspect
import pkgutil
import statistics
import sys
import time

import torch


def docstrings(limit: int) -> list[str]:
    """Docstrings of the public members of torch, numpy and the standard library:
    short, long, code and prose.
    """
    found: dict[str, None] = {}
    for module in (
        torch,
        torch.nn,
        torch.nn.functional,
        statistics,
        inspect,
        pkgutil,
        sys.modules["pathlib"],
        torch.optim,
    ):
        for name, member in vars(module).items():
            text = inspect.getdoc(member) if callable(member) and not name.startswith("_") else None
            if text:
                found[text] = None
    return list(found)[:limit]


def compare(padded: torch.nn.Module, batches: list[dict[str, torch.Tensor]], output: str) -> str:
    """One line: median ratio of CPU seconds over five alternating runs, its ideal,
    and the largest difference of `output`.
    """
    from workbench.kernels.sequence.unpadded import unpad

    packed = unpad(copy.deepcopy(padded))
    ideal = sum(b["attention_mask"].numel() for b in batches) / sum(
        int(b["attention_mask"].sum()) for b in batches
    )
    ratios, worst = [], 0.0
    with torch.no_grad():
        for repeat in range(6):
            seconds, results = [], []
            for model in (padded, packed):
                start = time.process_time()
                results.append([getattr(model(**batch), output) for batch in batches])
                seconds.append(time.process_time() - start)
            if repeat:  # the first is the warm-up
                ratios.append(seconds[0] / seconds[1])
        for a, b, batch in zip(*results, batches, strict=True):
            difference = (a - b).abs()
            worst = max(
                worst,
                float(
                    (difference[batch["attention_mask"].bool()] if difference.ndim == 3 else difference).max()
                ),
            )
    ratio = statistics.median(ratios)
    return (
        f"x {ratio:.2f} (ideal x {ideal:.2f}, {100 * ratio / ideal:.0f} % of it), "
        f"largest difference {worst:.1e}"
    )


def main() -> None:
    from transformers import AutoModel, AutoTokenizer

    import workbench
    from workbench.subjects.builtin.minilm import carrier_folder

    torch.set_num_threads(1)
    subject = workbench.subject("minilm-docstrings")
    test = {name: column[:128] for name, column in subject.splits["test"].items() if name != "labels"}
    batches = []
    for i in range(0, 128, 32):
        batch = {name: column[i : i + 32] for name, column in test.items()}
        longest = int(batch["attention_mask"].sum(1).max())
        batches.append({name: column[:, :longest] for name, column in batch.items()})
    print("minilm-docstrings:", compare(subject.model, batches, "logits"), flush=True)
    tokenizer = AutoTokenizer.from_pretrained(carrier_folder())
    encoder = AutoModel.from_pretrained(carrier_folder(), attn_implementation="sdpa").eval()
    texts = docstrings(128)
    for longest in (64, 128, 256):
        batches = [
            dict(
                tokenizer(
                    texts[i : i + 32], padding=True, truncation=True, max_length=longest, return_tensors="pt"
                )
            )
            for i in range(0, len(texts), 32)
        ]
        print(f"encoder, max length {longest}:", compare(encoder, batches, "last_hidden_state"), flush=True)


if __name__ == "__main__":
    main()
