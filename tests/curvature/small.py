"""Small subjects of every kind for the curvature tests."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

import workbench
from tests.conftest import tiny
from workbench.subjects import TASK, Subject

TASK_OF = {
    "bert": "sequence-classification",
    "gpt2": "causal-lm",
    "llama": "causal-lm",
    "t5": "seq2seq-lm",
    "vit": "image-classification",
    "mixtral": "causal-lm",
}


def random_split(architecture: str, examples: int, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    if architecture == "vit":
        return {
            "pixel_values": torch.randn(examples, 3, 16, 16, generator=draw),
            "labels": torch.randint(3, (examples,), generator=draw),
        }
    ids = torch.randint(1, 99, (examples, 12), generator=draw)
    mask = torch.ones_like(ids)
    mask[1::2, 9:] = 0
    columns = {"input_ids": ids, "attention_mask": mask}
    if architecture == "bert":
        columns["labels"] = torch.randint(3, (examples,), generator=draw)
    elif architecture == "t5":
        columns["labels"] = torch.randint(1, 99, (examples, 6), generator=draw)
    else:
        columns["labels"] = ids.masked_fill(mask == 0, -100)
    return columns


def stock(architecture: str, dtype: torch.dtype = torch.float32, examples: int = 6) -> Subject:
    """A stock transformers class, small, random weights scaled up so that curvature is not negligible."""
    model = tiny(architecture).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.mul_(4)
            elif "norm" in name.lower() or "ln_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    splits = {
        s: random_split(architecture, examples, i)
        for i, s in enumerate(("train", "calibration", "validation", "test"))
    }
    if architecture == "vit":
        for split in splits.values():
            split["pixel_values"] = split["pixel_values"].to(dtype)
    return Subject(architecture, model, TASK[TASK_OF[architecture]].value(), splits, data_note="random")


def mlp(
    dtype: torch.dtype = torch.float64,
    examples: int = 24,
    loss: Any = None,
    widths: tuple[int, ...] = (5, 4, 3),
) -> Subject:
    """A small tanh network with an affine LayerNorm; its Hessian fits in memory."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(widths[:-1]):
        parts += [nn.Linear(a, b), nn.LayerNorm(b), nn.Tanh()]
    model = nn.Sequential(*parts, nn.Linear(widths[-2], widths[-1])).to(dtype)
    inputs = torch.randn(examples, widths[0], dtype=dtype)
    labels = (
        torch.randn(examples, widths[-1], dtype=dtype)
        if loss == "squared_error" or callable(loss)
        else torch.randint(widths[-1], (examples,))
    )
    split = {"inputs": inputs, "labels": labels}
    return workbench.subject(
        model, data=dict.fromkeys(("train", "calibration", "validation", "test"), split), loss=loss
    )
