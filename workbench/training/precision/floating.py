"""Floating-point precisions of the processor itself."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from workbench.axis import Options
from workbench.training.precision.precision import PRECISION

if TYPE_CHECKING:
    from workbench.subjects import Subject

Context = contextlib.AbstractContextManager[Any]


@PRECISION.add("fp32", formula="as the weights are", source="")
def fp32(subject: Subject, options: Options) -> Context:
    return contextlib.nullcontext()


@PRECISION.add("bf16", formula="matrix products in bfloat16, the rest as it is", source="torch.autocast")
def bf16(subject: Subject, options: Options) -> Context:
    return torch.autocast(subject.device.type, torch.bfloat16)


@PRECISION.add(
    "fp16",
    formula="matrix products in float16, the loss scaled so that no gradient underflows",
    source="Micikevicius et al. 2018; torch.autocast",
    traits="loss-scaling",
)
def fp16(subject: Subject, options: Options) -> Context:
    return torch.autocast(subject.device.type, torch.float16)
